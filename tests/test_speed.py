"""What the timings compare and the rows that they give; the times themselves are for the command."""

import platform
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from softlms.architectures import find_targets
from softlms.cli import main
from softlms.experiments.full_size import find_full_size
from softlms.experiments.speed import compare_budgets, compare_speed, split_speed
from softlms.experiments.timing import summarize_times

FREED = """
from contextlib import suppress
from resource import RUSAGE_SELF, getrusage

import psutil
import torch

from softlms.kernels.allocator import keep_memory


def faults():
    before = getrusage(RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB, freed at once
    return getrusage(RUSAGE_SELF).ru_minflt - before


many = min(faults() for _ in range(3))  # a page at a time, or a huge one
with suppress(KeyError), keep_memory() as kept:
    for _ in range(16):  # an aligned tensor does not fit where the last one lay until glibc's seven cached scraps merge
        faults()
    assert kept and max(faults() for _ in range(3)) < many / 4
    held = psutil.Process().memory_info().rss
    raise KeyError
assert held - psutil.Process().memory_info().rss > 1 << 26
assert faults() > many / 2  # a later one may find the place that this one left
"""
RESULTS = Path(__file__).parents[1] / "results" / "laptop"


def test_times_are_summarized_against_the_first():
    times = summarize_times({"dense": [0.003, 0.001, 0.002, 0.006], "thin": [0.001]})
    assert times["dense"] == pytest.approx(
        {"median_ms": 2.5, "quartile1_ms": 1.25, "quartile3_ms": 5.25, "speed_up": 1}
    )
    assert times["thin"] == pytest.approx({"median_ms": 1, "quartile1_ms": 1, "quartile3_ms": 1, "speed_up": 2.5})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="without glibc nothing is kept")
def test_freed_memory_is_kept_inside_and_handed_back_afterwards():
    """In a process of its own: where a heap can grow depends on all that was allocated before."""
    subprocess.run([sys.executable, "-c", FREED], check=True)


@pytest.mark.parametrize("model", ["bert-base", "mamba-130m"])
def test_blocks_split_in_linear_layers_and_the_rest(model):
    table = split_speed(model, layers=2, rounds=1, tokens=8).set_index("form")
    with torch.device("meta"):
        dense = find_full_size(model, 2)[0](None)
    weights = sum(target.shape[0] * target.shape[1] for target in find_targets(dense))
    assert table.gflops_per_s["dense"] * table.linears_ms["dense"] * 1e6 == pytest.approx(2 * 8 * weights)
    assert (table.linears_ms > 0).all() and table.linears_flop_limit["dense"] == 1
    assert 2 < table.linears_flop_limit["uniform ranks"] < 5
    assert (table.linears_ms + table.rest_ms).to_numpy() == pytest.approx(table.blocks_ms.to_numpy())


@pytest.mark.parametrize("model", ["bert-base", "gpt2", "mamba-130m"])
def test_rows(model, tmp_path):
    table = compare_speed(model, layers=2, rounds=1, batches=(1,), tokens=8, results=RESULTS)
    assert len(table) == 3 * 3 and set(table.form) == {"dense", "uniform ranks", "trained ranks"}
    assert set(zip(table.part, table.phase, strict=True)) == {
        ("stack", "prefill"),
        ("model", "prefill"),
        ("model", "decode"),
    }
    dense = table[table.form == "dense"]
    assert (dense.speed_up == 1).all() and (dense.flop_limit == 1).all() and (table.median_ms > 0).all()
    thin = table[table.form != "dense"]
    stack, whole = (thin[(thin.part == part) & (thin.phase == "prefill")] for part in ("stack", "model"))
    assert (stack.flop_limit.to_numpy() > whole.flop_limit.to_numpy()).all() and (whole.flop_limit > 1).all()
    if model == "gpt2":  # reading the head's weights, 39 M beside 14 M in two blocks, is what one token waits for
        assert thin[thin.phase == "decode"].roofline_limit.max() < 1.5
    assert (thin.roofline_limit > 1).all() and (thin.parameters < dense.parameters.iloc[0]).all()


@pytest.mark.slow
def test_the_command_adds_rows_to_its_file(tmp_path, capsys):
    out = tmp_path / "new" / "speed.csv"
    arguments = ["benchmark-speed", "gpt2", "--layers", "1", "--rounds", "1", "--tokens", "2", "--out", str(out)]
    assert main(arguments) == main(arguments) == 0
    table = pd.read_csv(out)
    assert len(table) == 2 * 2 * 5 and set(table.model) == {"gpt2"} and table.hardware.str.contains("1 threads").all()
    assert main(["benchmark-speed", "gpt3"]) == 2
    assert "Unknown model 'gpt3'; known: bert-base, gpt2" in capsys.readouterr().err
    assert main(["benchmark-speed", "gpt2", "--tokens", "0"]) == 2
    assert "tokens must be at least 1, got 0" in capsys.readouterr().err
    assert main(["benchmark-speed", "gpt2", "--results", str(tmp_path)]) == 2
    assert "06_gpt2_table_ranks.csv is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_budgets_that_count_different_things():
    table = compare_budgets({"linear": 0.5, "flops": 0.6, "latency": 0.97}, tokens=32, rounds=3).set_index("budget")
    assert list(table.index) == ["50% of linear", "60% of flops", "97% of latency"]
    assert 0.49 < table.kept_linear["50% of linear"] <= 0.5 and 0.58 < table.kept_flops["60% of flops"] <= 0.6
    assert table.predicted_speed_up["97% of latency"] >= 1 / 0.97
    assert 1 > table.output_error["50% of linear"] > table.output_error["60% of flops"] > 0
