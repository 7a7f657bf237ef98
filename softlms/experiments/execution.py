"""What the notebooks about not running everything compare, and the tables that they compute from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from softlms.evaluation.metrics import METRICS, paired_difference
from softlms.experiments.companions import CUT, RECOVERY
from softlms.experiments.grid import GRIDS, Setting, leading_metric
from softlms.experiments.variants import Comparison, Variant
from softlms.methods.early_exit.rules import curve, hindsight_improvability, score_at

__all__ = ["DEPTHS", "EXITS", "EXPERTS", "at", "exit_curves", "expert_curves", "improvability"]

LAPTOP = RECOVERY["laptop"]
SMALL = {"keep": 0.5, "epochs": 1, "distillation": 0.9}
FEW = {"dense_epochs": 2}  # sst2's dense models are those of the tables
BASE = replace(
    LAPTOP,
    recipe=GRIDS["laptop"].recipe.changed(further_keeps=()),
    tasks={"mrpc": Setting(), "rte": Setting(), "sst2": Setting(FEW, train_rows=16000)},
    keeps=(1.0,),
)
LONG_SST2 = Setting(FEW | {"epochs": 0.75}, train_rows=16000)  # 750 steps
TRAINED = replace(BASE, recipe=BASE.recipe.changed(epochs=3), tasks={**BASE.tasks, "sst2": LONG_SST2})


def _sizes(laptop: Comparison, quick: Comparison) -> dict[str, Comparison]:
    """The same for all profiles: `quick` as given, on the embedded corpus; `paper` on BERT."""
    small, large = RECOVERY["quick"], RECOVERY["paper"]
    return {
        "quick": replace(quick, name="quick", data="embedded", tasks=small.tasks, seeds=small.seeds),
        "laptop": laptop,
        "paper": replace(laptop, name="paper", encoder=large.encoder, tasks=large.tasks, seeds=large.seeds),
    }


# the model itself is not trained
EXIT_VARIANTS = {
    "Zero Time Waste": Variant("ztw-exits"),
    "heads alone": Variant("sdn-exits"),
    "cascade without ensembles": Variant("cascade-exits"),
    "ensembles without cascade": Variant("ensemble-exits"),
    "Zero Time Waste, 50 % of the linears": Variant(f"{CUT}+ztw-exits", SMALL),
}


def _rate(method: str, **settings: float) -> dict[str, Any]:
    return {"settings": {method.split("+")[-1]: settings}}


ENSEMBLED = ("ztw-exits", "ensemble-exits", f"{CUT}+ztw-exits")
UNTRAINED: dict[str, Any] = {"epochs": 0, "distillation": 0.0}
EXITS = _sizes(
    replace(
        BASE,
        recipe=BASE.recipe.changed(**UNTRAINED),
        tasks={
            **BASE.tasks,
            # the authors' rates where they differ by task
            "rte": Setting(methods={name: _rate(name, ensemble_learning_rate=1e-3) for name in ENSEMBLED}),
            "sst2": Setting(FEW, {"sdn-exits": _rate("sdn-exits", exit_learning_rate=0.01)}, train_rows=16000),
        },
        variants=EXIT_VARIANTS,
        facts=("exits",),
    ),
    replace(
        BASE,
        recipe=RECOVERY["quick"].recipe.changed(**UNTRAINED),
        variants={name: EXIT_VARIANTS[name] for name in ("Zero Time Waste", "heads alone")},
        facts=("exits",),
    ),
)


def _depth(**settings: Any) -> Variant:
    return Variant("depth", {"settings": {"depth": settings}})


def _blocks(method: str, blocks: int) -> Variant:
    return Variant(method, {"settings": {method: {"blocks": blocks}}})


BETAS = (0.0, 1e-3, 1e-2, 1e-1)
DEPTH_VARIANTS = {
    **{f"learned, beta {beta:g}": _depth(beta=beta) for beta in BETAS},
    "learned, normalised": _depth(beta=1e-2, normaliser=1.0),
    **{f"first {blocks} blocks": _blocks("first-blocks", blocks) for blocks in range(1, 6)},
    **{f"{blocks} most needed blocks": _blocks("needed-blocks", blocks) for blocks in range(1, 6)},
    "learned, beta 0.01, then 50 % of the linears": Variant(f"depth+{CUT}", {"keep": 0.5}),
}
DEPTH_FACTS = ("blocks", "a", "uncut")
DEPTHS = _sizes(
    replace(TRAINED, variants=DEPTH_VARIANTS, facts=DEPTH_FACTS),
    replace(
        BASE,
        recipe=RECOVERY["quick"].recipe,
        variants={name: DEPTH_VARIANTS[name] for name in ("learned, beta 0", "learned, beta 0.1", "first 2 blocks")},
        facts=DEPTH_FACTS,
    ),
)


def _experts(method: str, chain: str = "sparse", **settings: Any) -> Variant:
    return Variant(f"{chain}+{method}" if chain else method, {"settings": {method: {"experts": 32, **settings}}})


EXPERT_VARIANTS = {
    "dynamic-k": _experts("experts"),
    "random experts": _experts("experts", split="random"),
    "top-k (MoEfication)": _experts("moefication"),
    "dynamic-k, not sparsified": _experts("experts", chain=""),
    "dynamic-k, 50 % of the linears": Variant(
        f"sparse+{CUT}+experts", {"keep": 0.5, "settings": {"experts": {"experts": 32}}}
    ),
}
EXPERTS = _sizes(
    replace(TRAINED, variants=EXPERT_VARIANTS, facts=("experts", "tokens")),
    replace(
        BASE,
        recipe=RECOVERY["quick"].recipe,
        variants={
            name: _experts(method, router_tokens=4000)
            for name, method in (("dynamic-k", "experts"), ("top-k (MoEfication)", "moefication"))
        },
        facts=("experts", "tokens"),
    ),
)


def exit_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores against the mean number of blocks, for every rule of leaving.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.variants.run_comparison`, with a column "exits".

    Returns
    -------
    DataFrame
        Columns task, keep, variant, rule, seed, split, depth, threshold, blocks, value (of the leading metric, 0 to 1).
        Confidence is asked of the ensembles where there are some; entropy and patience of heads alone.
    """
    lines = []
    for where, split, said, labels in _each(rows):
        score = METRICS[leading_metric(where["task"])]
        alone = where["variant"] == "heads alone"
        for rule in ("confidence", "entropy", "patience") if alone else ("confidence",):
            for point in curve(said, labels, rule, score):
                line = where | {"rule": rule, "split": split, "depth": said.shape[1], "value": point.pop("score")}
                lines.append(line | point)
    return pd.DataFrame(lines)


