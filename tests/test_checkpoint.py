"""Saved and loaded by transformers itself: the same logits to the last bit, or a refusal."""

import copy
import inspect
import json
import os
import random
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import softlms
from softlms.architectures import find_targets
from softlms.budget import count_parameters
from softlms.experiments.language_models import SmallModel
from softlms.layers import LowRankLinear, SoftLinear
from softlms.lowrank.factorization import factorize_weight
from softlms.lowrank.masks import MaskedLinear
from softlms.model_card import notes
from softlms.origin import DENSE
from softlms.saving.loading import verify

IDS = torch.arange(20)[None]
FAMILIES = [("bert", False), ("gpt2", False), ("gpt2", True), ("llama", False), ("mamba", False)]
AUTO = {"bert": AutoModelForSequenceClassification}


def dense(tiny_bert, family, split, tied=True):
    if family == "bert":
        return tiny_bert()
    config = SmallModel(family, hidden=64, layers=2, vocabulary=300).config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).eval()
    return softlms.split_fused(model) if split else model


def soft(model):
    """Other ranks in each layer; the last at full rank, which is stored dense."""
    softlms.decompose(model)
    layers = list(softlms.surgery.soft_layers(model).values())
    for i, layer in enumerate(layers[:-1]):
        layer.set_rank_(1 + 3 * i)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def assert_equal(again, model):
    assert torch.equal(logits(again), logits(model))
    assert {n: (v.dtype, v.shape) for n, v in again.state_dict().items()} == {
        n: (v.dtype, v.shape) for n, v in model.state_dict().items()
    }


@pytest.mark.parametrize("form", ["soft", "deployed", "truncated"])
@pytest.mark.parametrize("family, split", FAMILIES)
def test_round_trip_is_bit_equal_at_the_compressed_size(tiny_bert, tmp_path, family, split, form):
    model = dense(tiny_bert, family, split)
    if form == "truncated":
        softlms.truncate(model, {t.name: min(1 + 3 * i, *t.shape) for i, t in enumerate(find_targets(model))})
    else:
        soft(model)
        if form == "deployed":
            softlms.deploy(model)
    model.save_pretrained(tmp_path / "out")
    auto = AUTO.get(family, AutoModelForCausalLM)
    again, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not again.training
    assert_equal(again, model)
    assert_equal(auto.from_pretrained(tmp_path / "out", low_cpu_mem_usage=True, device_map="cpu"), model)
    size = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert (tmp_path / "out/model.safetensors").stat().st_size < size + 40_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    # loaded, it is a model like any other: saved again, the same
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert verify([tmp_path / "again/model.safetensors"]) == verify([tmp_path / "out/model.safetensors"])
    assert not again.is_quantized and not hasattr(again, "hf_quantizer")
    assert again.config.quantization_config == model.config.quantization_config


@pytest.mark.slow
def test_bert_base_at_its_real_size(tmp_path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig()).eval()
    softlms.surgery.shrink(model, {t.name: (128, 400)[i % 2] for i, t in enumerate(find_targets(model))})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(tmp_path)
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_written_once(tiny_bert, tmp_path, tied):
    model = softlms.deploy(soft(dense(tiny_bert, "llama", False, tied)))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert_equal(again, model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(tiny_bert, tmp_path, dtype):
    model = soft(tiny_bert())
    model.save_pretrained(tmp_path / "soft")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "soft", dtype=dtype)
    assert softlms.ranks(loaded) == softlms.ranks(model)  # sigma and alpha are not rounded
    for layer in softlms.surgery.soft_layers(loaded).values():
        assert layer.U.dtype == dtype and layer.sigma.dtype == layer.threshold.alpha.dtype == torch.float32
    assert (logits(loaded) - logits(model)).abs().max() < 0.1
    small = softlms.deploy(loaded)
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert again.dtype == dtype
    assert_equal(again, small)


def test_training_goes_on_after_loading(tiny_bert, tmp_path):
    model = soft(tiny_bert())
    for i, layer in enumerate(softlms.surgery.soft_layers(model).values()):
        if i % 2:
            layer.freeze_()
    model.save_pretrained(tmp_path / "soft")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "soft")
    learns = [layer.threshold.alpha.requires_grad for layer in softlms.surgery.soft_layers(model).values()]
    assert [layer.threshold.alpha.requires_grad for layer in softlms.surgery.soft_layers(again).values()] == learns
    rows = [{"input_ids": IDS[0], "labels": 1}] * 4
    before = logits(again)
    args = TrainingArguments(str(tmp_path / "t"), max_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[])
    Trainer(again, args, train_dataset=rows).train()  # refuses what transformers takes for quantized
    assert not torch.equal(logits(again), before)


