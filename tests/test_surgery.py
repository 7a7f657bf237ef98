import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import Trainer, TrainingArguments

from softlms.architectures import find_targets
from softlms.budget import count_parameters
from softlms.fused import split_fused
from softlms.layers import LowRankLinear, Ranked, SoftLinear
from softlms.lowrank.factorization import factorize
from softlms.surgery import decompose, deploy, ranks, shrink, soft_layers, truncate
from softlms.training import SoftTrainer


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


@pytest.mark.parametrize("unit", ["raw", "max", "mean"])
@pytest.mark.parametrize("s", [1.0, 50.0, 1e4])
def test_decomposed_model_equals_dense(tiny_bert, tokens, unit, s):
    model = tiny_bert()
    dense = outputs(model, tokens)
    assert decompose(model, s=s, unit=unit) is model
    torch.testing.assert_close(outputs(model, tokens), dense, rtol=0, atol=1e-5)


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
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.weight contains NaN or infinite"):
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
    with pytest.raises(ValueError, match="multiple describe a budget: pass keep"):
        deploy(model, multiple=16)
    deploy(model, keep=0.5, count="linear")
    with pytest.raises(ValueError, match="deployed already"):
        deploy(model)
    for name, layer in soft_or_thin(model).items():
        assert ranks(model)[name] == layer.rank < 32
    with pytest.raises(ValueError, match="no factored layers: call softlms.decompose"):
        ranks(tiny_bert())


def soft_or_thin(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Ranked)}


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
    with pytest.raises(ValueError, match="must be a whole number, got 2.5"):
        truncate(model, good | {name: 2.5})
    for swapped in (factorize(model), "svd"):
        with pytest.raises(ValueError, match=r"Ranks come before factors: softlms.truncate\(model, ranks, factors\)"):
            truncate(model, swapped, good)
    with pytest.raises(ValueError, match="factors lack"):
        decompose(model, good)
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
        ({"count": "linear"}, "count and multiple describe a budget: pass keep"),
        ({"keep": 0.9, "count": "linear"}, "more than this model keeps"),
        ({"keep": 0.001, "count": "linear"}, "one component per layer"),
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


def cut(model):
    return truncate(model, {t.name: 3 for t in find_targets(model)})


def shrunk(model):
    return shrink(model, {t.name: 3 for t in find_targets(model)})


def deployed(model):
    return deploy(decompose(model), keep=0.5, count="linear")


SURGERY = [decompose, deployed, cut, shrunk]


def learns(model):
    """What of each layer learns, weight and bias, whatever form it has."""
    found = {}
    for target in find_targets(model):
        own = {n: p.requires_grad for n, p in target.module.named_parameters() if not n.endswith("threshold.alpha")}
        weights, biases = ({flag for n, flag in own.items() if n.endswith("bias") == bias} for bias in (False, True))
        assert len(weights) == len(biases) == 1
        found[target.name] = (*weights, *biases)
    return found


@pytest.mark.parametrize("verb", SURGERY)
def test_what_is_frozen_stays_frozen(tiny_bert, verb):
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    model.bert.encoder.layer[1].intermediate.dense.bias.requires_grad_(False)
    before = learns(model)
    assert set(before.values()) == {(False, False), (False, True), (True, False), (True, True)}
    verb(model)
    assert learns(model) == before
    for layer in soft_or_thin(model).values():
        assert not isinstance(layer, SoftLinear) or layer.threshold.alpha.requires_grad


def test_frozen_parts_of_gpt2_stay_frozen():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4))
    fused = model.transformer.h[0].attn.c_attn
    fused.weight.requires_grad_(False)
    model.transformer.h[1].attn.c_attn.bias.requires_grad_(False)
    split_fused(model)
    for verb in (lambda m: m, decompose, deploy):  # at full rank a Conv1D again
        flags = learns(verb(model))
        for part in "qkv":
            assert flags[f"transformer.h.0.attn.c_attn.{part}"] == (False, True)
            assert flags[f"transformer.h.1.attn.c_attn.{part}"] == (True, False)


