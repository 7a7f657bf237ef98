import copy

import pytest
import torch
from torch import nn

from softlms.architectures import ARCHITECTURES, find_targets
from softlms.budget import count_parameters
from softlms.layers import LowRankLinear, SoftLinear
from softlms.surgery import decompose, deploy, ranks, shrink, soft_layers, truncate


def outputs(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_targets_of_bert_are_the_papers():
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(num_hidden_layers=3, hidden_size=24, num_attention_heads=2))
    found = find_targets(model)
    assert [(t.block, t.symbol) for t in found[:7]] == [
        *((0, symbol) for symbol in ("W_Q", "W_K", "W_V", "W_proj", "W_fc1", "W_fc2")),
        (1, "W_Q"),
    ]
    assert len(found) == 18
    # every other linear of the model has its reason in the table
    chosen = {t.name for t in found}
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in chosen]
    reasons = ARCHITECTURES["bert"].left_alone
    assert all(any(name.endswith(key) for key in reasons) for name in others)


@pytest.mark.parametrize("unit", ["raw", "max", "mean"])
@pytest.mark.parametrize("s", [1.0, 50.0, 1e4])
def test_decomposed_model_equals_dense(tiny_bert, tokens, unit, s):
    model = tiny_bert()
    dense = outputs(model, tokens)
    assert decompose(model, s=s, unit=unit) is model
    torch.testing.assert_close(outputs(model, tokens), dense, rtol=0, atol=1e-5)


def test_deployed_model_equals_soft_and_counts_the_same(tiny_bert, tokens):
    model = decompose(tiny_bert())
    for i, layer in enumerate(soft_layers(model).values()):
        layer.set_rank_(1 + 3 * i % 32)
    soft, counted = outputs(model, tokens), count_parameters(model)
    deploy(model)
    torch.testing.assert_close(outputs(model, tokens), soft, rtol=0, atol=1e-5)
    assert count_parameters(model) == counted
    assert sum(p.numel() for p in model.parameters()) == counted.total
    assert not any(isinstance(m, SoftLinear) for m in model.modules())


