import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_compress import contents
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
)

import softlms.methods.factors
import softlms.methods.soft
import softlms.subjects.classifier
from softlms.architectures import find_targets
from softlms.budget import Costs
from softlms.cli import main
from softlms.compress import NOTE, Compression, compress
from softlms.data.encoders import find_encoder
from softlms.data.tasks import encode, load_task
from softlms.evaluation.metrics import evaluate
from softlms.measure import TimePrice
from softlms.training import SoftTrainer
from softlms.utils.files import last_checkpoint


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    for split, number in (("train", 40), ("dev", 16)):
        rows = [
            f"{i}\tthe {'red' if i % 2 else 'blue'} house {i}\tit is red\t{'not_' * (i % 2)}entailment\n"
            for i in range(number)
        ]
        (folder / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(rows), "utf-8")
    return folder.parent


def settings(model, data, **changes):
    return Compression(
        **{"model": str(model), "task": "rte", "keep": 0.5, "data": str(data), "epochs": 4, "dense_epochs": 1}
        | {"alpha_learning_rate": 0.1, "learning_rate": 1e-3, "batch_size": 8, "calibration_rows": 16, "max_length": 32}
        | changes
    )


def save_bert(place, **changes):
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(**(config | changes))).save_pretrained(place)
    find_encoder("minilm").tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """Its head is of a task of three labels."""
    return save_bert(tmp_path_factory.mktemp("headless"), num_labels=3)


@contextlib.contextmanager
def stopped_at(step, monkeypatch):
    """SoftTrainer's training is interrupted at a step; gives the global steps that it does."""
    steps, train = [], SoftTrainer.training_step

    def training_step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == step:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SoftTrainer, "training_step", training_step)
        yield steps


def quiet():
    return Console(width=200, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: PTH123


@pytest.mark.parametrize(
    ("method", "factors"),
    [("soft", "svd"), ("soft", "whitened"), ("soft", "fwsvd"), ("soft", "kfac"), ("uniform", "svd")],
)
def test_the_command_leaves_a_model_that_scores_what_it_says(tiny_folder, data, tmp_path, capsys, method, factors):
    out = tmp_path / "small"
    options = {"model": tiny_folder, "task": "rte", "keep": 0.5, "data": data, "out": out, "factors": factors}
    options |= {} if method == "soft" else {"method": method}
    options |= {"epochs": 4, "dense-epochs": 1, "alpha-learning-rate": 0.1, "batch-size": 8, "max-length": 32}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["compress", *arguments, "--bf16"]) == 0
    printed = capsys.readouterr().out
    assert "compressed" in printed and re.search(r"ranks \d+ to \d+ over 12 layers", printed)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    notes = model.config.softlms
    assert 0.49 < notes["kept_linear"] <= 0.5 and (notes["method"], notes["factors"], notes["bf16"]) == (
        method,
        factors,
        True,
    )
    task = load_task("rte", data)
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = encode(task, tokenizer, 32)["dev"]
    scored = evaluate(model, task.task, rows, DataCollatorWithPadding(tokenizer))
    assert scored == notes["dev"]["compressed"]
    assert not (tmp_path / "small.partial").exists()


def test_an_interrupted_run_continues_to_the_same_files(headless, data, tmp_path, monkeypatch):
    """The head is of another task: a new one is trained first, on which the rest stands."""
    printed = Console(width=200, record=True, quiet=True)
    compress(settings(headless, data), tmp_path / "whole", console=quiet())
    with stopped_at(13, monkeypatch) as steps:
        with pytest.raises(KeyboardInterrupt):
            compress(settings(headless, data), tmp_path / "again", console=printed)
        assert not (tmp_path / "again").exists()
        work = tmp_path / "again.partial"
        with pytest.raises(FileExistsError, match=r"run with other settings \(seed 0, not 1\): give those, or remove"):
            compress(settings(headless, data, seed=1), tmp_path / "again", console=quiet())
        task = data / "RTE" / "train.tsv"
        rows = task.read_text("utf-8")
        task.write_text(rows.replace("red house 1\t", "red horse 1\t"), "utf-8")
        with pytest.raises(FileExistsError, match=r"run with other settings \(sentences\)"):
            compress(settings(headless, data), tmp_path / "again", console=quiet())
        task.write_text(rows, "utf-8")
        # a kill in the middle of the next checkpoint: weights without a state, or with a broken one
        half = work / "compressing" / "checkpoint-15"
        shutil.copytree(work / "compressing" / "checkpoint-10", half)
        (half / "model.safetensors").write_bytes(b"")
        (half / "trainer_state.json").write_text('{"global_step": 15, ', "utf-8")
        compress(settings(headless, data), tmp_path / "again", console=quiet())
    assert steps[13] == 10  # from the checkpoint of the second epoch on
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "glue", "whole"]