def test_a_trainers_checkpoint_is_a_saved_model(tiny_bert, tmp_path, caplog):
    model = soft(tiny_bert())
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True
    )
    rows = [{"input_ids": IDS[0], "labels": 1}] * 8
    Trainer(model, args, train_dataset=rows).train()
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2"), model.eval())
    resumed = soft(tiny_bert())
    Trainer(resumed, args, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(resumed.eval(), model)
    assert "unexpected keys" not in caplog.text


def test_base_model_and_pipeline(tiny_folder, tmp_path):
    model = softlms.deploy(soft(AutoModelForSequenceClassification.from_pretrained(tiny_folder)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.bert(IDS).last_hidden_state)
        row = tokenizer("a red house", return_tensors="pt")
        expected = model(**row).logits.softmax(-1).max().item()
    answer = pipeline("text-classification", model=str(tmp_path), device="cpu")("a red house")[0]
    assert answer["score"] == pytest.approx(expected, abs=1e-7)
    base.save_pretrained(tmp_path / "base")  # and a base model's layers come back under a head
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(headed.bert(IDS).last_hidden_state, base(IDS).last_hidden_state)


ALONE = """
import sys, transformers
for folder in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    try:
        getattr(transformers, name).from_pretrained(folder)
    except RuntimeError as error:
        assert "mismatch" in str(error), error
    else:
        raise SystemExit(f"{folder} was loaded")
assert "softlms" not in sys.modules
"""


def test_transformers_alone_fails_loudly(tiny_bert, tmp_path):
    folders = []
    for family, split in FAMILIES:
        model = soft(dense(tiny_bert, family, split))
        for form in ("soft", "deployed"):
            folders.append(str(tmp_path / f"{family}-{split}-{form}"))
            (model if form == "soft" else softlms.deploy(model)).save_pretrained(folders[-1])
    done = subprocess.run([sys.executable, "-c", ALONE, *folders], capture_output=True, encoding="utf-8", cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


def test_shards_of_two_saves_do_not_mix(tiny_bert, tmp_path):
    model = soft(tiny_bert())
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 1
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "a"), model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight += 1
    model.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    shutil.copy(tmp_path / "b" / shards[0].name, shards[0])
    with pytest.raises(ValueError, match="parts of different models"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")  # fewer files than before: none of the old ones is left
    assert [path.name for path in (tmp_path / "b").glob("*.safetensors*")] == ["model.safetensors"]
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "b"), model)


def test_damaged_folders_are_refused_or_bit_equal(tiny_bert, tmp_path, caplog):
    """200 folders, each with bytes flipped or a file cut short; a changed configuration may load, and is told."""
    model = softlms.deploy(soft(tiny_bert(num_hidden_layers=1)))
    model.save_pretrained(tmp_path / "good")
    expected, chance, refused = logits(model), random.Random(0), 0
    for _ in range(200):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        file = tmp_path / "bad" / chance.choice(["model.safetensors", "model.safetensors", "config.json"])
        content = bytearray(file.read_bytes())
        if chance.random() < 0.3:
            del content[chance.randrange(len(content)) :]
        else:
            header = len(content) if chance.random() < 0.5 else min(len(content), 20_000)
            for _ in range(chance.choice([1, 1, 8])):
                content[chance.randrange(header)] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        try:
            again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bad")
        except Exception as error:
            assert str(error)
            refused += 1
        else:
            assert file.name == "config.json" or torch.equal(logits(again), expected)
            assert torch.equal(logits(again), expected) or "differs from the one saved" in caplog.text
        caplog.clear()
    assert refused > 120


def test_messages_of_refusals(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    model.save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    config = tmp_path / "config.json"
    good = config.read_text("utf-8")
    config.write_text(good.replace('"format": 2', '"format": 3'), "utf-8")
    with pytest.raises(ValueError, match="softlms format 3, this softlms knows 2: update"):
        load(tmp_path)
    config.write_text(good, "utf-8")
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        load(tmp_path)
    # the same weights, written by something that knows nothing of their layers
    save_file(model.state_dict(), weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has bert\.encoder\.layer\.0\.\S+ but no complete softlms description"):
        load(tmp_path)
    weights.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has bert\.encoder\.layer\.0\.\S+ but no complete softlms description"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"has bert\.encoder\.layer\.0\.\S+ but no complete softlms description"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(FileExistsError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"A LlamaForCausalLM has none of the saved layers, such as bert\.encoder"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    for config in (AutoConfig.from_pretrained(tmp_path / "again"), model.config):
        with pytest.raises(ValueError, match="state_dict alone does not describe"):
            type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


def test_only_the_folders_own_weights_are_replaced(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    (tmp_path / "model_of_somebody.safetensors").write_text("mine", "utf-8")
    (tmp_path / "README.md").write_text("my words", "utf-8")
    (tmp_path / f".saving-{socket.gethostname()}-{2**22 + 1}-x").mkdir()  # of a process that is no more
    (tmp_path / f".saving-{socket.gethostname()}-{os.getppid()}-x").mkdir()  # of another that saves now
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == "my words"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".saving-{socket.gethostname()}-{os.getppid()}-x",
        "README.md", "config.json", "model.safetensors", "model_of_somebody.safetensors",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"has no variants in one folder"):
        model.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match=r"load state_dict into it first"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict(), push_to_hub=True)
    model.bert.pooler.to("meta")
    with pytest.raises(ValueError, match=r"is offloaded: load it without device_map"):
        model.save_pretrained(tmp_path)
    model.is_remote_code = lambda: True
    with pytest.raises(ValueError, match=r"custom code .* cannot be saved compressed yet"):
        model.save_pretrained(tmp_path)


def test_a_factored_head_does_not_stand_in_the_way(tiny_bert, tmp_path):
    model = tiny_bert()
    softlms.truncate(
        model, {"bert.pooler.dense": 5, "classifier": 1}, targets=lambda n, m: n in ("bert.pooler.dense", "classifier")
    )
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(IDS).pooler_output, model.bert(IDS).pooler_output)


def test_options_of_from_pretrained_still_work(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    assert load(tmp_path).config._attn_implementation == "eager"
    assert load(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    assert load(tmp_path, id2label={0: "no", 1: "yes"}).config.id2label[1] == "yes"


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
def test_a_killed_save_leaves_a_whole_model(tiny_bert, tmp_path):
    softlms.deploy(soft(tiny_bert())).save_pretrained(tmp_path)
    saves = set()
    for i in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, encoding="utf-8"
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3 + 0.137 * i)
        child.kill()
        child.wait()
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)  # the older one or the newer one, whole
        saves.add(model.classifier.bias[0].item())
    assert len(saves) == 3
    model.save_pretrained(tmp_path / "fresh")
    assert not list((tmp_path / "fresh").glob(".saving-*"))


def test_a_failed_save_changes_nothing(tiny_bert, tmp_path, monkeypatch):
    model = softlms.deploy(soft(tiny_bert()))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not hasattr(model, "hf_quantizer")


def test_card_says_ratio_ranks_and_notes(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    model.config.softlms = {"task": "mrpc", "dev": {"f1": 0.8712345}}
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    counted = count_parameters(model)
    assert f"{counted.total:,} of {counted.total_dense:,} parameters" in card
    assert "| dev.f1 | 0.8712 |" in card and "| task | mrpc |" in card and "tags: [softlms" in card
    target = find_targets(model)[1]
    assert f"| {target.name} | 32 | 32 | {target.module.rank} |" in card
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.softlms["dev"]["f1"] == 0.8712345
    assert len(verify([tmp_path / "model.safetensors"])["layers"]) == sum(
        not isinstance(t.module, torch.nn.Linear) for t in find_targets(model)
    )


def test_pushes_what_it_saves(tiny_bert, tmp_path, monkeypatch):
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
    model = softlms.deploy(soft(tiny_bert()))
    model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/small")
    assert pushed == {"to": "me/small"}
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "hub"), model)
    card = (tmp_path / "hub/README.md").read_text("utf-8")
    assert "compressed by softlms" in card and "tags: [softlms, low-rank, model-compression, mine]" in card


