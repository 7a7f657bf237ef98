"""LoRA-XS as a method of PEFT, on dense, transposed and thin layers."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import softlms
from softlms.experiments.recipe import Recipe
from softlms.layers import LowRankLinear
from softlms.methods.base import Work
from softlms.methods.lora_xs.basis import Basis, basis_of, same_basis
from softlms.methods.lora_xs.recovery import AdapterConfig, apply
from softlms.modules import make_linear

peft = pytest.importorskip("peft")
IDS = torch.arange(5, 25)[None]
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48}
FAMILIES = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, **HEADS, initializer_range=0.2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, num_key_value_heads=2, initializer_range=0.2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=8)),
}


def dense(family="llama"):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def thin(family="llama"):
    return softlms.deploy(softlms.decompose(dense(family)), keep=0.5, count="linear")


def adapted(model, *, trained=True, **options):
    """With an adapter, as after training: R is not small."""
    model = peft.get_peft_model(model, softlms.LoraXSConfig(**{"r": 3, "init_std": 0.3 if trained else 1e-5} | options))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layers(model):
    return {n: m for n, m in model.named_modules() if type(m).__name__ == "LoraXSLinear"}


@pytest.mark.parametrize("make", [dense, thin])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_at_its_base_trains_only_r_and_merges(family, make):
    model = make(family)
    before, forms = logits(model), {n: type(m) for n, m in model.named_modules()}
    targets = [target.name for target in softlms.find_targets(model)]
    start = logits(adapted(copy.deepcopy(model), trained=False))
    torch.testing.assert_close(start, before, rtol=0, atol=1e-3 * before.abs().max().item())
    model = adapted(model)
    assert len(layers(model)) == len(targets)
    after = logits(model)
    assert (after - before).abs().max() > 1e-2
    model.train()(IDS, labels=IDS if family != "bert" else torch.tensor([1])).loss.backward()
    for name, values in model.named_parameters():
        learns = "lora_xs_R" in name or "classifier.modules_to_save" in name
        assert (values.grad is not None and bool(values.grad.any())) == learns, name
    with model.eval().disable_adapter():
        torch.testing.assert_close(logits(model), before)
    ranks = {n: m.base_layer.rank for n, m in layers(model).items() if isinstance(m.base_layer, LowRankLinear)}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), after, rtol=0, atol=1e-4)
    assert ranks == {n: m.base_layer.rank for n, m in layers(model).items() if n in ranks}
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), after, rtol=0, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), after, rtol=0, atol=1e-4)
    assert {n: type(m) for n, m in merged.named_modules()} == forms


@settings(max_examples=25, deadline=None)
@given(m=st.integers(4, 12), n=st.integers(4, 12), r=st.integers(1, 4), rank=st.integers(4, 9), seed=st.integers(0, 99))
def test_the_change_stays_within_the_spans_and_merging_a_thin_layer_is_exact(m, n, r, rank, seed):
    torch.manual_seed(seed)
    rank = min(rank, m, n)
    layer = LowRankLinear(torch.randn(rank, n), torch.randn(m, rank), torch.randn(m))
    W = layer.up.weight.detach() @ layer.down.weight.detach()
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    basis = basis_of(layer, r)
    torch.testing.assert_close(basis.B @ basis.A, U[:, :r] * sigma[:r] @ Vh[:r], rtol=0, atol=1e-5)
    torch.testing.assert_close(basis.B.T @ basis.B, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-9)
    x = torch.randn(5, n)
    for grow in (False, True):
        model = adapted(torch.nn.ModuleDict({"one": copy.deepcopy(layer)}), r=r, target_modules=["one"], grow=grow)
        (adapter,) = layers(model).values()
        delta = adapter.get_delta_weight("default").detach().double()
        outside = delta - U[:, :r] @ (U[:, :r].T @ delta) @ Vh[:r].T @ Vh[:r]
        assert outside.abs().max() < 1e-5 * max(1, delta.abs().max())
        after = adapter(x)
        torch.testing.assert_close(after, layer(x) + x @ delta.float().T, rtol=0, atol=1e-4)
        adapter.merge()
        assert adapter.base_layer.rank == rank + (r if grow else 0)
        torch.testing.assert_close(adapter(x), after, rtol=0, atol=1e-4)
        adapter.unmerge()
        torch.testing.assert_close(adapter.base_layer(x), layer(x), rtol=0, atol=1e-4)


def test_a_thin_layer_has_the_basis_of_its_product_and_signs_do_not_depend_on_the_solver():
    layer = LowRankLinear(torch.randn(6, 20), torch.randn(15, 6), None)
    product = make_linear(layer.up.weight.double() @ layer.down.weight.double(), None)
    for components in ("top", "random", "bottom"):
        every, one = basis_of(layer, 6), basis_of(layer, 4, components, seed=3)
        chosen = {"top": [0, 1, 2, 3], "bottom": [2, 3, 4, 5]}.get(components)
        if chosen:
            torch.testing.assert_close(one.B, every.B[:, chosen])
        assert all(((column[:, None] - every.B).abs().amax(0) < 1e-9).sum() == 1 for column in one.B.T)
        if components != "top":  # zeros of the product are no components, but rounding makes them some
            continue
        other = basis_of(product, 4)
        torch.testing.assert_close(one.B, other.B, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.A, other.A, rtol=0, atol=1e-5)
        assert same_basis(one.fingerprint(), other.fingerprint())
        assert (one.B.gather(0, one.B.abs().argmax(0)[None]) > 0).all()
        flipped = copy.deepcopy(one)
        flipped.B[:, 1] *= -1
        assert not same_basis(one.fingerprint(), flipped.fingerprint())
        assert not same_basis(one.fingerprint(), Basis(one.B, 1.01 * one.A).fingerprint())
        assert not same_basis(one.fingerprint(), Basis(one.B, one.A.flip(1)).fingerprint())
        assert not same_basis(one.fingerprint(), basis_of(layer, 3).fingerprint())


def test_components_are_those_that_are_named():
    layer = make_linear(torch.diag(torch.arange(1.0, 9.0)), None)
    assert basis_of(layer, 3).A.norm(dim=1).tolist() == [8, 7, 6]
    assert basis_of(layer, 3, "bottom").A.norm(dim=1).tolist() == [3, 2, 1]
    drawn = basis_of(layer, 3, "random", seed=1).A.norm(dim=1).tolist()
    assert drawn == basis_of(layer, 3, "random", seed=1).A.norm(dim=1).tolist()
    assert drawn != basis_of(layer, 3, "random", seed=2).A.norm(dim=1).tolist()


def test_the_authors_count_for_roberta_large():
    with torch.device("meta"):
        config = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        model = RobertaForSequenceClassification(config)
    for linear in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:  # real names, small weights
        linear.weight, linear.bias = torch.nn.Parameter(torch.randn(8, 8)), None
    model = adapted(model, r=4, target_modules=["query", "value", "output.dense"])
    assert len(layers(model)) == 96
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1536


def test_the_file_holds_r_squared_numbers_a_layer_and_a_fingerprint(tmp_path):
    model = adapted(thin(), r=4, rank_pattern={"[kv]_proj": 3, r"layers\.1\.mlp\.up_proj": 2})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    sizes = sorted(values.numel() for name, values in tensors.items() if name.endswith("lora_xs_R"))
    assert sizes == [4] + [9] * 4 + [16] * 9
    others = sorted(values.numel() for name, values in tensors.items() if not name.endswith("lora_xs_R"))
    assert others == [2] + [3] * 4 + [4] * 9
    again = peft.PeftModel.from_pretrained(thin(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_and_its_thin_base_load_in_a_fresh_process(tmp_path):
    base = thin()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    torch.save((IDS, logits(model)), tmp_path / "expected.pt")
    program = """
