"""Early exits: rows that leave run no further block, heads and ensembles, saving, training, rules and measures."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import softlms
from softlms.experiments.recipe import Recipe
from softlms.methods.depth import keep_blocks
from softlms.methods.dynamic_moe import put_experts
from softlms.methods.early_exit import predict, put_exits
from softlms.methods.early_exit.exits import Exits
from softlms.methods.early_exit.method import ExitsConfig
from softlms.methods.early_exit.rules import RULES, curve, hindsight_improvability, score_at
from softlms.methods.early_exit.said import said_by_all
from softlms.methods.early_exit.training import first_states, train_exits

SIZE, LAYERS, CLASSES = 32, 4, 2
KINDS = [(True, True), (False, False), (True, False), (False, True)]


def exits_of(cascade=True, ensemble=True, scale=0.7):
    """Heads with strong opinions, so that rows leave at different blocks."""
    exits = Exits(SIZE, CLASSES, LAYERS - 1, 0.1, cascade=cascade, ensemble=ensemble)
    for head in exits.heads:
        torch.nn.init.normal_(head.classifier.weight, std=scale)
    return exits.eval()


@pytest.fixture
def whole(tiny_bert):
    return tiny_bert(num_hidden_layers=LAYERS)


@pytest.fixture
def batch():
    ids = torch.randint(1, 200, (12, 9))
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, 9 - row % 4 :] = 0  # padding on the right
    return {"input_ids": ids, "attention_mask": mask}


def reference(whole, exits, batch, threshold):
    """Every block for every row, and then the first head that is sure."""
    states = whole.bert(**batch, output_hidden_states=True).hidden_states[1:]
    logs, before = [], None
    blocks = torch.full((len(batch["input_ids"]),), LAYERS)
    said = whole(**batch).logits.clone()
    for m in range(LAYERS - 1):
        before = exits.says(m, states[m][:, 0], before)
        logs.append(before.log_softmax(-1))
        q = exits.together(m, torch.stack(logs, dim=1))
        new = (q.exp().amax(-1) > threshold) & (blocks == LAYERS)
        blocks[new], said[new] = m + 1, q[new]
    return said, blocks


@torch.no_grad()
@pytest.mark.parametrize(("cascade", "ensemble"), KINDS)
@pytest.mark.parametrize("threshold", [0.0, 0.55, 0.8, 0.95, 1.5])
def test_rows_leave_at_the_first_sure_head_with_its_answer(whole, batch, cascade, ensemble, threshold):
    exits = exits_of(cascade, ensemble)
    logits, blocks = reference(whole, exits, batch, threshold)
    put_exits(whole, exits)
    found = predict(whole, threshold, **batch)
    assert found.blocks.tolist() == blocks.tolist()
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    if threshold == 0.8:
        assert len(set(blocks.tolist())) > 1  # else this test would say little


@torch.no_grad()
def test_nothing_changes_without_a_threshold_or_above_one(whole, batch):
    before = whole(**batch).logits
    put_exits(whole, exits_of())
    assert torch.equal(whole(**batch).logits, before)
    assert torch.equal(whole(**batch, exit_threshold=1.5).logits, before)
    assert torch.equal(whole(**batch).logits, before)  # no answer is left over


def test_heads_count_as_what_was_added(whole):
    exits, parameters = exits_of(), sum(values.numel() for values in whole.bert.parameters())
    put_exits(whole, exits)
    counted = softlms.count_parameters(whole)
    added = sum(values.numel() for values in exits.parameters())
    assert counted.kept("linear") == 1
    assert counted.kept("total") == pytest.approx(1 + added / (parameters + 2 * SIZE + 2), abs=1e-3)


@torch.no_grad()
def test_blocks_are_skipped(whole, batch):
    """A block sees the rows that are left; once none is, it is not called."""
    put_exits(whole, exits_of())
    seen = []
    for block in whole.bert.encoder.layer:
        block.register_forward_hook(lambda _, inputs, out: seen.append(len(inputs[0])))
    found = predict(whole, 0.8, **batch)
    assert seen == [n for n in (int((found.blocks > m).sum()) for m in range(LAYERS)) if n]
    seen.clear()
    assert predict(whole, 0.0, **batch).blocks.tolist() == [1] * 12 and seen == [12]
    seen.clear()
    one = {name: values[:1] for name, values in batch.items()}
    alone = predict(whole, 0.8, **one)
    assert len(seen) == alone.blocks.item() == found.blocks[0].item()


def test_no_gradient_from_a_head_to_the_one_before():
    exits = exits_of()
    states = torch.randn(5, LAYERS - 1, SIZE)
    logits, _ = exits(states)
    logits[:, 2].sum().backward()
    touched = [any(v.grad is not None and v.grad.any() for v in head.parameters()) for head in exits.heads]
    assert touched == [False, False, True]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_an_ensemble_is_a_weighted_product_of_what_was_said(seed):
    torch.manual_seed(seed)
    exits = Exits(SIZE, 3, 3, 0.0, ensemble=True)
    with torch.no_grad():
        exits.v.normal_()
        exits.b.normal_()
    logs = torch.randn(4, 3, 3).log_softmax(-1)
    q = exits.all_together(logs).exp()
    torch.testing.assert_close(q.sum(-1), torch.ones(4, 3))
    product = (logs[:, 0].exp() ** exits.v[1, 0].exp()) * (logs[:, 1].exp() ** exits.v[1, 1].exp()) * exits.b[1].exp()
    torch.testing.assert_close(q[:, 1], product / product.sum(-1, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("cascade", "ensemble"), KINDS)
def test_saved_and_loaded_bit_for_bit(whole, batch, cascade, ensemble, factored, tmp_path):
    if factored:
        softlms.deploy(softlms.decompose(whole), keep=0.5)
    put_exits(whole, exits_of(cascade, ensemble))
    whole.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for model in (loaded, copy.deepcopy(whole)):
        for threshold in (0.8, 2.0):
            found, expected = predict(model, threshold, **batch), predict(whole, threshold, **batch)
            assert torch.equal(found.logits, expected.logits) and torch.equal(found.blocks, expected.blocks)
    if factored:
        assert softlms.count_parameters(loaded).kept("linear") <= 0.5


@torch.no_grad()
def test_without_the_head_that_answers_no_row_leaves(whole, batch, tmp_path):
    """Loaded without its classifier, or with the classifier wrapped: refused, never a silent answer of another head."""
    put_exits(whole, exits_of())
    whole.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(body(**batch).last_hidden_state, whole.bert(**batch).last_hidden_state)
    with pytest.raises(ValueError, match="load the classifier"):
        body(**batch, exit_threshold=0.5)
    whole.classifier = torch.nn.Linear(SIZE, CLASSES)
    with pytest.raises(ValueError, match="The exits' answers were not taken"):
        predict(whole, 0.5, **batch)
    whole(**batch, exit_threshold=0.5)
    with pytest.raises(ValueError, match="The exits' answers were not taken"):
        whole(**batch)


@torch.no_grad()
def test_what_all_say_is_what_the_model_says(whole, rows, bench):
    put_exits(whole, exits_of())
    said = said_by_all(whole, rows, bench.collator, batch_size=7)
    assert said.shape == (48, LAYERS, CLASSES)
    one = {"input_ids": torch.tensor([rows[5]["input_ids"]])}
    torch.testing.assert_close(said[5, -1], whole(**one).logits[0].log_softmax(-1), rtol=1e-4, atol=1e-5)
    for threshold in (0.6, 0.8, 0.95):
        found = predict(whole, threshold, **one)
        assert RULES["confidence"][0](said[5:6].numpy(), threshold).blocks == found.blocks.numpy()


def test_a_head_missing_at_load_is_an_error(whole, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    put_exits(whole, exits_of())
    whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys() if ".heads.1." not in name}  # noqa: SIM118
        metadata = tensors.metadata()
    save_file(kept, file, metadata)
    with pytest.raises(ValueError, match=r"exits\.heads\.1"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_training_learns_and_leaves_the_model_as_it_was(whole, rows, bench):
    """The first token tells the label: later blocks know it, and confident rows leave."""
    collator = bench.collator
    before = {name: values.clone() for name, values in whole.state_dict().items()}
    states = first_states(whole, whole.bert.encoder.layer, rows, collator)
    assert states.shape == (48, LAYERS, SIZE)
    with torch.no_grad():
        expected = whole.bert(input_ids=torch.tensor([rows[3]["input_ids"]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[3], torch.stack(expected[1:], 1)[0, :, 0], rtol=1e-4, atol=1e-5)
    exits = Exits(SIZE, CLASSES, LAYERS - 1, 0.1)
    labels = torch.tensor(rows["labels"])
    options = {"batch": 8, "learning_rate": 0.01, "ensemble_learning_rate": 0.1, "weight_decay": 1e-4, "seed": 0}
    steps = train_exits(exits, states, labels, epochs=30, note=lambda line: None, **options)
    assert steps == 2 * 30 * 6
    said = exits(states[:, :-1])[1].argmax(-1)
    assert (said[:, -1] == labels).float().mean() > 0.9
    assert all(torch.equal(values, before[name]) for name, values in whole.state_dict().items())


@pytest.mark.parametrize("method", ["ztw-exits", "sdn-exits", "svd+uniform+ztw-exits"])
def test_a_run_scores_as_the_model_that_gets_exits(bench, method):
    recipe = Recipe(dense_epochs=1, epochs=0, distillation=0.0, keep=0.5)
    found = bench.run(method, recipe, 0).result
    without = bench.run(method.removesuffix("+ztw-exits") if "uniform" in method else "dense", recipe, 0).result
    assert found["scores"] == without["scores"] and found["trained"] > 0 and found["exit_steps"] > 0


def test_unfit_models_and_settings_are_refused(tiny_bert, whole, batch):
    config = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForSequenceClassification(LlamaConfig(**config, intermediate_size=48, num_key_value_heads=2))
    words = BertForMaskedLM(BertConfig(**config, intermediate_size=48))
    for model in (llama, words):
        with pytest.raises(ValueError, match=rf"An early exit needs a classifier .*; {type(model).__name__} is none"):
            put_exits(model, exits_of())
    with pytest.raises(ValueError, match="has one output, a score"):
        put_exits(tiny_bert(num_labels=1), exits_of())
    with pytest.raises(ValueError, match="any number of labels"):
        put_exits(tiny_bert(problem_type="multi_label_classification"), exits_of())
    with pytest.raises(ValueError, match="BertForSequenceClassification is none"):
        put_exits(tiny_bert(is_decoder=True), exits_of())
    with pytest.raises(ValueError, match="needs two blocks or more; the model has 1"):
        put_exits(tiny_bert(num_hidden_layers=1), exits_of())
    with pytest.raises(ValueError, match="has no exits: train them first"):
        predict(whole, 0.5, **batch)
    put_exits(whole, exits_of())
    for again in (lambda: put_exits(whole, exits_of()), lambda: keep_blocks(whole, [0]), lambda: put_experts(whole, 8)):
        with pytest.raises(ValueError, match="the model has exits.*, and they come last"):
            again()
    for threshold in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="exit_threshold is a probability"):
            predict(whole, threshold, **batch)
    with pytest.raises(ValueError, match="leave exit_threshold or these outputs out"):
        predict(whole, 0.5, **batch, output_hidden_states=True)
    whole.config.output_hidden_states = True
    with pytest.raises(ValueError, match="leave exit_threshold or these outputs out"):
        predict(whole, 0.5, **batch)
    whole.config.output_hidden_states = False
    with pytest.raises(ValueError, match="in evaluation alone"):
        predict(whole.train(), 0.5, **batch)
    for setting in ({"exit_epochs": 0}, {"exit_learning_rate": 2}, {"exit_batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            ExitsConfig(**setting)


SAID = np.log(
    np.array(
        [
            [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]],
            [[0.4, 0.6], [0.2, 0.8], [0.1, 0.9]],
            [[0.3, 0.7], [0.7, 0.3], [0.95, 0.05]],
        ]
    )
)


def test_rules():
    leave, _ = RULES["confidence"]
    assert leave(SAID, 0.75).blocks.tolist() == [1, 2, 3] and leave(SAID, 0.75).answers.tolist() == [0, 1, 0]
    assert leave(SAID, 1.0).blocks.tolist() == [3, 3, 3] and leave(SAID, 0.0).blocks.tolist() == [1, 1, 1]
    leave, _ = RULES["entropy"]
    assert leave(SAID, 0.5).blocks.tolist() == [1, 3, 3]  # H(0.9) is 0.47 of log 2, H(0.8) is 0.72
    leave, _ = RULES["patience"]
    assert leave(SAID, 1).blocks.tolist() == [2, 2, 3] and leave(SAID, 0).blocks.tolist() == [1, 1, 1]


def test_curves_go_from_the_first_block_to_the_last():
    labels = np.array([0, 1, 1])
    for rule in RULES:
        points = curve(SAID, labels, rule, lambda y, p: float((y == p).mean()))
        blocks = [point["blocks"] for point in points]
        assert blocks[0] == 1 and blocks[-1] == 3 and blocks == sorted(blocks)
        assert points[0]["score"] == 1 and points[-1]["score"] == pytest.approx(2 / 3)
        assert score_at(points, 1) == 1 and np.isnan(score_at(points, 0.5))
    assert score_at([{"blocks": 1.0, "score": 0.5}, {"blocks": 3.0, "score": 1.0}], 2) == 0.75


def test_hindsight():
    assert hindsight_improvability(SAID, np.array([0, 1, 1])) == 1  # its one mistake was known better before
    assert hindsight_improvability(SAID, np.array([1, 1, 0])) == 0
    assert hindsight_improvability(SAID, np.array([0, 1, 0])) == 0  # no mistake
