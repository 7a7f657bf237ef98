"""Saved and loaded by transformers itself: the same logits to the last bit, or a refusal."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import softlms
from softlms.architectures import find_targets
from softlms.budget import count_parameters
from softlms.checkpoint import verify
from softlms.factorization import factorize_weight
from softlms.language_models import SmallModel
from softlms.layers import SoftLinear
from softlms.masks import MaskedLinear

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
    assert not again.is_quantized and not hasattr(again.config, "quantization_config")


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


def test_damaged_folders_are_refused_or_bit_equal(tiny_bert, tmp_path):
    """200 folders, each with bytes flipped or a file cut short."""
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
            assert torch.equal(logits(again), expected)
    assert refused > 150


def test_messages_of_refusals(tiny_bert, tmp_path):
    model = softlms.deploy(soft(tiny_bert()))
    model.save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    config = tmp_path / "config.json"
    good = config.read_text("utf-8")
    config.write_text(good.replace("1e-12", "1e-11"), "utf-8")
    with pytest.raises(ValueError, match=r"config.json is not the one that was saved.*damaged, or was edited"):
        load(tmp_path)
    config.write_text(good.replace('"format": 1', '"format": 2'), "utf-8")
    with pytest.raises(ValueError, match="softlms format 2, this softlms knows 1: update"):
        load(tmp_path)
    config.write_text(good, "utf-8")
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        load(tmp_path)
    # a dense model's weights under a compressed model's configuration
    tiny_bert().save_pretrained(tmp_path / "dense")
    shutil.copy(tmp_path / "dense" / "model.safetensors", weights)
    with pytest.raises(ValueError, match="no whole softlms description"):
        load(tmp_path)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(FileExistsError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"A LlamaForCausalLM has none of the saved layers, such as bert\.encoder"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="state_dict alone does not say"):
        type(model).from_pretrained(None, config=AutoConfig.from_pretrained(tmp_path / "again"), state_dict={})


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
    with pytest.raises(ValueError, match=r"load the state_dict into it first"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict(), push_to_hub=True)
    model.bert.pooler.to("meta")
    with pytest.raises(ValueError, match=r"is offloaded: load it without device_map"):
        model.save_pretrained(tmp_path)
    model.is_remote_code = lambda: True
    with pytest.raises(ValueError, match=r"code of their own .* cannot be saved compressed yet"):
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
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")


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


def test_a_dense_model_with_a_compressed_ones_configuration_is_dense(tiny_bert, tmp_path):
    softlms.deploy(soft(tiny_bert())).save_pretrained(tmp_path / "thin")
    config = AutoConfig.from_pretrained(tmp_path / "thin")
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "dense")
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense"), model)


def test_card_of_learned_masks(tiny_bert, tmp_path):
    model = tiny_bert()
    for target in find_targets(model):
        factors = factorize_weight(target.module.weight)
        model.set_submodule(target.name, MaskedLinear(factors, target.module.bias))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "Layers by form: 12 masked." in card and "low-rank ones" not in card and "## Ranks" not in card