import sys, torch, softlms
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").eval()
ids, expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    print((model(ids).logits - expected).abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_another_base_and_other_signs_are_refused(tmp_path, monkeypatch):
    adapted(thin()).save_pretrained(tmp_path)
    other = thin()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.up.weight[3] += 0.1
    with pytest.raises(ValueError, match=r"belongs to another base: a layer of 48 x 32 has other singular"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="in the same precision"):
        peft.PeftModel.from_pretrained(thin().bfloat16(), tmp_path)

    def flipped(*args):
        basis = basis_of(*args)
        basis.B[:, 0] *= -1
        return basis

    monkeypatch.setattr("softlms.methods.lora_xs.model.basis_of", flipped)
    with pytest.raises(ValueError, match="belongs to another base"):
        peft.PeftModel.from_pretrained(thin(), tmp_path)


def test_several_adapters_and_peft_verbs(tmp_path):
    model = adapted(thin())
    one = logits(model)
    model.add_adapter("second", softlms.LoraXSConfig(r=2, init_std=0.3))
    assert torch.equal(logits(model), one)
    model.set_adapter("second")
    two = logits(model)
    assert (two - one).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(thin(), tmp_path).eval()
    again.load_adapter(tmp_path / "second", "second")
    torch.testing.assert_close(logits(again), one)
    again.set_adapter("second")
    torch.testing.assert_close(logits(again), two)
    again.delete_adapter("default")
    torch.testing.assert_close(logits(again), two)
    again.merge_adapter()
    with pytest.raises(ValueError, match=r"has the adapter second merged: call unmerge_adapter\(\) first"):
        again.add_adapter("third", softlms.LoraXSConfig(r=2))


def test_half_precision_and_low_memory_loading(tmp_path):
    model = adapted(thin().bfloat16())
    assert {p.dtype for n, p in model.named_parameters() if "lora_xs_R" in n} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(thin().bfloat16(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    again = peft.PeftModel.from_pretrained(thin().bfloat16(), tmp_path, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0.1)  # PEFT rounds R then
    again.save_pretrained(tmp_path / "again")
    peft.PeftModel.from_pretrained(thin().bfloat16(), tmp_path / "again")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_fingerprint_outlives_a_change_of_precision(family, tmp_path):
    model = adapted(thin(family)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        peft.PeftModel.from_pretrained(thin(family), tmp_path, low_cpu_mem_usage=low)


def test_transformers_own_adapter_functions_work_and_refuse_another_base(tmp_path):
    model = adapted(thin())
    model.save_pretrained(tmp_path)
    own = thin()
    own.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(own.eval()), logits(model))
    other = thin()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.up.weight[3] += 0.1
    other.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="belongs to another base"):
        logits(other.eval())


def test_layers_to_transform_and_batches_of_several_adapters():
    model = adapted(thin(), layers_to_transform=[1])
    assert len(layers(model)) == 7 and all("layers.1." in name for name in layers(model))
    with pytest.raises(ValueError, match="LoRA-XS has one adapter for a whole batch: use set_adapter"):
        model(IDS, adapter_names=["default"])


def test_another_methods_adapter_is_refused_and_split_projections_are_adapted():
    model = peft.get_peft_model(dense(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj has an adapter of another method: merge_and_unload"):
        adapted(model.base_model.model)
    model = softlms.split_fused(dense("gpt2"))
    assert sum(name.endswith("c_attn.q") for name in layers(adapted(model))) == 2


def test_all_linear_takes_thin_layers_whole_and_leaves_the_head():
    model = adapted(thin(), target_modules="all-linear")
    assert len(layers(model)) == 14 and "lm_head" not in str(sorted(layers(model)))
    assert {type(layer.base_layer) for layer in layers(model).values()} <= {LowRankLinear, torch.nn.Linear}


def test_mambas_fused_kernels_read_a_weight_with_the_adapter():
    model = adapted(thin("mamba"))
    layer = model.base_model.model.backbone.layers[0].mixer.out_proj
    x = torch.randn(3, layer.base_layer.in_features)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (thin, {"r": 33}, r"q_proj: r=33 is above its rank, \d+: choose a smaller r"),
        (thin, {"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding: LoRA-XS adapts nn.Linear"),
        (lambda: softlms.decompose(dense()), {}, r"q_proj is a SoftLinear: .* Deploy a layer that learns its rank"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_any_work(make, options, message):
    model = make()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        adapted(model, **options)
    assert str(model) == before


def test_nan_weights_and_bad_settings_are_refused():
    model = dense()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    before = str(model)
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj: its weight has NaN or infinite values"):
        adapted(model)
    assert str(model) == before
    for options, message in [
        ({"r": 0}, "r must be"),
        ({"rank_pattern": {"k_proj": 0}}, r"rank_pattern\['k_proj'\] must be"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"components": "middle"}, "components must be one of 'top', 'random', 'bottom', got 'middle'"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"target_modules": "q_proj", "layers_to_transform": [0]}, "layers_to_transform needs names"),
    ]:
        with pytest.raises(ValueError, match=message):
            softlms.LoraXSConfig(**options)


def small_recipe(**settings):
    return Recipe(dense_epochs=1, epochs=1, calibration_rows=16, settings={"uniform": {"epochs": 0}, **settings})


@pytest.mark.parametrize("method", ["lora-xs", "lora", "head"])
def test_recovery_is_a_method_that_trains_few_numbers_and_leaves_an_ordinary_model(bench, method):
    settings = {"lora-xs": {"r": 4}, "lora": {"r": 2, "symbols": ("W_Q", "W_V")}, "head": {}}[method]
    run = bench.run(f"whitened+uniform+{method}", small_recipe(**{method: settings}), 0).result
    targets = bench.targets()
    head = sum(p.numel() for p in bench.untrained_model().classifier.parameters())
    expected = {
        "lora-xs": sum(min(4, rank) ** 2 for rank in run["ranks"].values()) + head,
        "lora": sum(2 * sum(shape) for name, shape in targets.items() if name.endswith(("query", "value"))) + head,
        "head": head,
    }
    assert run["trained"] == expected[method]
    assert run["steps"] == 3
    assert run["adapter_bytes"] >= 4 * run["trained"]
    assert run["kept_linear"] <= 0.5 or method == "lora"  # LoRA's components stay, beside those of the layer
    assert "dev" in run["untuned"]


def test_what_learned_learns_again_after_recovery(bench):
    model = bench.dense_model(small_recipe(), 0)
    model.bert.embeddings.requires_grad_(False)
    before = {name: values.requires_grad for name, values in model.named_parameters()}
    work = Work(
        bench.splits["train"],
        bench.collator,
        0,
        bench.folder / "work",
        partial(bench.arguments, recipe=small_recipe(), seed=0),
    )
    apply(model, AdapterConfig(r=2, epochs=0.2), work)
    assert before == {name: values.requires_grad for name, values in model.named_parameters()}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no head of a task to train: choose lora-xs or lora"):
        apply(dense(), AdapterConfig("head"), work)
    with pytest.raises(ValueError, match="No linears of the kind W_up: choose others, or all"):
        apply(model, AdapterConfig(symbols=("W_up",)), work)


def test_bad_settings_of_recovery_are_refused():
    for options, message in [
        ({"kind": "prefix"}, "kind must be one of 'lora-xs', 'lora', 'head', got 'prefix'"),
        ({"r": 0}, "r must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"adapter_learning_rate": 2.0}, "adapter_learning_rate must be"),
        ({"head_learning_rate": -1.0}, "head_learning_rate must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            AdapterConfig(**options)