def test_the_newest_checkpoint_that_is_whole(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step, state in ((5, "{}"), (10, '{"epoch": 2}'), (15, ""), (20, '{"epoch": '), (25, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state, "utf-8")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.slow
def test_kills_at_any_moment_cost_nothing():
    """One of those that kill_compress makes many of."""
    script = Path(__file__).parent / "tools" / "kill_compress.py"
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "1"], capture_output=True, encoding="utf-8", env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok ") == 1


def test_a_run_killed_while_it_tidies_up_is_finished(tiny_folder, data, tmp_path):
    out, work, lock = tmp_path / "out", tmp_path / "out.partial", tmp_path / "out.partial.lock"

    def run(**changes):
        compress(settings(tiny_folder, data, **{"epochs": 1} | changes), out, console=quiet())

    run()
    whole = contents(out)
    for left in ("checkpoints", "note", "folder", "lock"):
        if left != "lock":
            work.mkdir()
        if left in ("checkpoints", "note"):
            (work / NOTE).touch()
        if left == "checkpoints":
            (work / "dense").mkdir()
            with pytest.raises(FileExistsError, match="out already contains something"):
                run(epochs=2)
        lock.touch()
        run()
        assert contents(out) == whole and sorted(path.name for path in tmp_path.iterdir()) == ["glue", "out"]
    with pytest.raises(FileExistsError, match="out already contains something"):  # nothing says that it was killed
        run()


def test_two_at_once_are_one_and_a_line(tiny_folder, data, tmp_path, monkeypatch, capsys):
    second, log = [], SoftTrainer.training_step

    def training_step(self, *args, **kwargs):
        if not second:
            options = {"model": tiny_folder, "task": "rte", "keep": 0.5, "data": data, "out": tmp_path / "out"}
            second.append(main(["compress", *(part for n, v in options.items() for part in (f"--{n}", str(v)))]))
        return log(self, *args, **kwargs)

    monkeypatch.setattr(SoftTrainer, "training_step", training_step)
    compress(settings(tiny_folder, data, epochs=1), tmp_path / "out", console=quiet())
    error = capsys.readouterr().err
    assert second == [2] and error.count("softlms compress: Another run is at work in ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["glue", "out"]


def test_what_a_run_left_that_never_trained_is_no_hindrance(tiny_folder, data, tmp_path):
    """Killed between the folder and the first checkpoint."""
    for note in ("", "{}", json.dumps(dataclasses.asdict(settings(tiny_folder, data, keep=0.9)))):
        work = tmp_path / "out.partial"
        (work / "compressing" / "checkpoint-5").mkdir(parents=True)
        (work / NOTE).write_text(note, "utf-8")
        compress(settings(tiny_folder, data, epochs=1), tmp_path / "out", console=quiet())
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.softlms["keep"] == 0.5
        assert not work.exists()
        shutil.rmtree(tmp_path / "out")


def test_flops_as_a_budget(tiny_folder, data, tmp_path):
    compress(settings(tiny_folder, data, count="flops", keep=0.6), tmp_path / "out", console=quiet())
    notes = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.softlms
    assert 0.59 < notes["kept_flops"] <= 0.6 and 0.5 < notes["kept_linear"] < 0.6
    with pytest.raises(ValueError, match=r"keep=0.01 of flops cannot be met: .* The smallest keep of flops is 0\.\d+"):
        compress(settings(tiny_folder, data, count="flops", keep=0.01), tmp_path / "no" / "out", console=quiet())
    assert not (tmp_path / "no").exists()


def test_time_as_a_budget_is_measured_once(tiny_folder, data, tmp_path, monkeypatch):
    """A resumed run has the prices that the first had; two products of a 32 x 32 layer are never faster here."""
    measured = []

    def measure(model, tokens):
        measured.append(tokens)
        targets = {t.name: t.shape for t in find_targets(model)}
        slow = {s: 1.0 if s == (32, 32) else 0.1 for s in targets.values()}
        prices = {n: TimePrice(*s, (1, 16), (slow[s], slow[s] + 0.3), 1.0 + 1 / 3) for n, s in targets.items()}
        return Costs("latency", targets, prices, 0.1 + 0.2)

    monkeypatch.setattr("softlms.compress.measure_latency", measure)
    chosen = settings(tiny_folder, data, count="latency", keep=0.7)
    compress(chosen, tmp_path / "whole", console=quiet())
    with stopped_at(13, monkeypatch), pytest.raises(KeyboardInterrupt):
        compress(chosen, tmp_path / "again", console=quiet())
    compress(chosen, tmp_path / "again", console=quiet())
    assert measured == [measured[0]] * 2 and contents(tmp_path / "again") == contents(tmp_path / "whole")
    notes = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").config.softlms
    assert 0.6 < notes["kept_latency"] <= 0.7


def test_all_before_the_training_happens_where_it_will_be(headless, data, tmp_path, monkeypatch):
    place, to, seen = torch.device("cpu"), PreTrainedModel.to, []
    monkeypatch.setattr("softlms.subjects.classifier.device", lambda: place)

    def move(model, *args):
        model.moved = getattr(model, "moved", False) or args[0] is place
        return to(model, *args)

    def watch(module, name, position):
        do = getattr(module, name)

        def step(*args, **kwargs):
            seen.append((name, getattr(args[position], "moved", False)))
            return do(*args, **kwargs)

        monkeypatch.setattr(module, name, step)

    monkeypatch.setattr(PreTrainedModel, "to", move)
    watch(softlms.subjects.classifier, "evaluate", 0)
    watch(softlms.subjects.classifier, "add_teacher_logits", 1)
    watch(softlms.methods.factors, "calibrate", 0)
    watch(softlms.methods.soft, "decompose", 0)
    compress(settings(headless, data, epochs=1), tmp_path / "out", console=quiet())
    steps = ["evaluate", "add_teacher_logits", "calibrate", "decompose", "evaluate"]
    assert seen == [(name, True) for name in steps]


def test_a_fine_tuned_model_is_taken_as_it_is(tiny_folder, data, tmp_path, monkeypatch):
    """The tiny folder has a head of two labels: nothing is fine-tuned, unless it is of another task."""
    monkeypatch.setattr("softlms.subjects.classifier.DistillingTrainer", None)
    monkeypatch.setattr("softlms.subjects.classifier.evaluate", lambda *_: {"accuracy": 0.49})
    compress(settings(tiny_folder, data), tmp_path / "out", console=quiet())
    monkeypatch.setattr("softlms.subjects.classifier.evaluate", lambda *_: {"accuracy": 0.1})
    with pytest.raises(ValueError, match=r"right on 10.0% of rte's dev rows, and the commonest answer .* 50.0%"):
        compress(settings(tiny_folder, data), tmp_path / "other", console=quiet())
    assert not list(tmp_path.glob("other*"))


def test_a_stranger_in_the_work_folder_is_left_alone(tiny_folder, data, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(FileExistsError, match="contains something else"):
        compress(settings(tiny_folder, data), tmp_path / "out", console=quiet())
    assert (tmp_path / "out.partial" / "mine").is_file()


def test_bad_input_is_one_line_and_leaves_nothing(tiny_folder, data, tmp_path, capsys):
    good = {"model": str(tiny_folder), "task": "rte", "keep": "0.5", "out": str(tmp_path / "out"), "data": str(data)}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    short = save_bert(tmp_path / "short", max_position_embeddings=4)
    few = save_bert(tmp_path / "few", vocab_size=500)
    bare = save_bert(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    broken = save_bert(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken off")
    before = sorted(tmp_path.rglob("*"))
    rates = ("learning-rate", "alpha-learning-rate", "dense-learning-rate")
    numbers = ("0", "-1", "nan", "inf", "1e30")
    for wrong, message in (
        ({"keep": "1.5"}, "got 1.5"),
        ({"keep": "0"}, "got 0.0"),
        ({"keep": "nan"}, "got nan"),
        ({"keep": "0.001"}, "one component per layer"),
        ({"keep": "0.001", "count": "flops"}, "smallest keep of flops"),
        ({"keep": "0.001", "count": "latency"}, "smallest keep of latency"),
        ({"task": "squad"}, "Unknown task 'squad'"),
        ({"factors": "pca"}, "Unknown factorization 'pca'"),
        ({"count": "all"}, "count must be one of"),
        ({"data": str(tmp_path / "nowhere")}, "does not exist"),
        ({"model": "./nowhere"}, "contains no model"),
        ({"model": str(bare)}, "bare' has no tokenizer: save the model's own there"),
        ({"model": str(short)}, "and the model reads 4: lower max_length"),
        ({"model": str(few)}, "the model has 500: use the model's tokenizer"),
        ({"model": str(broken)}, "cannot be read, fetch them again"),
        ({"out": str(tmp_path / "full")}, "already contains something"),
        ({"out": str(tmp_path / "full" / "file")}, "already contains something"),
        ({"out": str(tmp_path / "full" / "file" / "out")}, "there is a file where the folder should be"),
        ({"out": str(tmp_path / "new" / "folder" / "out"), "keep": "0.001"}, "one component per layer"),
        ({"out": "/"}, "is a mount point"),
        ({"distillation": "2"}, "distillation is a share"),
        ({"distillation": "nan"}, "distillation is a share"),
        ({"calibration-rows": "0"}, "calibration_rows must be at least 1"),
        ({"batch-size": "-1"}, "batch_size must be at least 1"),
        ({"max-length": "2"}, "max_length must be at least 5"),
        ({"seed": "-1"}, "seed must be a whole number from 0 to"),
        *(({name: value}, " must be positive and at most 1, got ") for name in rates for value in numbers),
        *(({"epochs": value}, "epochs must be positive and at most 10000, got ") for value in numbers),
        *(({"dense-epochs": value}, "dense_epochs must be positive and at most 10000, got ") for value in numbers),
    ):
        options = [part for name, value in (good | wrong).items() for part in (f"--{name}", value)]
        assert main(["compress", *options]) == 2, wrong
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("softlms")]
        assert len(error) == 1 and error[0].startswith("softlms compress: ") and message in error[0], (wrong, error)
        assert sorted(tmp_path.rglob("*")) == before, wrong


def test_training_that_diverges_is_one_line(headless, data, tmp_path, capsys):
    options = {"model": headless, "task": "rte", "keep": 0.5, "data": data, "out": tmp_path / "out"}
    with pytest.MonkeyPatch.context() as patch:
        spoil = lambda self, **options: self.model.classifier.weight.data.fill_(torch.nan)  # noqa: E731
        patch.setattr("softlms.subjects.classifier.DistillingTrainer.train", spoil)
        assert main(["compress", *(part for n, v in options.items() for part in (f"--{n}", str(v)))]) == 1
    assert "softlms compress: Fine-tuning diverged: lower dense_learning_rate.\n" in capsys.readouterr().err


def test_slow_thresholds_still_end_within_the_budget(tiny_folder, data, tmp_path):
    compress(settings(tiny_folder, data, alpha_learning_rate=1e-9), tmp_path / "out", console=quiet())
    notes = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.softlms
    assert 0.49 < notes["kept_linear"] <= 0.5


def test_settings_of_numpy_and_paths_are_plain(tmp_path):
    plain = Compression(str(tmp_path), task="mrpc", keep=0.5, seed=1, batch_size=8)
    given = Compression(tmp_path, task="mrpc", keep=np.float64(0.5), seed=np.int64(1), batch_size=8.0)
    assert given == plain and json.dumps(asdict(given)) == json.dumps(asdict(plain))
    with pytest.raises(ValueError, match="seed must be a whole number"):
        Compression("minilm", task="mrpc", keep=0.5, seed=0.5)
