"""The files of a saved folder: its card and notes, its configuration, and what else stands beside them."""

import copy
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from folders import FAMILIES, assert_equal, dense, load, soft, thin
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import softlms
from softlms.architectures import find_targets
from softlms.budget import count_parameters
from softlms.layers import SoftLinear
from softlms.lowrank.factorization import factorize_weight
from softlms.lowrank.masks import MaskedLinear
from softlms.model_card import notes
from softlms.saving.loading import verify


def test_only_the_folders_own_weights_are_replaced(deployed, tmp_path):
    (tmp_path / "model_of_somebody.safetensors").write_text("mine", "utf-8")
    (tmp_path / "README.md").write_text("my words", "utf-8")
    (tmp_path / f".saving-{socket.gethostname()}-{2**22 + 1}-x").mkdir()  # of a process that is no more
    (tmp_path / f".saving-{socket.gethostname()}-{os.getppid()}-x").mkdir()  # of another that saves now
    deployed.save_pretrained(tmp_path, max_shard_size="60KB")
    deployed.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == "my words"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".saving-{socket.gethostname()}-{os.getppid()}-x",
        "README.md", "config.json", "model.safetensors", "model_of_somebody.safetensors",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"has no variants in one folder"):
        deployed.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match=r"load state_dict into it first"):
        deployed.save_pretrained(tmp_path, state_dict=deployed.state_dict(), push_to_hub=True)
    deployed.bert.pooler.to("meta")
    with pytest.raises(ValueError, match=r"is offloaded: load it without device_map"):
        deployed.save_pretrained(tmp_path)
    deployed.is_remote_code = lambda: True
    with pytest.raises(ValueError, match=r"custom code .* cannot be saved compressed yet"):
        deployed.save_pretrained(tmp_path)


