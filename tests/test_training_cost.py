import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from softlms.cli import main
from softlms.experiments.training_cost import scan_times, step_times, training_memory
from softlms.kernels.selective_scan import selective_scan


def test_every_form_is_timed_and_the_model_left_alone(tiny_bert):
    model = tiny_bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads = torch.get_num_threads()
    seconds = step_times(model, batch=2, tokens=8, rounds=3)
    assert list(seconds) == ["dense", "soft, full rank", "soft, at the budget"]
    assert all(len(taken) == 3 and min(taken) > 0 for taken in seconds.values())
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["batch", "tokens", "rounds", "threads"])
def test_wrong_numbers(tiny_bert, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        step_times(tiny_bert(), **{name: 0})


def test_command_prints_and_writes_a_table(tiny_bert, tmp_path, capsys):
    tiny_bert(vocab_size=300).save_pretrained(tmp_path / "bert")
    out = tmp_path / "new" / "steps.csv"
    options = ["--model", str(tmp_path / "bert"), "--rounds", "2", "--batch", "2", "--tokens", "8", "--out", str(out)]
    assert main(["benchmark", *options]) == 0
    assert "soft, at the budget" in capsys.readouterr().out
    header, dense, *others = out.read_text("utf-8").splitlines()
    assert header.startswith("form,median_ms") and dense.startswith("dense,") and len(others) == 2


@pytest.mark.parametrize("inference", [False, True])
def test_scans_take_turns(inference, monkeypatch):
    calls = []
    scan = lambda *args, **options: calls.append(args) or selective_scan(*args, **options)  # noqa: E731
    monkeypatch.setattr("softlms.kernels.selective_scan.selective_scan", scan)
    seconds = scan_times(hidden=64, layers=1, batch=2, tokens=32, rounds=2, threads=1, inference=inference)
    assert {"transformers' loop", "softlms"} <= seconds.keys() and all(len(taken) == 2 for taken in seconds.values())
    assert len(calls) == 4  # two calls that warm up, two that are measured, and none of the other forms'
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        scan_times(rounds=0)


def test_states_are_counted_and_a_step_is_measured():
    dense, soft = (training_memory("bert-base", form, layers=1, tokens=8) for form in ("dense", "soft"))
    # of a square matrix two factors and sigma, of the others the smaller side squared as well; and alpha
    more = 4 * (768**2 + 768) + 2 * (768**2 + 768) + 6
    assert soft["parameters"] == dense["parameters"] + more
    assert dense["states_gb"] == 16 * dense["parameters"] / 1e9 < dense["peak_gb"]


def test_what_does_not_fit_is_not_tried(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**24))
    out = tmp_path / "memory.csv"
    assert main(["training-memory", "gpt2", "--form", "soft", "--layers", "1", "--out", str(out)]) == 0
    assert "does not fit this machine" in capsys.readouterr().out
    assert math.isnan(pd.read_csv(out).peak_gb[0])


def test_wrong_input(capsys):
    with pytest.raises(ValueError, match="form must be one of 'dense', 'soft', 'deployed', got 'thin'"):
        training_memory("gpt2", "thin")
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        training_memory("gpt2", "dense", tokens=0)
