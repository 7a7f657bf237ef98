"""``softlms compress`` for causal language models."""

import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from kill_compress import contents
from test_compress import quiet, stopped_at
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, GPT2ForSequenceClassification

import softlms
from softlms.cli import main
from softlms.compress import Compression, compress
from softlms.evaluation.likelihood import Protocol, measure_perplexity
from softlms.experiments.language_models import SmallModel
from softlms.experiments.tokenized import train_tokenizer
from softlms.methods.chain import run
from softlms.subjects.language_model import LanguageModel, _passes
from softlms.surgery import deploy

OPTIONS = {
    "keep": 0.6, "epochs": 2, "learning_rate": 1e-3, "alpha_learning_rate": 0.1, "batch_size": 8, "max_length": 16,
    "calibration_rows": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wiki")
    colours = ["red", "blue", "green", "white", "black"]
    for i, (split, number) in enumerate((("train", 100), ("valid", 20), ("test", 15))):
        rng = np.random.default_rng(i)
        sentence = "The {} river runs to the {} sea, and the {} sea is wide.\n"
        lines = [sentence.format(*rng.choice(colours, 3)) for _ in range(number)]
        (folder / f"{split}.txt").write_text("".join(lines), "utf-8")
    return folder


def save(family, text, folder, **changes):
    """A random model of real singular values with a tokenizer, as a user would have it."""
    torch.manual_seed(0)
    config = SmallModel(family, hidden=64, layers=1, vocabulary=300).config
    for name, value in {"initializer_range": 0.1, "max_position_embeddings": 64, **changes}.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer((text / "train.txt").read_text("utf-8"), 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(text, tmp_path_factory):
    return save("llama", text, tmp_path_factory.mktemp("llama"))


def settings(model, text, **changes):
    return Compression(str(model), text=str(text), **OPTIONS | changes)


def command(**options):
    return main(["compress", *(part for n, v in options.items() for part in (f"--{n.replace('_', '-')}", str(v)))])


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
def test_the_command_leaves_a_model_that_predicts_as_it_says(text, tmp_path, capsys, family):
    model, out = save(family, text, tmp_path / "model"), tmp_path / "small"
    assert command(model=model, text=text, out=out, **OPTIONS) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "learning from the train text of folder: wiki0" in printed
    assert "validation perplexity" in printed and "windows of 16 tokens without overlap" in printed
    for row in (r"kept │ 5\d\.\d%", r"removed │ 4\d\.\d%", r"ranks \d+ to \d+ over \d+ layers"):
        assert re.search(row, printed), row
    loaded = AutoModelForCausalLM.from_pretrained(out)
    notes = loaded.config.softlms
    assert 0.59 < notes["kept_linear"] <= 0.6 and notes["learned_from"] == "train" and notes["max_length"] == 16
    assert not {"task", "data", "dense_epochs"} & notes.keys()
    assert 0.59 < softlms.count_parameters(loaded).kept("linear") <= 0.6
    ids = AutoTokenizer.from_pretrained(out)((text / "valid.txt").read_text("utf-8"))["input_ids"]
    protocol = Protocol(window=16)
    assert notes["protocol"] == f"validation perplexity: {protocol}"
    with softlms.fast_scan():
        for name, of in (("dense", AutoModelForCausalLM.from_pretrained(model)), ("compressed", loaded)):
            found = measure_perplexity(of, ids, protocol, batch_tokens=512).value
            assert found == pytest.approx(notes["validation"][name]["perplexity"], rel=1e-5)
    assert not (tmp_path / "small.partial").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "uniform"},
        {"method": "sensitivity", "epochs": 1},
        {"method": "cliff-soft"},
        {"method": "mask", "epochs": 6},
        {"distillation": 0},
    ],
)
def test_other_methods_and_no_teacher(llama, text, tmp_path, monkeypatch, changes):
    """The steps are those of the epochs, also if each is made of several passes and some are a search's."""
    outcomes = []
    monkeypatch.setattr("softlms.compress.run", lambda *args: outcomes.append(run(*args)) or outcomes[0])
    monkeypatch.setattr("softlms.subjects.language_model.PASS", 32)
    chosen = settings(llama, text, **changes)
    model = compress(chosen, tmp_path / "out", console=quiet())
    assert 0.58 < model.config.softlms["kept_linear"] <= 0.6
    assert outcomes[0]["steps"] == chosen.epochs * -(-len(LanguageModel(chosen).train) // 8)
    ids = torch.arange(20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_is_saved_is_what_was_trained(llama, text, tmp_path, monkeypatch):
    """Bit for bit, after bfloat16 training and accumulated passes."""
    trained = []

    def keep(model, *args, **options):
        trained.append(deploy(model, *args, **options))
        return model

    monkeypatch.setattr("softlms.methods.soft.deploy", keep)
    monkeypatch.setattr("softlms.subjects.language_model.PASS", 32)
    chosen = settings(llama, text, bf16=True, epochs=1)
    assert LanguageModel(chosen).arguments(tmp_path, 1e-3, 1).gradient_accumulation_steps == 4
    compress(chosen, tmp_path / "out", console=quiet())
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), torch.arange(20)[None]
    (model,) = trained
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(("batch", "length", "passes"), [(16, 256, (2, 8)), (9, 128, (3, 3)), (3, 2048, (1, 3))])
def test_a_step_is_made_of_passes_of_bounded_size(batch, length, passes):
    assert tuple(_passes(batch, length).values()) == passes


def test_an_interrupted_run_continues_to_the_same_files(llama, text, tmp_path, monkeypatch):
    """From the middle of an epoch, with the teacher in memory again."""
    places = {name: tmp_path / name for name in ("whole", "again")}
    compress(settings(llama, text), places["whole"], console=quiet())
    with stopped_at(11, monkeypatch) as steps:
        with pytest.raises(KeyboardInterrupt):
            compress(settings(llama, text), places["again"], console=quiet())
        with pytest.raises(FileExistsError, match=r"other settings \(train_tokens None, not 500\): give those"):
            compress(settings(llama, text, train_tokens=500), places["again"], console=quiet())
        other = tmp_path / "text"
        shutil.copytree(text, other)
        (other / "train.txt").write_text((text / "train.txt").read_text("utf-8").replace("sea", "lake"), "utf-8")
        with pytest.raises(FileExistsError, match=r"other settings \(text .*, words\)"):
            compress(settings(llama, other), places["again"], console=quiet())
        compress(settings(llama, text), places["again"], console=quiet())
    assert steps[10:12] == [10, 9]  # of 28, with a checkpoint after each third
    assert contents(places["again"]) == contents(places["whole"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "text", "whole"]


def test_a_copy_without_training_text_is_used_as_it_is(llama, text, tmp_path):
    for name in ("valid.txt", "test.txt"):
        shutil.copy(text / name, tmp_path / name)
    subject = LanguageModel(settings(llama, tmp_path, test_tokens=100, train_tokens=170))
    assert (subject.learned, subject.scored) == ("validation", "test")
    assert len(subject.train) == 10 and len(subject.ids) == 100
    assert subject.protocol.startswith("test perplexity: windows of 16 tokens")
    start = subject.tokenizer((text / "valid.txt").read_text("utf-8"))["input_ids"][:16]
    assert subject.train[0]["input_ids"].tolist() == start


def test_bad_input_is_one_line_and_leaves_nothing(llama, text, tmp_path, capsys):
    good = {"model": llama, "text": text, "keep": 0.5, "out": tmp_path / "out", "max_length": 16}
    (tmp_path / "empty").mkdir()
    for name, files in (("scored", ["valid"]), ("learned", ["train", "test"]), ("blank", ["train", "valid", "test"])):
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy(text / f"{file}.txt", tmp_path / name)
    (tmp_path / "blank" / "train.txt").write_text(" \n", "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=300, **small)).save_pretrained(tmp_path / "bert")
    config = SmallModel("gpt2", hidden=64, layers=1, vocabulary=300).config
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    headless = AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(vocab_size=300, num_key_value_heads=2, **small)
    )
    state = {name: values for name, values in headless.state_dict().items() if name != "lm_head.weight"}
    headless.save_pretrained(tmp_path / "headless", state_dict=state)
    save("llama", text, tmp_path / "few", vocab_size=200)
    save("llama", text, tmp_path / "short", max_position_embeddings=8)
    for name in ("bert", "classifier", "headless"):
        tokenizer.save_pretrained(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    for wrong, message in (
        ({"text": None}, "Give a task, for a classifier, or a text, for a language model; got neither."),
        ({"task": "rte"}, "got both."),
        ({"data": "glue"}, "data has no effect with a text: leave it out"),
        ({"dense_epochs": 2}, "dense_epochs has no effect with a text"),
        ({"text": None, "task": "rte", "train_tokens": 9}, "train_tokens has no effect with a task"),
        ({"text": tmp_path / "nowhere"}, "nowhere' does not exist"),
        ({"text": tmp_path / "empty"}, "has no file of the train split, such as train.txt"),
        ({"text": tmp_path / "scored"}, "has no file of the train split, such as train.txt"),
        ({"text": tmp_path / "learned"}, "has no file of the validation split, such as valid.txt"),
        ({"text": tmp_path / "blank"}, "train.txt contains no text"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"max_length": 10**6}, "The train text has "),
        ({"test_tokens": 15}, "The validation text has 15 tokens, fewer than a row of 16: lower max_length"),
        ({"train_tokens": 0}, "train_tokens must be at least 1"),
        ({"keep": 0.001}, "one component per layer"),
        ({"keep": 0.001, "count": "flops"}, "smallest keep of flops"),
        ({"model": tmp_path / "nowhere"}, "contains no model"),
        ({"model": tmp_path / "bert"}, "is a BertForMaskedLM, which has no head of a causal language model"),
        ({"model": tmp_path / "classifier"}, "is a GPT2ForSequenceClassification, which has no head"),
        ({"model": tmp_path / "headless"}, "lacks 1 weights of the model, lm_head.weight first"),
        ({"model": tmp_path / "few"}, "the model has 200: use the model's tokenizer"),
        ({"model": tmp_path / "short"}, "and the model reads 8: lower max_length"),
        ({"model": "minilm"}, "has no head of a causal language model"),
    ):
        chosen = {name: value for name, value in (good | wrong).items() if value is not None}
        assert command(**chosen) == 2, wrong
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("softlms")]
        assert len(error) == 1 and error[0].startswith("softlms compress: ") and message in error[0], (wrong, error)
        assert sorted(tmp_path.rglob("*")) == before, wrong


def test_mamba_on_a_cpu_without_numba(text, tmp_path, monkeypatch):
    model = save("mamba", text, tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("softlms.subjects.language_model.device", lambda: torch.device("cpu"))
    with pytest.raises(ValueError, match="with the package numba: pip install"):
        LanguageModel(settings(model, text)).dense()
