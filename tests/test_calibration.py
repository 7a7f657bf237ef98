import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

import softlms
from softlms.data.encoders import find_encoder
from softlms.data.inputs import in_eval_mode
from softlms.lowrank.calibration import calibrate


@pytest.fixture(scope="module")
def collator():
    return DataCollatorWithPadding(find_encoder("minilm").tokenizer())


def rows(number, lengths=(5, 11, 8, 3)):
    """Rows of different lengths, so that batches are padded."""
    ids = [torch.randint(5, 200, (lengths[i % len(lengths)],)).tolist() for i in range(number)]
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids], "labels": [i % 2 for i in range(number)]}
    )


def test_moments_are_those_of_the_tokens_without_padding(tiny_bert, collator):
    model, data = tiny_bert(), rows(7)
    name = "bert.encoder.layer.1.intermediate.dense"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for row in data:  # one at a time: nothing is padded
            model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
    statistics = calibrate(model, data, collator, rows=7, batch_size=3)[name]
    torch.testing.assert_close(statistics.gram, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.mean_abs, x.abs().mean(0), rtol=1e-5, atol=1e-6)
    assert statistics.fisher is None


@pytest.mark.parametrize("num_labels", [1, 2])
def test_fisher_is_the_mean_square_of_each_examples_gradient(tiny_bert, collator, num_labels):
    """Against each example's own backward pass, rows of different lengths; a regression head too."""
    model, data = tiny_bert(num_labels=num_labels), rows(6)
    if num_labels == 1:
        data = data.remove_columns("labels").add_column("labels", [0.5 * i for i in range(6)])
    found = calibrate(model, data, collator, rows=6, fisher=True)
    expected = dict.fromkeys(found, 0.0)
    for row in data:
        model.zero_grad()
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        regression = num_labels == 1
        loss = (logits[0] - row["labels"]) ** 2 if regression else logits.logsumexp(0) - logits[row["labels"]]
        loss.backward()
        for name in found:
            expected[name] += model.get_submodule(name).weight.grad.double().square().sum(0) / 6
    for name, statistics in found.items():
        torch.testing.assert_close(statistics.fisher, expected[name], rtol=1e-4, atol=1e-10)


def test_the_model_is_left_as_it_was(tiny_bert, collator):
    model = tiny_bert().train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    calibrate(model, rows(4), collator, rows=4, fisher=True)
    assert model.training and all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_calibration_is_refused(tiny_bert, collator):
    model, data = tiny_bert(), rows(4)
    with pytest.raises(ValueError, match="needs 5 rows, the data set has 4"):
        calibrate(model, data, collator, rows=5)
    with pytest.raises(ValueError, match="the data set has 0"):
        calibrate(model, data.select([]), collator, rows=1)
    with pytest.raises(ValueError, match="at least one row, got rows=0"):
        calibrate(model, data, collator, rows=0)
    with pytest.raises(ValueError, match="column 'labels'"):
        calibrate(model, data.remove_columns("labels"), collator, rows=4, fisher=True)
    with pytest.raises(ValueError, match=r"sees 4 rows, the batch has \d+ tokens"):
        calibrate(model, data, collator, rows=4, targets=lambda name, module: name == "classifier")
    model.unused = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="No calibration row reaches unused"):
        calibrate(model, data, collator, rows=4, targets=lambda name, module: name == "unused")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"inputs of bert\.encoder\.layer\.1\.attention\.self\.query are not finite"):
        softlms.calibrate(model, data, collator, rows=4)


def test_frozen_weights_and_rows_without_a_mask(tiny_bert, collator):
    model, data = tiny_bert(), rows(4, lengths=(7,))
    expected = calibrate(model, data, collator, rows=4, fisher=True)
    model.requires_grad_(False)

    def unmasked(examples):
        return {key: values for key, values in collator(examples).items() if key != "attention_mask"}

    found = calibrate(model, data, unmasked, rows=4, fisher=True)
    assert not any(p.requires_grad for p in model.parameters())
    for name, statistics in found.items():
        torch.testing.assert_close(statistics.gram, expected[name].gram)
        torch.testing.assert_close(statistics.fisher, expected[name].fisher)


def test_each_module_is_left_in_the_mode_that_it_had(tiny_bert, collator):
    model = tiny_bert().train()
    model.bert.embeddings.eval()  # as one freezes the dropout of a part
    modes = {name: module.training for name, module in model.named_modules()}
    calibrate(model, rows(2), collator, rows=2)
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(ZeroDivisionError), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        1 / 0  # noqa: B018
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_layer_that_cannot_be_factored_is_refused_before_any_row_is_run(tiny_bert, collator):
    model = tiny_bert()
    layer = model.bert.encoder.layer[1].output.dense
    layer.weight = torch.nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)
    model.register_forward_pre_hook(lambda *args: pytest.fail("a row was run"))
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.weight is quantized"):
        calibrate(model, rows(2), collator, rows=2)
