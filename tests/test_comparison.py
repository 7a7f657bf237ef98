from dataclasses import replace

import pandas as pd
import pytest
import torch

from softlms.data.encoders import find_encoder
from softlms.data.tasks import TASKS, load_task
from softlms.experiments.bench import Bench
from softlms.experiments.grid import (
    GRIDS,
    PARTS,
    Grid,
    Pass,
    Setting,
    costs,
    grid_rows,
    rank_rows,
    run_grid,
    summarize,
)
from softlms.experiments.profiles import PROFILES
from softlms.experiments.recipe import Recipe
from softlms.methods.chain import parse
from softlms.surgery import truncate

RECIPE = Recipe(
    dense_epochs=1, epochs=4, batch_size=8, learning_rate=1e-3, alpha_learning_rate=0.1, further_keeps=(0.3,),
    bf16=True, calibration_rows=16, distillation=0.5,
)  # fmt: skip
GRID = Grid(
    RECIPE,
    {"docpairs": Setting()},
    (0, 1),
    (
        Pass(("svd+uniform", "svd+soft"), (0.5,)),
        Pass(("svd+uniform", "whitened+greedy"), (0.5,), recover=False),
        Pass(("svd+uniform",), (0.3,)),
    ),
)


def test_a_methods_own_setting_at_a_task_comes_last(bench):
    setting = Setting({"gamma": 0.2, "s": 9.0}, methods={"svd+soft": {"gamma": 0.4}})
    changes = {"svd+soft": {"gamma": 0.3, "unit": "max"}}
    grid = Grid(RECIPE, {"docpairs": setting}, (0,), (Pass(("svd+uniform", "svd+soft"), (0.5,)),), changes)
    dense, uniform, soft = next(grid.units({"docpairs": bench}))
    assert {(job.recipe.gamma, job.recipe.s, job.recipe.unit) for job in (dense, uniform)} == {(0.2, 9.0, "mean")}
    assert (soft.recipe.gamma, soft.recipe.s, soft.recipe.unit) == (0.4, 9.0, "max")
    assert grid.describe().splitlines() == [
        str(RECIPE),
        "docpairs: gamma=0.2, s=9.0",
        "docpairs, svd+soft: gamma=0.4",
        "svd+soft: gamma=0.3, unit='max'",
    ]


def test_a_grid_is_done_in_order_and_only_once(bench):
    lines, grown = [], []
    cells = run_grid(GRID, {"docpairs": bench}, processes=1, note=lines.append, grown=grown.append)
    done = [
        (job.method, job.recipe.keep, bool(job.recipe.epochs), job.seed) for job, _ in cells if job.method != "dense"
    ]
    assert done == [
        (method, keep, recovered, seed)
        for methods, keep, recovered in (
            (("svd+uniform", "svd+soft"), 0.5, True),
            (("svd+uniform", "whitened+greedy"), 0.5, False),
            (("svd+uniform",), 0.3, True),
        )
        for seed in (0, 1)
        for method in methods
    ]
    assert sum(job.method == "dense" for job, _ in cells) == 2
    assert [len(part) for part in grown] == sorted(len(part) for part in grown) and len(grown[-1]) == len(cells)
    stored = {path: path.stat().st_mtime_ns for path in bench.folder.glob("*/result.json")}
    again = run_grid(GRID, {"docpairs": bench}, stored_only=True, note=lines.append)
    # a dense job for each budget and kind of cell, though it is one run
    assert lines[-1] == "16 of 16 runs are stored" and len(cells) == 12
    pd.testing.assert_frame_equal(grid_rows(again), grid_rows(cells))
    assert stored == {path: path.stat().st_mtime_ns for path in bench.folder.glob("*/result.json")}

    rows = grid_rows(cells)
    assert not rows.duplicated(["task", "method", "keep", "seed", "recovered", "split", "metric"]).any()
    soft = rows[rows.method == "svd+soft cut from 0.5"]
    assert set(soft.keep) == {0.3} and set(soft.split) == {"dev"}
    summary = summarize(rows)
    one = rows[(rows.method == "svd+soft") & rows.recovered & (rows.split == "test") & (rows.metric == "f1")]
    mean, std, count = summary[
        (summary.method == "svd+soft") & summary.recovered & (summary.split == "test") & (summary.metric == "f1")
    ][["mean", "std", "count"]].to_numpy()[0]
    assert count == 2 and mean == pytest.approx(100 * one.value.mean()) and std == pytest.approx(100 * one.value.std())
    ranks = rank_rows(cells)
    assert set(ranks.method) == {"svd+uniform", "svd+soft"} and len(ranks) == 6 * 12


