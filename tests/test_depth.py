"""Fewer blocks: the loss that chooses one head, the cut, ordinary models, and depths given by other rules."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import softlms
from softlms.experiments.recipe import Recipe
from softlms.methods.depth import keep_blocks
from softlms.methods.depth.cut import put_head
from softlms.methods.depth.loss import depth_loss, weigh
from softlms.methods.depth.method import BlocksConfig, DepthConfig
from softlms.methods.depth.search import Deep

RECIPE = Recipe(dense_epochs=1, epochs=1, distillation=0.5, keep=0.5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_without_the_normaliser_a_mixture_is_never_better_than_its_best_head(seed):
    torch.manual_seed(seed)
    w, logits = 3 * torch.randn(4), 2 * torch.randn(1, 4, 3)
    target = torch.randn(1, 3).softmax(-1)
    alone = [depth_loss(torch.tensor([0.0]), logits[:, i : i + 1], target, 0.0) for i in range(4)]
    assert depth_loss(w, logits, target, 0.0) >= min(alone) - 1e-5
    torch.testing.assert_close(alone[0], torch.nn.functional.cross_entropy(logits[:, 0], target))


def test_the_loss_by_its_formula_and_its_gradient():
    w, logits = torch.randn(3).double().requires_grad_(), torch.randn(2, 3, 2).double().requires_grad_()
    target = torch.randn(2, 2).double().softmax(-1)
    a, p = w.softmax(0), logits.softmax(-1)
    product = (p ** a[:, None]).prod(1)
    torch.testing.assert_close(weigh(w, logits.log_softmax(-1)), product.log())
    expected = (product.sum(-1).log() - (target * product.log()).sum(-1)).mean() + 0.1 * (a[0] + 2 * a[1] + 3 * a[2])
    torch.testing.assert_close(depth_loss(w, logits, target, 0.1, gamma=1.0), expected)
    for gamma in (0.0, 1.0):
        assert torch.autograd.gradcheck(lambda w, x, g=gamma: depth_loss(w, x, target, 0.1, g), (w, logits))


def learned(beta, gamma, steps=300):
    """Weights after training w alone on heads of which the second is almost as good as the last."""
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (64,))
    right = torch.nn.functional.one_hot(labels, 2).float()
    logits = torch.stack([s * right + 0.5 * torch.randn(64, 2) for s in (0.0, 3.0, 3.2)], dim=1)
    w = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([w], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        depth_loss(w, logits, right, beta, gamma).backward()
        optimizer.step()
    return w.detach().softmax(0)


def test_the_weights_settle_on_one_head_an_earlier_one_where_blocks_are_dear():
    free, dear, dearest = learned(0.0, 0.0), learned(0.1, 0.0), learned(2.0, 0.0)
    assert [int(a.argmax()) for a in (free, dear, dearest)] == [2, 1, 0]
    assert min(a.max() for a in (free, dear, dearest)) > 0.9
    assert learned(0.0, 1.0).max() < 0.9 * free.max()  # with the normaliser they spread


@torch.no_grad()
def test_a_deep_models_heads_begin_as_its_own(tiny_bert, tokens):
    model = tiny_bert(num_hidden_layers=3)
    logits = Deep(model).eval()(tokens)
    assert logits.shape == (3, 3, 2)
    torch.testing.assert_close(logits[:, -1], model(tokens).logits)


@torch.no_grad()
def test_a_cut_model_answers_as_its_head_did(tiny_bert, tokens):
    model = tiny_bert(num_hidden_layers=3)
    deep = Deep(model).eval()
    for head in deep.heads:
        nn.init.normal_(head.classifier.weight)
    expected = deep(tokens)[:, 1]
    put_head(model, deep.heads[1])
    keep_blocks(model, [0, 1])
    assert model.config.num_hidden_layers == 2 and len(model.bert.encoder.layer) == 2
    torch.testing.assert_close(model(tokens).logits, expected)


def test_the_cut_model_loads_without_softlms(tiny_bert, tokens, tmp_path):
    model = tiny_bert(num_hidden_layers=3)
    parameters = model.num_parameters()
    keep_blocks(model, [0, 2])
    model.save_pretrained(tmp_path)
    torch.save({"tokens": tokens, "logits": model(tokens).logits.detach()}, tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r}).eval()
known = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model(known["tokens"]).logits, known["logits"])
assert type(model).__name__ == "BertForSequenceClassification" and "softlms" not in sys.modules
print(model.num_parameters())
"""
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    assert int(left) == parameters - sum(v.numel() for v in model.bert.encoder.layer[0].parameters())


