"""What rows are to a model: the same in every batch, whichever side is padded, with every column that it takes."""

import datasets
import pytest
import torch
import transformers
from transformers import DefaultDataCollator

from softlms.data.inputs import batches, prepared
from softlms.data.tasks import TASKS
from softlms.evaluation.metrics import add_teacher_logits, evaluate, mean_loss
from softlms.lowrank.calibration import calibrate

SMALL = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 2}
MODELS = {
    "Bert": SMALL | {"intermediate_size": 64},
    "Roberta": SMALL | {"intermediate_size": 64} | SPECIAL,
    "DistilBert": {"vocab_size": 90, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "pad_token_id": 1},
    "GPT2": {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 1} | SPECIAL,
    "Llama": SMALL | {"intermediate_size": 64} | SPECIAL,
    "OPT": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32} | SPECIAL,
}


def make(name, head="ForSequenceClassification"):
    config = getattr(transformers, f"{name}Config")(**MODELS[name], initializer_range=0.3)
    return getattr(transformers, name + head)(config).eval()


def padding(side, **filled):
    """A collator that pads on one side, with nothing asked of a tokenizer."""
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100} | filled

    def collate(examples):
        width = max(len(example["input_ids"]) for example in examples)

        def row(name, values):
            if not isinstance(values, list):
                return values
            more = [fill[name]] * (width - len(values))
            return more + values if side == "left" else values + more

        return {name: torch.tensor([row(name, e[name]) for e in examples]) for name in examples[0]}

    return collate


@pytest.fixture
def rows():
    ids = [torch.randint(5, 90, (length,)).tolist() for length in (9, 3, 12, 5, 7, 4)]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


SIDES = [(name, side) for name in MODELS for side in ("left", "right")]
ENCODERS = ("Bert", "Roberta", "DistilBert")


