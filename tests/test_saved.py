"""Folders that older versions have saved load as they did then: see tools/make_saved.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from softlms.layers import Ranked
from softlms.saving.checkpoint import describe

SAVED = sorted(path for path in (Path(__file__).parent / "saved").glob("format-*/*") if path.is_dir())


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_an_old_folder_loads_bit_for_bit(folder, tmp_path, caplog):
    auto = AutoModelForSequenceClassification if folder.name.startswith("bert") else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not report["missing_keys"] and not report["unexpected_keys"] and "differs" not in caplog.text
    stored = {name: values for name, values in load_file(folder / "model.safetensors").items() if values.numel()}
    state = model.state_dict()
    assert stored and all(torch.equal(state[name], values) for name, values in stored.items())
    assert describe(model) == _layers(folder)
    expected = load_file(folder / "expected.safetensors")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Ranked)}
    assert {f"{name}.weight" for name in layers} == expected.keys() - {"ids", "logits"}
    # products differ in the last bits from processor to processor
    close = {"atol": 1e-5, "rtol": 1e-4} if model.dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for name, layer in layers.items():
        torch.testing.assert_close(torch.as_tensor(layer.weight + 0), expected[f"{name}.weight"], **close)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], **close)
    # saved again by this version, it is the same model
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, dtype="auto")
    assert describe(again) == describe(model)
    assert all(torch.equal(again.state_dict()[name], values) for name, values in state.items())


def test_all_families_and_forms_are_there():
    forms = {}
    for folder in SAVED:
        forms.setdefault(folder.name.partition("-")[0], set()).update(
            layer["form"] for layer in _layers(folder).values()
        )
    assert forms["bert"] == {"soft", "low rank", "masked"}
    assert forms["gpt2"] == {"soft", "low rank", "split"} and forms["llama"] == forms["mamba"] == {"soft", "low rank"}


def _layers(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return json.loads(tensors.metadata()["softlms"].partition(" ")[2])["layers"]