def test_dense_models_are_saved_as_ever(tiny_bert, tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text("utf-8"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
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
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / form)
        assert all(torch.equal(values, state[name]) for name, values in again.state_dict().items())
        model.save_pretrained(tmp_path / "not here", False)
    assert not (tmp_path / "not here/config.json").exists()
    own = inspect.signature(transformers.PreTrainedModel.save_pretrained)
    assert list(own.parameters)[:5] == ["self", "save_directory", "is_main_process", "state_dict", "push_to_hub"]


@pytest.mark.parametrize("source", ["live", "saved", "shared"])
def test_a_dense_model_with_a_compressed_ones_configuration_is_dense(tiny_bert, tmp_path, source):
    thin = softlms.deploy(soft(tiny_bert()))
    thin.save_pretrained(tmp_path / "thin")
    config = {
        "live": copy.deepcopy(thin.config),
        "saved": AutoConfig.from_pretrained(tmp_path / "thin"),
        "shared": thin.config,
    }[source]
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text("utf-8"))
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense"), model)
    model.config.save_pretrained(tmp_path / "dense")  # a mark on dense weights: they are what counts
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert_equal(again, model)
    assert not again.is_quantized and not hasattr(again.config, "quantization_config")
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", config=thin.config), model)
    thin.config.save_pretrained(tmp_path / "thin")
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "thin"), thin)