KILLED = """
import sys, torch, softlms
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print("ready", flush=True)
while True:
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_save_leaves_a_whole_model(saved, tmp_path):
    saves = set()
    for i in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, encoding="utf-8"
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3 + 0.137 * i)
        child.kill()
        child.wait()
        model = load(tmp_path)  # the older one or the newer one, whole
        saves.add(model.classifier.bias[0].item())
    assert len(saves) == 3
    model.save_pretrained(tmp_path / "fresh")
    assert not list((tmp_path / "fresh").glob(".saving-*"))


def test_a_failed_save_changes_nothing(saved, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not hasattr(saved, "hf_quantizer")


def test_a_foreign_readme_in_another_encoding_stays(tiny_bert, tmp_path):
    model = thin(tiny_bert())
    foreign = "Modèle à moi".encode("latin-1")
    (tmp_path / "README.md").write_bytes(foreign)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == foreign
    assert softlms.ranks(load(tmp_path)) == softlms.ranks(model)


def test_card_says_ratio_ranks_and_notes(deployed, tmp_path):
    deployed.config.softlms = {"task": "mrpc", "dev": {"f1": 0.8712345}}
    deployed.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    counted = count_parameters(deployed)
    assert f"{counted.total:,} of {counted.total_dense:,} parameters" in card
    assert "| dev.f1 | 0.8712 |" in card and "| task | mrpc |" in card and "tags: [softlms" in card
    target = find_targets(deployed)[1]
    assert f"| {target.name} | 32 | 32 | {target.module.rank} |" in card
    assert load(tmp_path).config.softlms["dev"]["f1"] == 0.8712345
    assert len(verify([tmp_path / "model.safetensors"])["layers"]) == sum(
        not isinstance(t.module, nn.Linear) for t in find_targets(deployed)
    )


def test_card_of_learned_masks(tiny_bert, tmp_path):
    model = tiny_bert()
    for target in find_targets(model):
        factors = factorize_weight(target.module.weight)
        model.set_submodule(target.name, MaskedLinear(factors, target.module.bias))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "Layers by form: 12 masked." in card and "low-rank ones" not in card and "## Ranks" not in card


def test_pushes_what_it_saves(deployed, tmp_path, monkeypatch):
    """The hub is not there: what would be uploaded is looked at instead."""
    pushed = {}

    class Card:
        def save(self, path):
            Path(path).write_text("---\ntags: [mine]\n---\nThis card has been automatically generated.", "utf-8")

    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(
        "transformers.utils.hub.hf_api",
        lambda: type("Api", (), {"create_repo": lambda self, repo_id, **kw: type("R", (), {"repo_id": repo_id})()})(),
    )

    def upload(self, working_dir, repo_id, **kwargs):
        shutil.copytree(working_dir, tmp_path / "hub")
        pushed["to"] = repo_id

    monkeypatch.setattr(transformers.utils.hub.PushToHubMixin, "_upload_modified_files", upload)
    deployed.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/small")
    assert pushed == {"to": "me/small"}
    assert_equal(load(tmp_path / "hub"), deployed)
    card = (tmp_path / "hub/README.md").read_text("utf-8")
    assert "compressed by softlms" in card and "tags: [softlms, low-rank, model-compression, mine]" in card


def test_plain_values_of_notes(deployed, tmp_path):
    deployed.config.softlms = {
        "dev": {"f1": np.float32(0.5)},
        "rows": np.int64(408),
        "data": Path("/glue"),
        "seeds": (0, 1),
    }
    deployed.save_pretrained(tmp_path)
    expected = {"dev": {"f1": 0.5}, "rows": 408, "data": str(Path("/glue")), "seeds": [0, 1]}
    assert AutoConfig.from_pretrained(tmp_path).softlms == expected
    assert "| dev.f1 | 0.5 |" in (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "held, told",
    [
        ({"dev": {"f1": {0.5}}}, r"softlms\['dev'\]\['f1'\] is of <class 'set'>, which JSON cannot store"),
        ({"scores": [1, torch.ones(2)]}, r"softlms\['scores'\]\[1\] is of <class 'torch.Tensor'>"),
        ({("a", 1): 2}, r"softlms has the key \('a', 1\)"),
    ],
)
def test_notes_that_cannot_be_saved(deployed, tmp_path, held, told):
    deployed.config.softlms = held
    with pytest.raises(ValueError, match=told):
        notes(deployed.config)
    with pytest.raises(ValueError, match=told):
        deployed.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_notes_that_are_none_or_no_dict(tiny_bert):
    config = tiny_bert().config
    assert notes(config) == {}
    config.softlms = "first try"
    assert notes(config) == {"note": "first try"}


def test_dense_models_are_saved_as_ever(tiny_bert, tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text("utf-8"))
    again = load(tmp_path)
    assert not any(isinstance(module, SoftLinear) for module in again.modules())


def test_saving_a_dense_model_has_transformers_own_signature(tiny_bert, tmp_path):
    model = tiny_bert()
    state = {name: values + 1 for name, values in model.state_dict().items()}
    for form in ("dense", "soft"):
        if form == "soft":
            soft(model)
            state = {name: values + 1 for name, values in model.state_dict().items()}
        model.save_pretrained(tmp_path / form, True, dict(state), False, "60KB")
        assert len(list((tmp_path / form).glob("*.safetensors"))) > 1
        again = load(tmp_path / form)
        assert all(torch.equal(values, state[name]) for name, values in again.state_dict().items())
        model.save_pretrained(tmp_path / "not here", False)
    assert not (tmp_path / "not here/config.json").exists()
    own = inspect.signature(transformers.PreTrainedModel.save_pretrained)
    assert list(own.parameters)[:5] == ["self", "save_directory", "is_main_process", "state_dict", "push_to_hub"]


@pytest.mark.parametrize("source", ["live", "saved", "shared"])
def test_a_dense_model_with_a_compressed_ones_configuration_is_dense(deployed, tmp_path, source):
    deployed.save_pretrained(tmp_path / "thin")
    config = {
        "live": copy.deepcopy(deployed.config),
        "saved": AutoConfig.from_pretrained(tmp_path / "thin"),
        "shared": deployed.config,
    }[source]
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text("utf-8"))
    assert_equal(load(tmp_path / "dense"), model)
    model.config.save_pretrained(tmp_path / "dense")  # a mark on dense weights: they are what counts
    again = load(tmp_path / "dense")
    assert_equal(again, model)
    assert not again.is_quantized and not hasattr(again.config, "quantization_config")
    assert_equal(load(tmp_path / "dense", config=deployed.config), model)
    deployed.config.save_pretrained(tmp_path / "thin")
    assert_equal(load(tmp_path / "thin"), deployed)


@pytest.mark.parametrize("family, split", FAMILIES)
def test_the_configuration_may_be_written_again(tiny_bert, tmp_path, caplog, family, split):
    model = softlms.deploy(soft(dense(tiny_bert, family, split)))
    copy.deepcopy(model).save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)  # of a model that was itself never saved
    again = load(tmp_path, family)
    assert_equal(again, model)
    assert caplog.text.count("differs from the one saved with these weights: architectures, dtype.") == 1
    again.config.id2label = {0: "no", 1: "yes", 2: "perhaps"} if family != "bert" else {0: "no", 1: "yes"}
    again.config.save_pretrained(tmp_path)
    relabelled = load(tmp_path, family)
    assert_equal(relabelled, model)
    assert re.search(r"config.json differs from the one saved with these weights: .*id2label", caplog.text)
    assert relabelled.config.id2label[1] == "yes"
