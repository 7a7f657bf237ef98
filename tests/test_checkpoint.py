import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from softlms.architectures import find_targets
from softlms.budget import count_parameters
from softlms.checkpoint import load_compressed, save_compressed
from softlms.fused import split_fused
from softlms.language_models import SmallModel
from softlms.surgery import decompose, deploy, truncate


def small(tiny_bert, **changes):
    model = tiny_bert(**changes)
    return truncate(model, {t.name: 1 + 3 * i for i, t in enumerate(find_targets(model))} | {LAST: 32})


LAST = "bert.encoder.layer.1.output.dense"  # at full rank: stored dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_labels, attention", [(1, "eager"), (3, "sdpa")])
def test_round_trip_is_bit_equal_at_the_compressed_size(tiny_bert, tokens, tmp_path, dtype, num_labels, attention):
    model = small(tiny_bert, num_labels=num_labels).to(dtype)
    model.set_attn_implementation(attention)
    folder = save_compressed(model, tmp_path / "out", notes={"f1": 0.8})
    again = load_compressed(folder)
    assert not again.training and next(again.parameters()).dtype == dtype
    assert again.config._attn_implementation == attention
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert count_parameters(again) == count_parameters(model)
    assert (folder / "softlms.safetensors").stat().st_size < 1.2 * sum(p.nbytes for p in model.parameters()) + 10_000
    assert json.loads((folder / "softlms.json").read_text())["notes"] == {"f1": 0.8}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family, split", [("gpt2", False), ("gpt2", True), ("llama", False), ("mamba", False)])
def test_language_models_too_tied_weights_once(tmp_path, family, split, tied):
    config = SmallModel(family, hidden=64, layers=2, vocabulary=300).config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).eval()
    model = deploy(decompose(split_fused(model) if split else model), 0.5, "linear")
    again = load_compressed(save_compressed(model, tmp_path / "out"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert count_parameters(again) == count_parameters(model)
    head, embeddings = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert (head is embeddings) == tied
    assert (tmp_path / "out/softlms.safetensors").stat().st_size < 4 * sum(
        p.numel() for p in model.parameters()
    ) + 20_000


def test_transformers_alone_fails_loudly(tiny_bert, tmp_path):
    folder = save_compressed(small(tiny_bert), tmp_path / "out")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_bad_folders_are_refused(tiny_bert, tmp_path):
    model = small(tiny_bert)
    with pytest.raises(ValueError, match="soft form: call softlms.deploy"):
        save_compressed(decompose(tiny_bert()), tmp_path / "soft")
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense was chosen by targets"):
        save_compressed(
            deploy(decompose(tiny_bert(), targets=lambda name, module: "pooler" in name), 0.5, "linear"), tmp_path / "x"
        )
    folder = save_compressed(model, tmp_path / "out")
    assert load_compressed(folder, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    with pytest.raises(FileExistsError, match="holds something already"):
        save_compressed(model, folder)
    card = json.loads((folder / "softlms.json").read_text())
    (folder / "softlms.json").write_text(json.dumps(card | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, this softlms knows 1: update"):
        load_compressed(folder)
    (folder / "softlms.json").write_text(json.dumps(card | {"ranks": card["ranks"] | {LAST: 5}}))
    with pytest.raises(RuntimeError, match="output.dense"):
        load_compressed(folder)
    (folder / "softlms.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="softlms.safetensors is missing"):
        load_compressed(folder)
    with pytest.raises(FileNotFoundError, match="no compressed model"):
        load_compressed(tmp_path / "nowhere")
