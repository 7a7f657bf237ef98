"""Options of from_pretrained: attention, devices, quantization."""

import json

import pytest
import torch
import transformers
from folders import IDS, assert_equal, dense, load, outputs, soft, thin
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
)

import softlms
from softlms.layers import LowRankLinear


def test_options_of_from_pretrained_still_work(deployed, tmp_path):
    deployed.set_attn_implementation("eager")
    deployed.save_pretrained(tmp_path)
    assert load(tmp_path).config._attn_implementation == "eager"
    assert load(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    assert load(tmp_path, id2label={0: "no", 1: "yes"}).config.id2label[1] == "yes"


def negated(module, query, key, value, attention_mask, **options):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return -out, weights


@pytest.fixture
def registered():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    registries = (AttentionInterface, negated), (AttentionMaskInterface, sdpa_mask)
    assert ALL_MASK_ATTENTION_FUNCTIONS
    for registry, function in registries:
        registry.register("negated", function)
    yield registries
    for registry, _ in registries:
        registry._global_mapping.pop("negated", None)


def test_a_registered_attention_function_is_taken_up_or_asked_for(deployed, tmp_path, registered):
    plain = outputs(deployed)
    deployed.set_attn_implementation("negated")
    assert (outputs(deployed) - plain).abs().max() > 1e-2
    deployed.save_pretrained(tmp_path)
    assert_equal(load(tmp_path), deployed)
    for registry, _ in reversed(registered):
        del registry._global_mapping["negated"]
        with pytest.raises(ValueError, match=rf"function 'negated': call {registry.__name__}\.register\('negated', "):
            load(tmp_path)
    assert torch.equal(outputs(load(tmp_path, attn_implementation="sdpa")), plain)
    old = json.loads((tmp_path / "config.json").read_text("utf-8"))
    del old["quantization_config"]["registered"]  # which older versions did not write
    (tmp_path / "config.json").write_text(json.dumps(old), "utf-8")
    with pytest.raises(ValueError, match=r"function 'negated': call AttentionInterface"):
        load(tmp_path)


def test_attention_that_not_every_machine_has_is_told(deployed, tmp_path, caplog):
    deployed.config._attn_implementation = "flash_attention_2"
    softlms.origin.mark(deployed)
    noted = deployed.config.quantization_config
    deployed.config._attn_implementation = "sdpa"
    deployed.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8")) | {"quantization_config": noted}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    again = load(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert "saved with attn_implementation='flash_attention_2', which not every machine has" in caplog.text


@pytest.mark.parametrize("form", ["soft", "deployed"])
def test_offloading_to_disk(tiny_bert, tmp_path, form):
    model = soft(dense(tiny_bert, "llama"))
    if form == "deployed":
        softlms.deploy(model)
    model.save_pretrained(tmp_path / "out")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places["model.layers.1"] = "disk"
    options = {"device_map": places, "offload_folder": str(tmp_path / "disk")}
    if form == "soft":
        with pytest.raises(ValueError, match=r"model\.layers\.1\S+ is offloaded by device_map, which a soft layer"):
            load(tmp_path / "out", "llama", **options)
    else:
        again = load(tmp_path / "out", "llama", **options)
        assert torch.equal(again(IDS).logits, outputs(model))


def test_quantized_at_loading(tiny_bert, tmp_path):
    """The same as by hand after loading, and the low-rank parts are quantized too."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = dense(tiny_bert, "llama")
    thin(model, 8)  # torchao itself fails at rank 1
    model.save_pretrained(tmp_path)
    asked = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    for kind in (AutoModelForCausalLM, type(model)):
        again = kind.from_pretrained(tmp_path, quantization_config=asked)
        by_hand = kind.from_pretrained(tmp_path)
        quantize_(by_hand, asked.quant_type, lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
        assert torch.equal(outputs(again), outputs(by_hand))
        assert 0 < (outputs(again) - outputs(model)).abs().max() < 0.05 * outputs(model).abs().max()
        layer = next(module for module in again.modules() if isinstance(module, LowRankLinear))
        assert type(layer.down.weight.data) is not torch.Tensor
        with pytest.raises(ValueError, match=r"is quantized .*: save it unquantized"):
            again.save_pretrained(tmp_path / "quantized")
    assert again.is_quantized and again.hf_quantizer.__class__.__name__ == "TorchAoHfQuantizer"
