import pytest
import torch
from datasets import Dataset
from test_architectures import FAMILIES, build
from transformers import DataCollatorWithPadding

import softlms
from softlms.architectures import find_targets
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
    for options in ({"fisher": True}, {"gradient_rows": 2}):
        with pytest.raises(ValueError, match="column 'labels'"):
            calibrate(model, data.remove_columns("labels"), collator, rows=4, **options)
    for number in (-1, 4):
        with pytest.raises(ValueError, match=rf"gradient_rows must be 0 to rows \(3\), got {number}"):
            calibrate(model, data, collator, rows=3, gradient_rows=number)
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


LENGTHS = (9, 4, 12)
SIDES = [(family, side) for family in FAMILIES for side in ("left", "right") if (family, side) != ("bert", "left")]


def labelled(family):
    """Rows of different lengths with labels; those of a classifier have two segments."""
    ids = [torch.randint(3, 99, (length,)).tolist() for length in LENGTHS]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    if family == "bert":
        segments = [[int(i > 2) for i in range(len(row))] for row in ids]
        return Dataset.from_dict(columns | {"token_type_ids": segments, "labels": [0, 1, 1]})
    return Dataset.from_dict(columns | {"labels": ids})


def padded(side, width=16):
    """A collator that pads every row, also one alone."""

    def collate(examples):
        def row(name, values):
            if not isinstance(values, list):
                return values
            more = [-100 if name == "labels" else 0] * (width - len(values))
            return more + values if side == "left" else values + more

        return {name: torch.tensor([row(name, e[name]) for e in examples]) for name in examples[0]}

    return collate


def own_passes(model, data):
    """Each layer's inputs and its outputs' gradients, by autograd, from each row alone and without padding."""
    layers = {target.name: target.module for target in find_targets(model)}
    seen = {name: ([], []) for name in layers}

    def keep(module, args, output):
        output.retain_grad()
        kept.append((module, args[0], output))

    handles = [layer.register_forward_hook(keep) for layer in layers.values()]
    for row in data:
        kept = []
        columns = row.keys() - {"attention_mask"}
        model(**{name: torch.tensor([row[name]]) for name in columns}).loss.backward()
        for module, x, output in kept:
            name = next(name for name, layer in layers.items() if layer is module)
            seen[name][0].append(x[0].detach().double())
            seen[name][1].append(output.grad[0].double())
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: (torch.cat(x), torch.cat(g)) for name, (x, g) in seen.items()}