def improvability(rows: pd.DataFrame) -> pd.DataFrame:
    """Hindsight improvability of each run: task, keep, variant, seed, split, value (0 to 1)."""
    lines = [
        where | {"split": split, "value": hindsight_improvability(said, labels)}
        for where, split, said, labels in _each(rows)
    ]
    return pd.DataFrame(lines)


def _each(rows: pd.DataFrame) -> Any:
    """Each run's place, and for each split what was said (N, L, C) and the labels."""
    with_exits = rows[rows.exits.notna()].drop_duplicates(["task", "keep", "variant", "seed"])
    for row in with_exits.itertuples():
        where = {"task": row.task, "keep": row.keep, "variant": row.variant, "seed": row.seed}
        for split in ("dev", "test"):
            if split not in row.exits:
                continue
            found = row.exits[split]
            yield where, split, np.array(found["said"]), np.array(found["labels"])


def at(curves: pd.DataFrame, x: str, cost: float, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Scores at a cost, between the two nearest thresholds, and differences paired over seeds, in points.

    Parameters
    ----------
    curves : DataFrame
        Of `exit_curves` or `expert_curves`, with a column "family" in which pairs are named.
    x : str
        What it costs, a column: "blocks" or "flops".
    cost : float
    pairs : sequence of (str, str)
        Families; above zero, the first is better.

    Returns
    -------
    DataFrame
        Columns task, split, one, other, seeds, one_mean, other_mean, mean, low95, high95.
    """
    found = []
    for place, part in curves.groupby(["task", "split", "family", "seed"], sort=False):
        points = part[[x, "value"]].set_axis(["blocks", "score"], axis=1).to_dict("records")
        found.append([*place, 100 * score_at(points, cost)])
    every = pd.DataFrame(found, columns=["task", "split", "family", "seed", "value"])
    table = every.pivot_table(index=["task", "split", "seed"], columns="family", values="value", sort=False)
    lines = []
    for (task, split), part in table.groupby(level=["task", "split"], sort=False):
        for one, other in pairs:
            pair = part.reindex(columns=[one, other]).dropna()
            if len(pair) < 2:
                continue
            mean, low, high = paired_difference(pair[one], pair[other])
            line = {"task": task, "split": split, "one": one, "other": other, "seeds": len(pair)}
            line |= {"one_mean": pair[one].mean(), "other_mean": pair[other].mean()}
            lines.append(line | {"mean": mean, "low95": low, "high95": high})
    return pd.DataFrame(lines)


def expert_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores against the share of the feed-forwards' experts that ran, for every threshold.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.variants.run_comparison`, with a column "experts".

    Returns
    -------
    DataFrame
        Columns task, keep, variant, seed, split, threshold (tau, or top), share (of the experts, mean over tokens of
        dev and blocks), flops (as a share of dense feed-forwards', routers included), seconds (in the feed-forwards),
        all (the same with all experts), value (of the leading metric).
    """
    lines = []
    for row in rows[rows.experts.notna()].drop_duplicates(["task", "keep", "variant", "seed"]).itertuples():
        for point in row.experts:
            for split, scores in point["scores"].items():
                line = {"task": row.task, "keep": row.keep, "variant": row.variant, "seed": row.seed, "split": split}
                line |= {"threshold": point.get("tau", point.get("top"))}
                line |= {name: point[name] for name in ("share", "flops", "seconds", "all")}
                lines.append(line | {"value": scores[leading_metric(row.task)]})
    return pd.DataFrame(lines)
