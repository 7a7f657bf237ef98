import math
from types import SimpleNamespace

import pandas as pd
import pytest

from softlms.cli import main
from softlms.experiments.training_memory import training_memory


def test_states_are_counted_and_a_step_is_measured():
    dense, soft = (training_memory("bert-base", form, layers=1, tokens=8) for form in ("dense", "soft"))
    # of a square matrix two factors and sigma, of the others the smaller side squared as well; and alpha
    more = 4 * (768**2 + 768) + 2 * (768**2 + 768) + 6
    assert soft["parameters"] == dense["parameters"] + more
    assert dense["states_gb"] == 16 * dense["parameters"] / 1e9 < dense["peak_gb"]


def test_what_does_not_fit_is_not_tried(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        "softlms.experiments.training_memory.psutil.virtual_memory", lambda: SimpleNamespace(total=2**24)
    )
    out = tmp_path / "memory.csv"
    assert main(["training-memory", "gpt2", "--form", "soft", "--layers", "1", "--out", str(out)]) == 0
    assert "does not fit this machine" in capsys.readouterr().out
    assert math.isnan(pd.read_csv(out).peak_gb[0])


def test_wrong_input(capsys):
    with pytest.raises(ValueError, match="form must be one of 'dense', 'soft', 'deployed', got 'thin'"):
        training_memory("gpt2", "thin")
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        training_memory("gpt2", "dense", tokens=0)