def test_weights_settle_in_a_short_training(bench):
    """What a run of some hundred steps does: the weights choose a head, and a price makes it an earlier one."""
    recipe = RECIPE.changed(epochs=40, distillation=0.0)
    found = {}
    for beta in (0.0, 1.0):
        run = bench.run("depth", recipe.changed(settings={"depth": {"beta": beta}}), 0).result
        found[beta] = run["blocks"]
        assert max(run["a"]) > 0.9 and run["uncut"]["dev"].keys() == run["scores"]["dev"].keys()
    assert found[1.0] == 1


@pytest.mark.parametrize("method", ["depth", "first-blocks", "needed-blocks"])
def test_methods_leave_a_smaller_model_of_the_same_class(bench, method):
    blocks = {} if method == "depth" else {"settings": {method: {"blocks": 1}}}
    found = bench.run(method, RECIPE.changed(**blocks), 0).result
    dense = bench.run("dense", RECIPE, 0).result
    assert found["steps"] == 3 and found["scores"].keys() == dense["scores"].keys()
    if method == "depth":
        assert len(found["a"]) == 2 and sum(found["a"]) == pytest.approx(1)
        assert found["blocks"] == 1 + found["a"].index(max(found["a"]))
    else:
        assert found["blocks"] == 1 and found["parameters_total"] < dense["parameters_total"]
        assert len(found["kept_blocks"]) == 1 and found["kept_linear"] == pytest.approx(0.5)


def test_the_least_needed_block_goes(bench, tiny_folder, monkeypatch):
    """A block that does nothing is removed first, wherever it is."""
    from softlms.data.encoders import load_classifier
    from softlms.methods.base import Work
    from softlms.methods.depth.method import keep_some

    torch.manual_seed(0)
    model = load_classifier(tiny_folder, num_labels=2, num_hidden_layers=4)
    model.train(False)
    idle = model.bert.encoder.layer[1]
    with torch.no_grad():
        for layer in (idle.attention.output.dense, idle.output.dense):
            layer.weight.zero_()
            layer.bias.zero_()
    work = Work(bench.splits["train"], bench.collator, 0, bench.folder, arguments=None)
    config = BlocksConfig(blocks=3, by="sensitivity", epochs=0, calibration_rows=48)
    labels = model(**bench.collator([{"input_ids": row} for row in work.rows["input_ids"]])).logits.argmax(-1)
    work.rows = work.rows.remove_columns("labels").add_column("labels", labels.tolist())  # the model is always right
    assert keep_some(model, config, work)["kept_blocks"] == [0, 2, 3]


@pytest.mark.parametrize("chain", ["svd+uniform+depth", "depth+svd+uniform", "svd+uniform+first-blocks"])
def test_before_or_after_low_rank(bench, chain, tmp_path):
    short = {"first-blocks": {"blocks": 1}} if "first" in chain else {}
    found = bench.run(chain, RECIPE.changed(settings=short), 0).result
    assert found["kept_linear"] <= 0.5


def test_saved_with_thin_layers(tiny_bert, tokens, tmp_path):
    model = softlms.deploy(softlms.decompose(tiny_bert(num_hidden_layers=3)), keep=0.5)
    keep_blocks(model, [0, 2])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert softlms.count_parameters(loaded).kept("linear") == softlms.count_parameters(model).kept("linear") < 0.4


def test_unfit_models_and_settings_are_refused(tiny_bert):
    config = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForSequenceClassification(LlamaConfig(**config, intermediate_size=48, num_key_value_heads=2))
    with pytest.raises(ValueError, match="A search for the depth needs a classifier .*; LlamaForSeq.* is none"):
        Deep(llama)
    model = tiny_bert()
    for blocks in ([], [1, 0], [0, 0], [2], [-1, 0]):
        with pytest.raises(ValueError, match="rising numbers from 0 to 1"):
            keep_blocks(model, blocks)
    for settings_of in ({"beta": -1}, {"beta": float("nan")}, {"normaliser": 2}):
        with pytest.raises(ValueError, match="beta is 0 or more and normaliser 0 to 1"):
            DepthConfig(**settings_of)
    with pytest.raises(ValueError, match="epochs must be positive"):
        DepthConfig(epochs=0)
    with pytest.raises(ValueError, match="by must be"):
        BlocksConfig(by="chance")
    assert len(model.bert.encoder.layer) == 2
