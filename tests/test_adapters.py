"""PEFT around thin layers; without peft there is nothing to test."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.mamba import modeling_mamba

import softlms
from softlms.layers import LowRankLinear

peft = pytest.importorskip("peft")
IDS = torch.arange(5, 25)[None]


def dense(**options):
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64,
        vocab_size=99, initializer_range=0.2, **options,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def attention(name, module):
    return "self_attn" in name


def thin(keep=0.5):
    return softlms.deploy(softlms.decompose(dense(), targets=attention), keep=keep, count="linear")


def adapted(model, **options):
    """As after training: nothing is zero."""
    options = {"target_modules": ["q_proj", "v_proj"], "r": 3} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    for name, values in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values, std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.filterwarnings("error:Unsupported layer type")
def test_lora_by_the_layers_own_name_adds_its_product_and_merges_as_components():
    model = thin()
    before, ranks = logits(model), softlms.ranks(model)
    model = adapted(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    lora = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(5, 32)
    expected = layer.base_layer(x) + x @ lora.T
    torch.testing.assert_close(layer(x), expected)
    model.train()(IDS, labels=IDS).loss.backward()
    grown = {name for name, values in model.named_parameters() if values.grad is not None and values.grad.any()}
    assert grown and all("lora_" in name for name in grown) and len(grown) == 8
    after = logits(model.eval())
    assert (after - before).abs().max() > 1e-2
    model.merge_adapter()
    assert layer.base_layer.rank == ranks["model.layers.0.self_attn.q_proj"] + 3
    torch.testing.assert_close(logits(model), after, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), after, rtol=0, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), after, rtol=0, atol=1e-4)
    more = {n: rank + 3 * n.endswith(("q_proj", "v_proj")) for n, rank in ranks.items()}
    assert softlms.ranks(merged) == more


def test_adapters_are_saved_and_loaded_and_one_of_the_dense_model_fits(tmp_path):
    model = adapted(thin())
    model.save_pretrained(tmp_path / "thin")
    again = peft.PeftModel.from_pretrained(thin(), tmp_path / "thin").eval()
    assert torch.equal(logits(again), logits(model))
    adapted(dense()).save_pretrained(tmp_path / "dense")
    moved = peft.PeftModel.from_pretrained(thin(0.99), tmp_path / "dense")
    assert any(isinstance(m, LowRankLinear) for m in moved.modules())


def test_what_would_change_a_dense_weight_is_refused():
    for option in ({"init_lora_weights": "pissa"}, {"lora_bias": True}, {"use_dora": True}):
        with pytest.raises(ValueError, match=r"leave it at|variant"):
            adapted(thin(), **option)
    bad = adapted(thin())
    bad.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="adapter default contains NaN"):
        bad.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("targets", [attention, lambda name, module: name.endswith("v_proj"), None])
def test_layers_inside_an_adapter_are_refused_by_table_and_predicate(targets):
    model = adapted(dense())
    if targets is None:
        model.config.model_type = "llama"  # of the same names
    before = copy.deepcopy(model.state_dict())
    for verb in (softlms.find_targets, softlms.factorize, softlms.count_parameters):
        with pytest.raises(ValueError, match=r"self_attn\.[qv]_proj is wrapped by an adapter.* merge_and_unload"):
            verb(model, targets=targets)
    with pytest.raises(ValueError, match="is wrapped by an adapter"):
        softlms.decompose(model, targets=targets)
    assert model.state_dict().keys() == before.keys()


def test_adapters_elsewhere_and_merged_ones_do_no_harm():
    model = adapted(dense())
    assert len(softlms.find_targets(model, lambda name, module: ".mlp." in name)) == 6
    expected = logits(model)
    merged = softlms.decompose(model.merge_and_unload(), targets=attention)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)


def test_adapters_around_the_factors_or_a_saved_copy_are_refused_too():
    model = adapted(thin(), target_modules=["down", "up"])
    with pytest.raises(ValueError, match="q_proj is wrapped by an adapter"):
        softlms.count_parameters(model, attention)
    head = adapted(dense(), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="lm_head is wrapped by an adapter, a ModulesToSaveWrapper"):
        softlms.find_targets(head, lambda name, module: name.endswith("lm_head"))


def test_mambas_fused_kernel_sees_adapters_around_the_factors(monkeypatch):
    """It reads out_proj.weight in training and never calls the layer."""

    def kernel(xz, conv_w, conv_b, x_w, dt_w, out_w, out_b, A, B, C, D, delta_bias=None, delta_softplus=True, **_):
        x, z = xz.chunk(2, dim=1)
        x = modeling_mamba.causal_conv1d_fn(x, conv_w.squeeze(1), conv_b, activation="silu")
        r, n = dt_w.shape[1], A.shape[1]
        dt, B, C = (x.transpose(1, 2) @ x_w.T).split([r, n, n], dim=-1)
        y = modeling_mamba.mamba_selective_scan(
            x, dt_w @ dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D=D, z=z, delta_bias=delta_bias,
            delta_softplus=True, return_last_state=False,
        )  # fmt: skip
        return F.linear(y.transpose(1, 2), out_w, out_b)

    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", kernel)
    config = MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8)
    model = softlms.deploy(softlms.decompose(MambaForCausalLM(config)), keep=0.5, count="linear")
    with pytest.raises(ValueError, match=r"out_proj.* incompatible"):  # PEFT's own guard
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["out_proj"]))
    plain = model.train()(IDS, use_cache=False).logits
    model = adapted(model, target_modules=["down", "up"])
    fused, slow = (model.train(train)(IDS, use_cache=False).logits for train in (True, False))
    torch.testing.assert_close(fused, slow, rtol=0, atol=1e-4)
    assert (fused - plain).abs().max() > 1e-3
    model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