def test_surgery_keeps_training_mode_and_dtype(tiny_bert):
    model = tiny_bert().to(torch.bfloat16).train()
    decompose(model)
    assert all(m.training for m in model.modules())
    deploy(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_truncate_is_the_best_approximation(tiny_bert):
    model = tiny_bert()
    dense = copy.deepcopy(model)
    truncate(model, {t.name: 5 for t in find_targets(model)})
    for target in find_targets(model):
        assert isinstance(target.module, LowRankLinear) and target.module.rank == 5
        weight = dense.get_submodule(target.name).weight
        error = (weight - target.module.up.weight @ target.module.down.weight).norm()
        torch.testing.assert_close(error, torch.linalg.svdvals(weight)[5:].norm(), rtol=1e-4, atol=1e-5)


def test_truncate_leaves_layers_dense_that_would_not_shrink(tiny_bert, tokens):
    model = tiny_bert()
    dense = outputs(model, tokens)
    truncate(model, {t.name: min(t.shape) for t in find_targets(model)})
    assert all(isinstance(t.module, nn.Linear) for t in find_targets(model))
    assert torch.equal(outputs(model, tokens), dense)


def test_a_predicate_chooses_other_layers(tiny_bert, tokens):
    model = tiny_bert()
    dense = outputs(model, tokens)
    decompose(model, targets=lambda name, module: name.endswith("pooler.dense"))
    assert list(ranks(model)) == ["bert.pooler.dense"]
    torch.testing.assert_close(outputs(model, tokens), dense, rtol=0, atol=1e-5)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert list(ranks(decompose(plain, targets=lambda name, module: name == "0"))) == ["0"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_named_and_nothing_changes(tiny_bert, bad):
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = bad
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.weight holds NaN or infinite"):
        decompose(model)
    assert all(isinstance(t.module, nn.Linear) for t in find_targets(model))


def test_wrong_use(tiny_bert):
    model = tiny_bert()
    with pytest.raises(ValueError, match="call softlms.decompose"):
        deploy(model)
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        decompose(model, alpha=-0.1)
    with pytest.raises(ValueError, match="s must be a positive"):
        decompose(model, s=0)
    assert all(isinstance(t.module, nn.Linear) for t in find_targets(model))
    decompose(model)
    with pytest.raises(ValueError, match="factored already"):
        decompose(model)
    deploy(model)
    with pytest.raises(ValueError, match="call softlms.decompose"):
        deploy(model)


def test_zero_layer_is_refused(tiny_bert):
    model = tiny_bert()
    nn.init.zeros_(model.bert.encoder.layer[0].output.dense.weight)
    with pytest.raises(ValueError, match="all zeros"):
        decompose(model)


def test_shared_and_quantized_layers_are_refused(tiny_bert):
    model = tiny_bert()
    layers = model.bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense\.weight is shared"):
        decompose(model)
    model = tiny_bert()
    name = next(t.name for t in find_targets(model))
    packed = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    model.get_submodule(name).weight = packed
    with pytest.raises(ValueError, match="is quantized"):
        decompose(model)


def test_a_layer_inside_an_adapter_is_refused(tiny_bert):
    """PEFT keeps the dense layer as base_layer of its own; left out, the budget would be that of fewer layers."""
    model = tiny_bert()
    adapter = torch.nn.Module()
    adapter.base_layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    model.set_submodule("bert.encoder.layer.0.attention.self.query", adapter)
    with pytest.raises(ValueError, match=r"layer.0.attention.self.query is wrapped by an adapter.* merge_and_unload"):
        decompose(model)


def test_unknown_family_and_no_match():
    with pytest.raises(ValueError, match="Unknown model family None; known: bert"):
        decompose(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to factor"):
        decompose(nn.Linear(2, 2), targets=lambda name, module: False)


def test_wrong_ranks(tiny_bert):
    model = tiny_bert()
    good = {t.name: 3 for t in find_targets(model)}
    name = next(iter(good))
    with pytest.raises(ValueError, match="missing or unknown"):
        truncate(model, {"nonsense": 3})
    with pytest.raises(ValueError, match="must be 1 to 32, got 0"):
        truncate(model, good | {name: 0})
    assert all(isinstance(t.module, nn.Linear) for t in find_targets(model))


def trained(model):
    """A soft model with ranks and thresholds as after training."""
    decompose(model, unit="max")
    for i, layer in enumerate(soft_layers(model).values()):
        layer.set_rank_(1 + 5 * i % 15)  # below break-even
        layer.freeze_()
    return model


@pytest.mark.parametrize("keep, count", [(0.3, "linear"), (0.2, "linear"), (0.55, "total")])
def test_a_trained_model_can_be_cut_further(tiny_bert, tokens, keep, count):
    model = trained(tiny_bert())
    before = ranks(model)
    margins = {name: layer.margins() for name, layer in soft_layers(model).items()}
    full = {name: layer.deployed() for name, layer in soft_layers(model).items()}
    assert count_parameters(model).kept(count) > keep
    deploy(model, keep=keep, count=count)
    kept = count_parameters(model)
    assert keep - 0.01 < kept.kept(count) <= keep
    after = {t.name: getattr(t.module, "rank", 32) for t in find_targets(model)}
    assert all(after[name] <= before[name] for name in before) and after != before
    # as one threshold for all would cut: no component that stays has a smaller margin than one that goes, but for those
    # that the last few weights of the budget did not pay for, and the one that each layer keeps
    lowest_kept = min(margins[name][after[name] - 1].item() for name in after if after[name] > 1)
    highest_cut = [margins[name][after[name]].item() for name in after if after[name] < before[name]]
    assert sum(margin > lowest_kept + 1e-6 for margin in highest_cut) <= 2
    # what stays is as it was trained: the components themselves do not shrink
    name = next(name for name in after if 1 < after[name] < before[name])
    cut, whole = model.get_submodule(name), full[name]
    left = {tuple(row) for row in cut.down.weight.tolist()}
    assert left <= {tuple(row) for row in whole.down.weight.tolist()}


def test_cutting_further_checks_its_budget(tiny_bert):
    model = trained(tiny_bert())
    for wrong, message in (
        ({"keep": 0.3}, "belong together"),
        ({"keep": 0.9, "count": "linear"}, "more than this model keeps"),
        ({"keep": 0.001, "count": "linear"}, "one component a layer"),
        ({"keep": 0.3, "count": "all"}, "count must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            deploy(model, **wrong)
    assert len(soft_layers(model)) == 12


def test_shrink_gives_the_shapes_of_a_cut(tiny_bert, tokens):
    wanted = {t.name: 1 + 2 * i for i, t in enumerate(find_targets(tiny_bert()))}
    hollow, cut = shrink(tiny_bert(), wanted), truncate(tiny_bert(), wanted)
    shapes = {name: p.shape for name, p in hollow.state_dict().items()}
    assert shapes == {name: p.shape for name, p in cut.state_dict().items()}
    hollow.load_state_dict(cut.state_dict())
    assert torch.equal(outputs(hollow, tokens), outputs(cut, tokens))
    with pytest.raises(ValueError, match="must be 1 to 32, got 33"):
        shrink(tiny_bert(), wanted | {"bert.encoder.layer.0.output.dense": 33})


def test_a_unit_is_one_of_three(tiny_bert):
    model = tiny_bert()
    with pytest.raises(ValueError, match="unit must be one of 'raw', 'max', 'mean', got 'median'"):
        decompose(model, unit="median")
    with pytest.raises(ValueError, match="alpha"):
        decompose(model, alpha=-1.0)
    assert all(isinstance(t.module, nn.Linear) for t in find_targets(model))