@pytest.mark.parametrize("family, split", FAMILIES)
def test_the_configuration_may_be_written_again(tiny_bert, tmp_path, caplog, family, split):
    model = softlms.deploy(soft(dense(tiny_bert, family, split)))
    copy.deepcopy(model).save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)  # of a model that was itself never saved
    load = AUTO.get(family, AutoModelForCausalLM).from_pretrained
    again = load(tmp_path)
    assert_equal(again, model)
    assert caplog.text.count("differs from the one saved with these weights: architectures, dtype.") == 1
    again.config.id2label = {0: "no", 1: "yes", 2: "perhaps"} if family != "bert" else {0: "no", 1: "yes"}
    again.config.save_pretrained(tmp_path)
    relabelled = load(tmp_path)
    assert_equal(relabelled, model)
    assert re.search(r"config.json differs from the one saved with these weights: .*id2label", caplog.text)
    assert relabelled.config.id2label[1] == "yes"


def test_weights_that_do_not_fit_a_changed_configuration_are_refused(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.intermediate_size = 48
    config.save_pretrained(tmp_path)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=r"intermediate.dense\.\S+ is of shape .*differs.*: .*intermediate_size"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    # another head for another task is none of the weights'
    config.intermediate_size, config.num_labels = 64, 3
    config.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    with torch.no_grad():
        assert torch.equal(again.bert(IDS).last_hidden_state, model.bert(IDS).last_hidden_state)
    count_parameters(again)


def test_a_compressed_model_is_copied_pickled_and_trained_like_any_other(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    assert copy.deepcopy(model.config) == model.config and json.loads(model.config.to_json_string())
    torch.save(model, tmp_path / "model.pt")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        again.save_pretrained(tmp_path / "out")
        assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), model)
    rows = [{"input_ids": IDS[0], "labels": 1}] * 4
    args = TrainingArguments(str(tmp_path / "t"), max_steps=1, use_cpu=True, report_to=[])
    Trainer(model, args, train_dataset=rows).train()


@pytest.mark.parametrize("way", ["kept", "saved", "copied"])
def test_the_dense_model_is_remembered(tiny_bert, tmp_path, way):
    """What is kept is a share of the model that was: nine tenths of the words are gone, and it shows."""
    model = softlms.deploy(soft(tiny_bert()))
    before = count_parameters(model)
    model.resize_token_embeddings(20)
    if way == "saved":
        model.save_pretrained(tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    elif way == "copied":
        model = copy.deepcopy(model)
    fewer = count_parameters(model)
    assert fewer.total == before.total - 5_760 and fewer.total_dense == before.total_dense
    if way == "saved":
        card = (tmp_path / "README.md").read_text("utf-8")
        assert f"{fewer.total:,} of {before.total_dense:,} parameters" in card
    pooler = softlms.decompose(copy.deepcopy(model), targets=lambda name, module: name == "bert.pooler.dense")
    softlms.deploy(pooler, keep=0.62, count="total")
    assert count_parameters(pooler).total <= 0.62 * before.total_dense
    model.resize_token_embeddings(200)
    assert count_parameters(model) == before


def test_other_heads_and_bases_are_no_change_of_the_dense_rest(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    linear = count_parameters(model).linear
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    base.save_pretrained(tmp_path / "base")
    for other in (
        model.bert,
        base,
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5),
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True),
        transformers.BertForMaskedLM.from_pretrained(tmp_path),
    ):
        counted = count_parameters(other)
        assert counted.linear == linear and counted.total == sum(p.numel() for p in other.parameters())
    model.classifier = torch.nn.Linear(32, 7)
    assert count_parameters(model).linear == linear
    # and what was saved before the rest was noted counts as ever
    del vars(model)[DENSE]
    model.resize_token_embeddings(20)
    assert count_parameters(model).linear == linear


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


