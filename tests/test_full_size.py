import pandas as pd
import pytest
import torch
import transformers

from softlms import cli
from softlms.experiments.full_size import FULL_SIZE, compress_full_size
from softlms.experiments.language_models import FAMILIES, SmallModel
from softlms.experiments.latency import scan_times
from softlms.kernels.selective_scan import selective_scan

# parameters as the models' authors count them, tied heads once
PUBLISHED = {"bert-base": 109.5e6, "gpt2": 124.4e6, "tinyllama-1.1b": 1100e6, "mamba-130m": 129.1e6}


@pytest.mark.parametrize("model", FULL_SIZE)
def test_configurations_are_the_published_ones(model):
    name, config = FULL_SIZE[model]
    with torch.device("meta"):
        total = sum(p.numel() for p in getattr(transformers, name)(config()).parameters())
    assert total == pytest.approx(PUBLISHED[model], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_compressed_and_computes_the_same(tmp_path, family):
    config = SmallModel(family, hidden=64, layers=2, vocabulary=300).config
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    result = compress_full_size(str(tmp_path), keep=0.6, count="linear", threads=1, split=family == "gpt2")
    assert result["error"] < 1e-4 and 0.59 < result["kept_linear"] <= 0.6 < result["kept_total"] < 1
    assert result["parameters_total"] == sum(p.numel() for p in model.parameters())
    assert result["peak_gb"] > 0.05 and all(result[f"{step}_s"] > 0 for step in ("build", "decompose", "deploy"))


def test_command_and_its_csv(tmp_path, capsys):
    out = tmp_path / "sizes.csv"
    for _ in range(2):
        arguments = [
            "full-size",
            "mamba-130m",
            "--layers",
            "1",
            "--count",
            "linear",
            "--threads",
            "1",
            "--out",
            str(out),
        ]
        assert cli.main(arguments) == 0
    assert "mamba-130m, 1 blocks" in capsys.readouterr().out
    rows = pd.read_csv(out)
    assert len(rows) == 2 and (rows.blocks == 1).all() and (rows.error < 1e-4).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt2", "--layers", "13"], "layers must be 1 to 12, got 13"),
        (["gpt2", "--keep", "0.2"], "cannot be met"),
        (["/nowhere/model"], "/nowhere/model"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert cli.main(["full-size", *arguments]) == 2
    assert message in capsys.readouterr().err


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
