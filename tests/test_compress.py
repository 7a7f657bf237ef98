import dataclasses
import re

import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from softlms.cli import COMPRESSION_OPTIONS, main
from softlms.compress import Compression, compress
from softlms.evaluation import evaluate
from softlms.tasks import encode, load_task
from softlms.training import SoftTrainer


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


def quiet():
    return Console(width=200, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: PTH123


@pytest.mark.parametrize("factors", ["svd", "whitened", "fwsvd"])
def test_the_command_leaves_a_model_that_scores_what_it_says(tiny_folder, data, tmp_path, capsys, factors):
    out = tmp_path / "small"
    options = {"model": tiny_folder, "task": "rte", "keep": 0.5, "data": data, "out": out, "factors": factors}
    options |= {"epochs": 4, "dense-epochs": 1, "alpha-learning-rate": 0.1, "batch-size": 8, "max-length": 32}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["compress", *arguments, "--bf16"]) == 0
    printed = capsys.readouterr().out
    assert "compressed" in printed and re.search(r"ranks \d+ to \d+ over 12 layers", printed)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    notes = model.config.softlms
    assert 0.49 < notes["kept_linear"] <= 0.5 and notes["factors"] == factors and notes["bf16"]
    task = load_task("rte", data)
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = encode(task, tokenizer, 32)["dev"]
    scored = evaluate(model, task.task, rows, DataCollatorWithPadding(tokenizer))
    assert scored == notes["dev"]["compressed"]
    assert not (tmp_path / "small.partial").exists()


def test_an_interrupted_run_continues_to_the_same_model(tiny_folder, data, tmp_path, monkeypatch):
    whole = compress(settings(tiny_folder, data), tmp_path / "whole", console=quiet())
    steps = []
    log = SoftTrainer.training_step

    def interrupted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 13:
            raise KeyboardInterrupt
        return log(self, *args, **kwargs)

    monkeypatch.setattr(SoftTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(settings(tiny_folder, data), tmp_path / "again", console=quiet())
    assert not (tmp_path / "again").exists()
    with pytest.raises(FileExistsError, match="run with other settings"):
        compress(settings(tiny_folder, data, seed=1), tmp_path / "again", console=quiet())
    again = compress(settings(tiny_folder, data), tmp_path / "again", console=quiet())
    assert steps[13] == 10  # from the checkpoint of the second epoch on
    assert all(a.equal(b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_fine_tuned_model_is_taken_as_it_is(tiny_folder, data, tmp_path, monkeypatch):
    """The tiny folder has a head of two labels: nothing is fine-tuned, unless it is of another task."""
    monkeypatch.setattr("softlms.compress.DistillingTrainer", None)
    monkeypatch.setattr("softlms.compress.evaluate", lambda *_: {"accuracy": 0.49})
    compress(settings(tiny_folder, data), tmp_path / "out", console=quiet())
    monkeypatch.setattr("softlms.compress.evaluate", lambda *_: {"accuracy": 0.1})
    with pytest.raises(ValueError, match=r"right on 10.0% of rte's dev rows, and the commonest answer .* 50.0%"):
        compress(settings(tiny_folder, data), tmp_path / "other", console=quiet())
    assert not list(tmp_path.glob("other*"))


def test_a_stranger_in_the_work_folder_is_left_alone(tiny_folder, data, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        compress(settings(tiny_folder, data), tmp_path / "out", console=quiet())
    assert (tmp_path / "out.partial" / "mine").is_file()


def test_bad_input_is_one_line_and_leaves_nothing(tiny_folder, data, tmp_path, capsys):
    good = {"model": str(tiny_folder), "task": "rte", "keep": "0.5", "out": str(tmp_path / "out"), "data": str(data)}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for wrong, message in (
        ({"keep": "1.5"}, "got 1.5"),
        ({"keep": "0.001"}, "one component a layer"),
        ({"task": "squad"}, "Unknown task 'squad'"),
        ({"factors": "pca"}, "Unknown factorization 'pca'"),
        ({"count": "all"}, "count must be one of"),
        ({"data": str(tmp_path / "nowhere")}, "does not exist"),
        ({"model": "./nowhere"}, "holds no model"),
        ({"out": str(tmp_path / "full")}, "holds something already"),
        ({"epochs": "0"}, "epochs must be positive"),
        ({"distillation": "2"}, "distillation is a share"),
        ({"calibration-rows": "0"}, "calibration_rows must be at least 1"),
    ):
        options = [part for name, value in (good | wrong).items() for part in (f"--{name}", value)]
        assert main(["compress", *options]) == 2, wrong
        error = capsys.readouterr().err
        assert message in error and error.startswith("softlms compress: ") and error.count("\n") == 1
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_slow_thresholds_still_end_within_the_budget(tiny_folder, data, tmp_path):
    compress(settings(tiny_folder, data, alpha_learning_rate=1e-9), tmp_path / "out", console=quiet())
    notes = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.softlms
    assert 0.49 < notes["kept_linear"] <= 0.5


def test_options_are_the_settings():
    fields = {field.name: field for field in dataclasses.fields(Compression)}
    assert {*COMPRESSION_OPTIONS, "model", "task", "keep", "bf16"} == fields.keys()
    for name, (kind, meaning) in COMPRESSION_OPTIONS.items():
        assert type(fields[name].default) is kind or kind is float
        if "(default" in meaning:
            stated = meaning.split("(default ")[1].rstrip(")") if "(default)" not in meaning else None
            assert stated is None or kind(stated) == fields[name].default