def test_a_registered_attention_function_is_taken_up_or_asked_for(tiny_bert, tmp_path, registered):
    model = softlms.deploy(soft(tiny_bert()))
    plain = logits(model)
    model.set_attn_implementation("negated")
    assert (logits(model) - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    assert_equal(load(tmp_path), model)
    for registry, _ in reversed(registered):
        del registry._global_mapping["negated"]
        with pytest.raises(ValueError, match=rf"function 'negated': call {registry.__name__}\.register\('negated', "):
            load(tmp_path)
    assert torch.equal(logits(load(tmp_path, attn_implementation="sdpa")), plain)
    old = json.loads((tmp_path / "config.json").read_text("utf-8"))
    del old["quantization_config"]["registered"]  # which older versions did not write
    (tmp_path / "config.json").write_text(json.dumps(old), "utf-8")
    with pytest.raises(ValueError, match=r"function 'negated': call AttentionInterface"):
        load(tmp_path)


def test_attention_that_not_every_machine_has_is_told(tiny_bert, tmp_path, caplog):
    model = softlms.deploy(soft(tiny_bert()))
    model.config._attn_implementation = "flash_attention_2"
    softlms.origin.mark(model)
    noted = model.config.quantization_config
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8")) | {"quantization_config": noted}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert "saved with attn_implementation='flash_attention_2', which not every machine has" in caplog.text


class Louder(LowRankLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_embeddings(model):
    model.bert.embeddings.word_embeddings = torch.nn.Embedding(20, 32)


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].attention.self.query.down)


def other_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()


def added(model):
    model.bert.encoder.layer[0].register_buffer("shift", torch.ones(1))


def own_layer(model):
    model.bert.encoder.layer[0].attention.self.query.__class__ = Louder


def no_pooler(model):
    model.bert.pooler = None


def adapted(model):
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["down"]), model)


def quantized(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(version=2))


@pytest.mark.parametrize(
    "change, told",
    [
        (replaced_embeddings, r"word_embeddings\.weight has the shape \(20, 32\).*configuration has \(200, 32\)"),
        (
            parametrized,
            r"query\.down is \S*\.ParametrizedLinear, where BertForSequenceClassification has \S*\.Linear: ",
        ),
        (other_activation, r"intermediate_act_fn is \S*\.ReLU, where .* has \S*\.GELUActivation: "),
        (added, r"layer\.0\.shift has the shape \(1,\), where .* has None"),
        (own_layer, r"query is a Louder, which from_pretrained does not know"),
        (no_pooler, r"pooler\.dense\.weight has the shape None"),
        (adapted, r"query\.down is peft\.\S*\.Linear, where .* has torch\.\S*\.Linear: .* merge_and_unload"),
        (quantized, r"is quantized \(.*\): save it unquantized, and quantize after loading"),
    ],
)
def test_what_the_folder_cannot_hold_is_refused_by_name(tiny_bert, tmp_path, change, told):
    needed = {quantized: "torchao", adapted: "peft"}
    if change in needed:
        pytest.importorskip(needed[change])
    model = tiny_bert()
    softlms.truncate(model, {t.name: 4 for t in find_targets(model)})
    change(model)
    with pytest.raises(ValueError, match=told):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_building_a_model_once_more_leaves_the_random_numbers_alone(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    before = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


class WithArguments(transformers.BertForSequenceClassification):
    def __init__(self, config, width):
        super().__init__(config)
        self.more = torch.nn.Linear(width, width)


def test_classes_with_arguments_of_their_own(tiny_bert, tmp_path):
    model = softlms.deploy(soft(WithArguments(tiny_bert().config, 3).eval()))
    model.save_pretrained(tmp_path)
    assert_equal(WithArguments.from_pretrained(tmp_path, 3), model)


@pytest.mark.parametrize("form", ["soft", "deployed"])
def test_offloading_to_disk(tiny_bert, tmp_path, form):
    model = soft(dense(tiny_bert, "llama", False))
    if form == "deployed":
        softlms.deploy(model)
    model.save_pretrained(tmp_path / "out")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places["model.layers.1"] = "disk"
    load = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        tmp_path / "out", device_map=places, offload_folder=str(tmp_path / "disk")
    )
    if form == "soft":
        with pytest.raises(
            ValueError, match=r"model\.layers\.1\S+ is offloaded by device_map, which a soft layer cannot be"
        ):
            load()
    else:
        assert torch.equal(load()(IDS).logits, logits(model))