def test_rows_stand_in_the_grids_order_whichever_run_ended_first(bench):
    grid = replace(GRID, passes=(Pass(("svd+uniform", "whitened+uniform"), (0.5,)),))
    run_grid(replace(grid, seeds=(1,)), {"docpairs": bench}, processes=1, note=lambda line: None)
    grown = []
    cells = run_grid(grid, {"docpairs": bench}, processes=1, note=lambda line: None, grown=grown.append)
    again = run_grid(grid, {"docpairs": bench}, stored_only=True, note=lambda line: None)
    for some in (cells, grown[-1], again):
        pd.testing.assert_frame_equal(rank_rows(some), rank_rows(cells))
        assert rank_rows(some).seed.tolist() == sorted(rank_rows(some).seed) and set(rank_rows(some).seed) == {0, 1}


def test_nothing_stored_is_said(bench):
    with pytest.raises(FileNotFoundError, match="run it with stored_only = False"):
        run_grid(GRID, {"docpairs": bench}, stored_only=True, note=lambda line: None)


def test_every_profile_has_a_grid_that_can_be_done():
    assert GRIDS.keys() == PROFILES.keys()
    for name, grid in GRIDS.items():
        assert grid.tasks.keys() <= TASKS.keys() and len(grid.seeds) >= 2
        if name != "quick":
            assert {"mrpc", "rte", "sst2"} <= grid.tasks.keys() and len(grid.seeds) >= 3
            assert {keep for part in grid.passes for keep in part.keeps} == {0.75, 0.5, 0.35}
        for part in grid.passes:
            assert all(parse(method) for method in part.methods)
        jobs = [job for unit in grid.units(dict.fromkeys(grid.tasks)) for job in unit]
        assert jobs[0].recipe.keep == 0.5 and jobs[0].method == "dense"
    first = next(iter(GRIDS["laptop"].tasks))
    assert first == "mrpc"


def test_costs_are_those_of_the_deployed_model(bench):
    ranks = dict.fromkeys(bench.targets(), 3)
    table = costs(bench, {"thin": ranks}, tokens=16, rounds=2).set_index("row")
    model = truncate(bench.encoder.for_task(bench.data.task), ranks)
    assert table.loc["dense", "flops_of_dense"] == table.loc["dense", "speedup"] == 1
    saved = sum(m * n - 3 * (m + n) for m, n in bench.targets().values())
    difference = 1e9 * (table.loc["dense", "gflops"] - table.loc["thin", "gflops"])
    assert difference == pytest.approx(2 * 8 * 16 * saved, rel=1e-6)
    assert sum(p.numel() for p in model.parameters()) > 0 and (table.ms > 0).all()
    assert torch.get_num_threads() >= 1


def test_cola_and_stsb_run_too(tiny_folder, tmp_path):
    """Where the data is given: single sentences, and a regression that is distilled by the mean squared error."""
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "STS-B").mkdir()
    for split in ("train", "dev"):
        sentences = [f"the model number {i} reads a sentence" for i in range(24)]
        (tmp_path / "CoLA" / f"{split}.tsv").write_text(
            "".join(f"x\t{i % 2}\t\t{s}\n" for i, s in enumerate(sentences)), "utf-8"
        )
        (tmp_path / "STS-B" / f"{split}.tsv").write_text(
            "index\tsentence1\tsentence2\tscore\n"
            + "".join(f"{i}\t{s}\t{sentences[i // 2]}\t{i % 6 * 0.9}\n" for i, s in enumerate(sentences)),
            "utf-8",
        )
    encoder = find_encoder(str(tiny_folder))
    benches = {
        name: Bench(encoder, load_task(name, tmp_path), tmp_path / "runs", 32, note=lambda line: None)
        for name in ("cola", "stsb")
    }
    grid = Grid(
        RECIPE.changed(epochs=8),
        dict.fromkeys(benches, Setting()),
        (0, 1),
        (Pass(("fwsvd+uniform", "whitened+soft"), (0.5,)),),
    )
    rows = grid_rows(run_grid(grid, benches, processes=1, note=lambda line: None))
    assert set(rows[rows.task == "cola"].metric) == {"matthews"}
    assert set(rows[rows.task == "stsb"].metric) == {"pearson", "spearman"}
    assert set(rows.method) == {"dense", "fwsvd+uniform", "whitened+soft", "whitened+soft cut from 0.5"}


def test_a_part_of_a_grid_has_only_its_methods():
    """Recovered; what the part leaves empty is gone, and the rest of the grid is as it was."""
    whole = GRIDS["laptop"]
    part = whole.part("recommended")
    for keep in (0.75, 0.5, 0.35):
        methods = {method for one in part.passes if keep in one.keeps for method in one.methods}
        assert methods == set(PARTS["recommended"])
    assert all(one.recover and one.methods for one in part.passes)
    assert (part.recipe, part.tasks, part.seeds) == (whole.recipe, whole.tasks, whole.seeds)
    with pytest.raises(ValueError, match=r"Unknown part 'best' of the grid; known: recommended\."):
        whole.part("best")