def test_a_frozen_layer_is_cut_and_what_survives_is_as_it_was(tiny_bert, tokens):
    """Its sigma cannot make up for what the soft threshold would take from the components near alpha."""
    model = tiny_bert().requires_grad_(False)
    dense, truncated = outputs(model, tokens), copy.deepcopy(model)
    decompose(model, alpha=0.3)
    torch.testing.assert_close(outputs(model, tokens), dense, rtol=0, atol=1e-5)
    model(tokens, labels=torch.ones(len(tokens), dtype=torch.long)).loss.backward()
    assert any(layer.threshold.alpha.grad != 0 for layer in soft_layers(model).values())
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("alpha"))
    for layer in soft_layers(model).values():
        layer.set_rank_(5)
        layer.freeze_()
        layer.project_()
    truncate(truncated, {t.name: 5 for t in find_targets(truncated)})
    torch.testing.assert_close(outputs(model, tokens), outputs(truncated, tokens), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs(deploy(model), tokens), outputs(truncated, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("verb", SURGERY)
def test_modes_and_hooks_of_a_layer_are_kept(tiny_bert, tokens, verb):
    model = tiny_bert().train()
    name = "bert.encoder.layer.0.output.dense"
    layer = model.get_submodule(name).eval()  # one alone, as a user may set it
    seen = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append("forward") or output * 2),
        layer.register_forward_hook(lambda module, args, options, output: seen.append("options"), with_kwargs=True),
        layer.register_forward_pre_hook(lambda module, args: seen.append("before")),
        layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward")),
    ]
    verb(model)
    assert not model.get_submodule(name).training and model.get_submodule("bert.encoder.layer.0").training
    model(tokens, labels=torch.zeros(len(tokens), dtype=torch.long)).loss.backward()
    assert sorted(seen) == ["backward", "before", "forward", "options"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(tokens)
    assert seen == []


def test_accelerates_hooks_go_on(tiny_bert, tokens):
    """They bring the inputs to a layer's device."""
    model = tiny_bert()
    dense, name = outputs(model, tokens), "bert.encoder.layer.0.output.dense"
    hook = AlignDevicesHook("cpu")
    add_hook_to_module(model.get_submodule(name), hook)
    decompose(model)
    assert model.get_submodule(name)._hf_hook is hook
    torch.testing.assert_close(outputs(model, tokens), dense, rtol=0, atol=1e-5)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


def offload(model, name):
    layer = model.get_submodule(name)
    weights = {key: value.clone() for key, value in layer.state_dict().items()}
    loader = OffloadedWeightsLoader(state_dict=weights)
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, weights_map=loader))


def quantize(model, name):
    quantization = pytest.importorskip("torchao.quantization")
    layer = model.get_submodule(name)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())


UNFIT = {
    "offloaded": offload,
    "quantized": quantize,
    "parametrizations.weight": lambda model, name: parametrizations.weight_norm(model.get_submodule(name)),
    "weight_mask|weight_orig": lambda model, name: prune.l1_unstructured(model.get_submodule(name), "weight", 0.5),
    "a custom forward": lambda model, name: model.set_submodule(name, Own(64, 32)),
    "_load_state_dict_pre_hooks": lambda model, name: model.get_submodule(name).register_load_state_dict_pre_hook(
        print
    ),
    "float8_e4m3fn": lambda model, name: model.get_submodule(name).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_would_be_lost_or_cannot_be_factored_is_refused_by_name(tiny_bert, what):
    model, name = tiny_bert(), "bert.encoder.layer.1.output.dense"
    good = {t.name: 3 for t in find_targets(model)}
    UNFIT[what](model, name)
    modules = dict(model.named_modules())
    for verb in (decompose, factorize, lambda m: truncate(m, good)):
        with pytest.raises(ValueError, match=rf"(?s)layer\.1\.output\.dense.*({what})"):
            verb(model)
    assert dict(model.named_modules()) == modules


def test_a_quantized_kind_of_layer_in_the_tables_place_is_refused(tiny_bert):
    """GPTQ, AWQ and HQQ put modules of their own where a linear layer was."""
    model = tiny_bert()
    model.set_submodule("bert.encoder.layer.1.output.dense", nn.Identity())
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense is a Identity, not a linear layer"):
        decompose(model)


def test_training_moves_no_frozen_layer_and_saving_keeps_it(tiny_bert, tokens, tmp_path):
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    query = "bert.encoder.layer.0.attention.self.query"
    dense, whole = model.get_submodule(query).weight.detach().clone(), copy.deepcopy(model)
    rows = [{"input_ids": torch.randint(5, 200, (8,)), "labels": i % 2} for i in range(32)]
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=8, learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    decompose(model)
    trainer = SoftTrainer(
        model, keep=0.5, count="linear", deadline=0.5, alpha_learning_rate=0.3, args=args, train_dataset=rows
    )
    trainer.train()
    model.eval()
    rank = ranks(model)[query]
    assert rank < 16
    U, sigma, Vh = torch.linalg.svd(dense)
    best = U[:, :rank] * sigma[:rank] @ Vh[:rank]
    torch.testing.assert_close(model.get_submodule(query).weight.detach(), best, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "soft")
    again = type(model).from_pretrained(tmp_path / "soft")
    assert torch.equal(outputs(again, tokens), outputs(model, tokens))
    deploy(model)
    torch.testing.assert_close(model.get_submodule(query).weight.detach(), best, rtol=0, atol=1e-5)
    truncate(whole, {t.name: 4 for t in find_targets(whole)})
    before = copy.deepcopy(whole.bert.encoder.layer[0].state_dict())
    Trainer(whole, args, train_dataset=rows).train()
    after = whole.bert.encoder.layer[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