def test_quantized_at_loading(tiny_bert, tmp_path):
    """The same as by hand after loading, and the low-rank parts are quantized too."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = dense(tiny_bert, "llama", False)
    softlms.truncate(model, {t.name: 8 for t in find_targets(model)})  # torchao itself fails at rank 1
    model.save_pretrained(tmp_path)
    asked = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    for load in (AutoModelForCausalLM, type(model)):
        again = load.from_pretrained(tmp_path, quantization_config=asked)
        by_hand = load.from_pretrained(tmp_path)
        quantize_(by_hand, asked.quant_type, lambda m, name: isinstance(m, torch.nn.Linear) and name != "lm_head")
        assert torch.equal(logits(again), logits(by_hand))
        assert 0 < (logits(again) - logits(model)).abs().max() < 0.05 * logits(model).abs().max()
        thin = next(module for module in again.modules() if isinstance(module, LowRankLinear))
        assert type(thin.down.weight.data) is not torch.Tensor
        with pytest.raises(ValueError, match=r"is quantized .*: save it unquantized"):
            again.save_pretrained(tmp_path / "quantized")
    assert again.is_quantized and again.hf_quantizer.__class__.__name__ == "TorchAoHfQuantizer"


def test_plain_values_of_notes(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    model.config.softlms = {
        "dev": {"f1": np.float32(0.5)},
        "rows": np.int64(408),
        "data": Path("/glue"),
        "seeds": (0, 1),
    }
    model.save_pretrained(tmp_path)
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
def test_notes_that_cannot_be_saved(tiny_bert, tmp_path, held, told):
    model = softlms.deploy(soft(tiny_bert()))
    model.config.softlms = held
    with pytest.raises(ValueError, match=told):
        notes(model.config)
    with pytest.raises(ValueError, match=told):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_notes_that_are_none_or_no_dict(tiny_bert):
    config = tiny_bert().config
    assert notes(config) == {}
    config.softlms = "first try"
    assert notes(config) == {"note": "first try"}


def test_card_of_learned_masks(tiny_bert, tmp_path):
    model = tiny_bert()
    for target in find_targets(model):
        factors = factorize_weight(target.module.weight)
        model.set_submodule(target.name, MaskedLinear(factors, target.module.bias))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "Layers by form: 12 masked." in card and "low-rank ones" not in card and "## Ranks" not in card


def test_a_model_without_its_pooler_is_saved_as_it_is(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    model = BertModel(config, add_pooling_layer=False).eval()
    softlms.truncate(model, {target.name: 4 for target in find_targets(model)})
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    ids = torch.randint(0, 99, (2, 6))
    assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


class Tagger(PreTrainedModel):
    """A user's class that is not built from its configuration alone."""

    config_class, base_model_prefix = BertConfig, "bert"

    def __init__(self, config, tags):
        super().__init__(config)
        self.bert, self.out = BertModel(config), nn.Linear(config.hidden_size, tags)
        self.post_init()

    def forward(self, input_ids):
        return self.out(self.bert(input_ids).last_hidden_state)


def test_a_class_with_arguments_of_its_own_comes_back_or_is_refused(tmp_path):
    import peft

    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    model, ids = Tagger(config, 3).eval(), torch.randint(0, 99, (2, 6))
    softlms.truncate(model, {target.name: 4 for target in find_targets(model)})
    model.save_pretrained(tmp_path / "thin")
    loaded = Tagger.from_pretrained(tmp_path / "thin", tags=3).eval()
    assert torch.equal(loaded(ids), model(ids))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["query.down"]), model)
    with pytest.raises(ValueError, match=r"query differs from a LowRankLinear in its tensors, down\..*: the folder"):
        model.save_pretrained(tmp_path / "adapted")


def test_weights_that_lack_a_factor_are_refused(tiny_bert, tmp_path):
    model = tiny_bert()
    softlms.truncate(model, {target.name: 4 for target in find_targets(model)})
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as held:
        metadata, tensors = held.metadata(), {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    del tensors["bert.encoder.layer.1.output.dense.up.weight"]
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"The weights lack bert\.\S*up\.weight of a compressed layer"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_foreign_readme_in_another_encoding_stays(tiny_bert, tmp_path):
    model = tiny_bert()
    softlms.truncate(model, {target.name: 4 for target in find_targets(model)})
    foreign = "Modèle à moi".encode("latin-1")
    (tmp_path / "README.md").write_bytes(foreign)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == foreign
    assert softlms.ranks(AutoModelForSequenceClassification.from_pretrained(tmp_path)) == softlms.ranks(model)