def assert_near(found, expected, tolerance=1e-4):
    """To a share of the root of the diagonal's products, as for correlations."""
    scale = expected.diagonal().sqrt()
    assert ((found.double() - expected).abs() / torch.outer(scale, scale)).max() < tolerance


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family, side", SIDES)
def test_statistics_are_those_of_each_row_alone(family, side, frozen):
    """Of the inputs, and of the gradients of a row's own loss in the outputs; whatever the padding."""
    model, data = build(*FAMILIES[family]), labelled(family)
    if family == "bert":
        model.bert.embeddings.token_type_embeddings.weight.data *= 20  # segments matter
    expected = own_passes(model, data)
    model.requires_grad_(not frozen)
    found = calibrate(model, data, padded(side), rows=3, batch_size=2, gradient_rows=3)
    for name, (x, g) in expected.items():
        assert_near(found[name].gram, x.T @ x / len(x))
        assert_near(found[name].gradient, g.T @ g / len(g))
        assert found[name].gradient.dtype == torch.float32
    assert all(p.requires_grad is not frozen and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    first = calibrate(model, data, padded(side), rows=3, gradient_rows=1)
    for name, (_, g) in expected.items():
        g = g[: LENGTHS[0]]
        assert_near(first[name].gradient, g.T @ g / len(g))


def test_gradients_of_a_split_gpt2_and_of_float64():
    model, data = softlms.split_fused(build(*FAMILIES["gpt2"])).double(), labelled("gpt2")
    expected = own_passes(model, data)
    found = calibrate(model, data, padded("left"), rows=3, gradient_rows=3)
    assert "transformer.h.0.attn.c_attn.q" in found
    for name, (_, g) in expected.items():
        assert_near(found[name].gradient, g.T @ g / len(g), 1e-10)
        assert found[name].gradient.dtype == torch.float64


def test_no_weight_has_a_gradient_while_activations_have(tiny_bert, collator):
    """Nor does a caller's inference mode keep activations from having them."""
    model, learned = tiny_bert(), []

    def note(module, args, output):
        learned.append((output.logits.requires_grad, any(p.requires_grad for p in module.parameters())))

    model.register_forward_hook(note)
    with torch.inference_mode():  # the caller's
        calibrate(model, rows(4), collator, rows=4, gradient_rows=2)
    assert learned == [(False, True), (True, False), (True, False)]
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_that_tell_nothing_are_refused(tiny_bert, tiny_llama, collator):
    model, data, options = tiny_bert(), rows(4), {"rows": 4, "gradient_rows": 2}
    name = r"bert\.encoder\.layer\.0\.attention\.self\.query"
    kept = model.classifier.weight.data.clone()
    model.classifier.weight.data.zero_()
    with pytest.raises(ValueError, match=rf"The loss does not depend on {name}: .* all gradient_rows=2 rows"):
        calibrate(model, data, collator, **options)
    model.classifier.weight.data = kept
    blast = model.bert.pooler.register_full_backward_hook(lambda module, into, out: (into[0] * float("inf"),))
    with pytest.raises(ValueError, match=rf"The gradients of {name} are not finite"):
        calibrate(model, data, collator, **options)
    blast.remove()
    model.bert.encoder.layer[0].attention.output.dense.weight.data.zero_()  # one layer's inputs lead nowhere
    with pytest.raises(ValueError, match=rf"The loss does not depend on {name}"):
        calibrate(model, data, collator, **options)
    with pytest.raises(ValueError, match="BertModel returns no loss"):
        calibrate(model.bert, data, collator, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    ids = labelled("llama")["input_ids"]
    unlabelled = Dataset.from_dict({"input_ids": ids, "labels": [ids[0], [-100] * len(ids[1]), ids[2]]})
    for more in ({"gradient_rows": 3}, {"fisher": True}):
        with pytest.raises(ValueError, match=r"The loss of row 1 is nan: give each row a label that counts"):
            calibrate(tiny_llama(), unlabelled, padded("right"), rows=3, **more)


def test_layers_that_read_one_tensor_have_one_gram(tiny_bert, tiny_llama, collator):
    bert = calibrate(tiny_bert(), rows(4), collator, rows=4, batch_size=3)
    llama = calibrate(tiny_llama(), labelled("llama").remove_columns("labels"), padded("right"), rows=3, batch_size=2)
    for found, together, number in (
        (bert, ["query", "key", "value"], 2 * 4),
        (llama, ["q_proj", "k_proj", "v_proj"], 2 * 4),
        (llama, ["gate_proj", "up_proj"], 2 * 4),
    ):
        assert len({id(statistics.gram) for statistics in found.values()}) == number
        for block in "01":
            same = [s for name, s in found.items() if f".{block}." in name and name.rpartition(".")[2] in together]
            assert len(same) == len(together)
            assert len({(id(s.gram), id(s.mean_abs)) for s in same}) == 1


def test_logits_are_computed_only_where_a_layer_of_the_head_is_calibrated(tiny_llama):
    model, data = tiny_llama(), labelled("llama")
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append((out.logits.shape[1], out.past_key_values)))
    calibrate(model, data, padded("right"), rows=3)
    head = calibrate(model, data, padded("right"), rows=3, targets=lambda name, module: name == "lm_head")
    assert seen == [(1, None), (16, None)]
    with torch.no_grad():
        x = torch.cat([model.model(torch.tensor([ids])).last_hidden_state[0] for ids in data["input_ids"]]).double()
    assert_near(head["lm_head"].gram, x.T @ x / len(x))