@pytest.mark.parametrize("name, side", [(n, side) for n, side in SIDES if side == "right" or n not in ENCODERS])
def test_a_row_has_its_own_logits_in_every_batch(name, side, rows):
    model = make(name)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    taught = torch.tensor(list(add_teacher_logits(rows, model, padding(side), batch_size=4)["teacher_logits"]))
    torch.testing.assert_close(taught, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, side", SIDES)
def test_a_layer_sees_the_same_tokens_in_every_batch(name, side, rows):
    model = make(name, "Model")
    second = [n for n, m in model.named_modules() if ".1." in n and hasattr(m, "weight") and m.weight.ndim == 2]
    options = {"rows": 6, "targets": lambda layer, module: layer in second}
    expected = calibrate(model, rows, padding(side), batch_size=1, **options)
    assert len(second) >= 4
    for layer, seen in calibrate(model, rows, padding(side), batch_size=6, **options).items():
        torch.testing.assert_close(seen.gram, expected[layer].gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_classifier_that_reads_the_first_token_is_not_given_padding(name, rows):
    labelled = rows.add_column("labels", [0, 1] * 3)
    model, collator = make(name), padding("left")
    for measure in (
        lambda: calibrate(model, rows, collator, rows=6, targets=lambda layer, module: type(module) is torch.nn.Linear),
        lambda: add_teacher_logits(rows, model, collator),
        lambda: evaluate(model, TASKS["rte"], labelled, collator),
        lambda: mean_loss(model, labelled, collator),
    ):
        with pytest.raises(ValueError, match=rf"{name}ForSequenceClassification reads the first .* = 'right'"):
            measure()


@pytest.mark.parametrize("side", ["left", "right"])
def test_mean_loss_is_over_all_predicted_tokens_whatever_the_batches(side, rows):
    """A row's first token has nothing before it, on the left of which there may be padding."""
    model = make("GPT2", "LMHeadModel")
    rows = rows.add_column("labels", rows["input_ids"][:])
    expected = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        expected += [-log_p[t - 1, ids[t]].item() for t in range(1, len(ids))]
    for batch_size in (1, 4):
        found = mean_loss(model, rows, padding(side), batch_size=batch_size)
        assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_mean_loss_of_classes_and_scores_is_over_the_rows(rows, tiny_bert):
    model = make("Bert")
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    labels = [0, 1, 1, 0, 1, 0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    labelled = rows.add_column("labels", labels)
    assert mean_loss(model, labelled, padding("right"), batch_size=4) == pytest.approx(expected, rel=1e-5)
    model = tiny_bert(num_labels=1)
    with torch.no_grad():
        scores = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    expected = (scores - torch.tensor(labels)).square().mean().item()
    scored = rows.add_column("labels", [float(label) for label in labels])
    assert mean_loss(model, scored, padding("right"), batch_size=4) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="BertForSequenceClassification returns no loss"):
        mean_loss(model, rows, padding("right"))


def test_a_token_of_a_classified_row_keeps_its_label(rows):
    """Only a causal language model's labels are those of the token after."""
    model = make("GPT2", "ForTokenClassification")
    labelled = rows.add_column("labels", [[i % 2 for i, _ in enumerate(ids)] for ids in rows["input_ids"]])
    one, many = (mean_loss(model, labelled, padding("left"), batch_size=size) for size in (1, 6))
    assert many == pytest.approx(one, rel=1e-5)
    (batch,) = batches(model, labelled, padding("left"), 6, labels=True)
    assert (batch["labels"] != -100).sum() == batch["attention_mask"].sum()


def test_every_column_that_the_forward_takes_is_given(rows, tiny_bert):
    model = tiny_bert()
    columns = {
        "position_ids": [[2 * i for i, _ in enumerate(ids)] for ids in rows["input_ids"]],
        "token_type_ids": [[i % 2 for i, _ in enumerate(ids)] for ids in rows["input_ids"]],
        "sentence": ["not for the model"] * len(rows),
        "label_text": ["nor this"] * len(rows),
        "labels": [0, 1] * 3,
    }
    taught = rows
    for name, values in columns.items():
        taught = taught.add_column(name, values)
    collator = padding("right", position_ids=0, token_type_ids=0)
    (batch,) = batches(model, taught, collator, 6)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    assert batch["position_ids"][1, :3].tolist() == [0, 2, 4]
    (batch,) = batches(model, taught, collator, 6, labels=True)
    assert batch["labels"].tolist() == columns["labels"]
    with torch.no_grad():
        inputs = ("input_ids", "token_type_ids", "position_ids")
        alone = [model(**{name: torch.tensor([row[name]]) for name in inputs}).logits for row in taught]
    logits = torch.tensor(list(add_teacher_logits(taught, model, collator, batch_size=4)["teacher_logits"]))
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="takes none of the columns sentence, labels: use softlms.encode"):
        add_teacher_logits(taught.select_columns(["sentence", "labels"]), model, collator)
    with pytest.raises(ValueError, match="column 'labels', got input_ids, attention_mask"):
        evaluate(model, TASKS["rte"], rows, collator)


def test_rows_without_tokens():
    """Images: no mask, nothing to sort by, and each row of a layer's inputs counts."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(5, 3, 8, 8)
    rows = datasets.Dataset.from_dict({"pixel_values": images.tolist(), "labels": [0, 1, 0, 1, 1]})
    rows = rows.with_format("torch")
    with torch.no_grad():
        logits = model(pixel_values=images).logits
    expected = (logits.argmax(-1) == rows["labels"][:]).float().mean().item()
    found = evaluate(model, TASKS["rte"], rows, DefaultDataCollator(), batch_size=2)
    assert found == {"accuracy": pytest.approx(expected)}
    seen = []
    layer = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(pixel_values=images)
    handle.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1]).double()
    options = {"rows": 5, "batch_size": 2, "targets": lambda name, module: name == layer}
    gram = calibrate(model, rows, DefaultDataCollator(), **options)[layer].gram
    torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_embeddings_in_place_of_ids(rows):
    model = make("GPT2", "LMHeadModel")
    with torch.no_grad():
        embedded = [model.transformer.wte(torch.tensor(ids)) for ids in rows["input_ids"]]
    width = max(map(len, embedded))
    batch = {
        "inputs_embeds": torch.stack([torch.nn.functional.pad(e, (0, 0, width - len(e), 0)) for e in embedded]),
        "attention_mask": torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in embedded]),
    }
    with torch.no_grad():
        many = model(**prepared(model, batch)).logits
        for i, e in enumerate(embedded):
            alone = model(inputs_embeds=e[None]).logits[0]
            torch.testing.assert_close(many[i, width - len(e) :], alone, rtol=1e-4, atol=1e-5)


def test_what_a_batch_is_without_left_padding_stays(rows):
    """Holes are no padding, and what a model numbers itself is left to it."""
    model = make("GPT2")
    ids, mask = torch.randint(5, 90, (2, 6)), torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert "position_ids" not in prepared(model, {"input_ids": ids, "attention_mask": mask})
    left = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]])}
    assert prepared(model, left)["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert "position_ids" not in prepared(make("Roberta", "Model"), left)
    assert prepared(model, left | {"position_ids": ids})["position_ids"] is ids  # its own, where there are some


def test_a_model_in_pefts_hands_is_given_the_same(rows):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("GPT2"), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    model.eval()
    one, many = (add_teacher_logits(rows, model, padding("left"), batch_size=size) for size in (1, 6))
    torch.testing.assert_close(torch.tensor(list(many["teacher_logits"])), torch.tensor(list(one["teacher_logits"])))
