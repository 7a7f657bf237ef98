"""What a traced bench keeps: exits' words and times, experts' points and tokens; and the tables made of it."""

import numpy as np
import pandas as pd
import pytest

from softlms.experiments.execution import (
    DEPTHS,
    EXITS,
    EXPERTS,
    at,
    exit_curves,
    expert_curves,
    improvability,
)
from softlms.experiments.grid import Setting
from softlms.experiments.recipe import Recipe
from softlms.experiments.traces import QuickBench, TracedBench, traced
from softlms.experiments.variants import Comparison, Variant, run_comparison
from softlms.methods.chain import parse

RECIPE = Recipe(dense_epochs=1, epochs=0, distillation=0.0)


@pytest.fixture
def bench_of_traces(bench):
    return TracedBench(bench.encoder, bench.data, bench.folder, bench.max_length, note=lambda line: None)


def compare(bench, variants, facts):
    one = Comparison("tiny", "", "", RECIPE, {"docpairs": Setting()}, (1.0,), (0, 1), variants, facts)
    return run_comparison(one, {"docpairs": bench}, note=lambda line: None)


def test_its_dense_models_are_those_of_a_plain_bench(bench, bench_of_traces):
    dense = bench_of_traces.run("dense", RECIPE, 0)
    assert bench.stored("dense", RECIPE, 0) is not None and dense.model == bench.run("dense", RECIPE, 0).model
    assert bench_of_traces.folder_of("svd+uniform", RECIPE, 0) != bench.folder_of("svd+uniform", RECIPE, 0)


def test_exits_are_traced(bench_of_traces):
    variants = {"Zero Time Waste": Variant("ztw-exits"), "heads alone": Variant("sdn-exits")}
    rows = compare(bench_of_traces, variants, ("exits",))
    curves = exit_curves(rows)
    assert set(curves.rule) == {"confidence", "entropy", "patience"} and set(curves.depth) == {2}
    whole = rows[(rows.variant == "dense") & (rows.metric == "f1")].groupby(["seed", "split"]).value.first()
    for place, part in curves.groupby(["variant", "rule", "seed", "split"]):
        ordered = part.sort_values("blocks")
        assert ordered.blocks.iloc[0] == 1 and ordered.blocks.iloc[-1] == 2
        assert ordered.value.iloc[-1] == pytest.approx(whole[place[2], place[3]], abs=1e-6)
    better = improvability(rows)
    assert better.value.between(0, 1).all() and len(better) == 2 * 2 * len(set(rows.split))
    curves["family"] = curves.variant
    confident = curves[curves.rule == "confidence"]
    found = at(confident, "blocks", 2, [("Zero Time Waste", "heads alone")])
    assert (found["mean"].abs() < 1e-6).all()  # after all blocks both are the model itself
    times = rows.exits.dropna().iloc[0]["times"]
    assert {point["rows"] for point in times} == {1, 8} and all(point["seconds"] > 0 for point in times)
    assert all(1 <= point["blocks"] <= 2 for point in times)


def test_experts_are_traced(bench_of_traces):
    settings = {"experts": 8, "router_tokens": 200, "router_epochs": 1}
    variants = {
        "dynamic-k": Variant("experts", {"settings": {"experts": settings}}),
        "top-k": Variant("moefication", {"settings": {"moefication": settings}}),
    }
    rows = compare(bench_of_traces, variants, ("experts", "tokens"))
    curves = expert_curves(rows)
    whole = rows[(rows.variant == "dense") & (rows.metric == "f1")].groupby(["seed", "split"]).value.first()
    for (name, seed, split), part in curves.groupby(["variant", "seed", "split"]):
        assert part.share.is_monotonic_increasing and part.share.iloc[-1] == 1
        assert part.value.iloc[-1] == pytest.approx(whole[seed, split])
        assert list(part.threshold) == (list(TracedBench.taus) if name == "dynamic-k" else [1, 2, 3, 4, 5, 6, 7, 8])
        assert (part.seconds > 0).all() and (part["all"] > 0).all()
        assert part.flops.is_monotonic_increasing or name == "dynamic-k"  # its router runs unless all experts do
    tokens = pd.DataFrame(rows.tokens.dropna().iloc[0])
    assert tokens.row.nunique() == 8 and tokens.ran.between(1, 8).all()
    assert tokens[tokens.row == 0].token.iloc[0] == "[CLS]"


@pytest.mark.parametrize("comparisons", [EXITS, DEPTHS, EXPERTS])
def test_every_profile_has_methods_and_settings_that_exist(comparisons):
    assert comparisons.keys() == {"quick", "laptop", "paper"}
    for profile, one in comparisons.items():
        assert one.name == profile and one.keeps == (1.0,) and len(one.seeds) >= 2
        for variant in one.variants.values():
            one.recipe.changed(**variant.changes).chain(parse(variant.method))
        jobs = [job for unit in one.units(dict.fromkeys(one.tasks)) for name, job in unit if name in one.variants]
        if comparisons is EXITS:  # the model stays as it was
            assert {job.recipe.epochs for job in jobs if "+" not in job.method} == {0}
        else:
            assert all(job.recipe.epochs > 0 for job in jobs)
        rates = [job.recipe.settings.get("sdn-exits") for job in jobs if job.method == "sdn-exits"]
        assert profile != "laptop" or comparisons is not EXITS or rates.count({"exit_learning_rate": 0.01}) == 3


def test_a_score_between_two_points_is_paired_over_seeds():
    points = [(1.0, 0.5), (3.0, 0.7)]
    lines = [
        {"task": "a", "split": "dev", "family": family, "seed": seed, "depth": 3, "blocks": blocks}
        | {"value": value + gain + seed / 100}
        for family, gain in (("one", 0.1), ("other", 0.0))
        for seed in range(3)
        for blocks, value in points
    ]
    found = at(pd.DataFrame(lines), "blocks", 2, [("one", "other"), ("one", "absent")])
    assert len(found) == 1 and found["mean"].iloc[0] == pytest.approx(10)
    assert found.other_mean.iloc[0] == pytest.approx(61) and np.isclose(found.low95, found.high95).all()


def test_quick_traces_fewer_thresholds():
    assert traced("quick") is QuickBench and traced("laptop") is TracedBench
    assert {*QuickBench.taus} < {*TracedBench.taus} and QuickBench.taus[-1] == 1  # all experts are always there
