"""Tables computed from scores: what notebooks 04 to 08 show, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import pandas as pd

from softlms.evaluation.metrics import paired_difference
from softlms.experiments.bench import Bench
from softlms.experiments.grid import CUT_FROM, UNSCALED, Cell, costs, grid_rows, middle_budget, rank_rows, summarize
from softlms.methods.chain import parse
from softlms.methods.soft import SoftConfig

__all__ = ["Report", "adaptive_differences", "soft_verdicts"]

VERDICT = (
    "task", "keep", "split", "soft", "soft_mean", "rival", "rival_mean", "seeds", "difference", "low95", "high95",
)  # fmt: skip


class Report:
    """The results of a grid.

    Parameters
    ----------
    cells : sequence of (Job, Run)
        From `softlms.experiments.grid.run_grid`.
    benches : mapping
        The bench of each task.
    seeds : sequence of int
        Seeds of the grid; an entry with fewer shows its number.

    Attributes
    ----------
    rows, ranks, summary : DataFrame
        See `softlms.experiments.grid.grid_rows`, `rank_rows` and `summarize`.
    leading : dict
        Each task's first metric.

    Raises
    ------
    ValueError
        A comparison mixes hardware, or a compressed model exceeds its budget or does not fill it.
    """

    def __init__(self, cells: Sequence[Cell], benches: Mapping[str, Bench], seeds: Sequence[int]) -> None:
        self.cells, self.benches, self.seeds = cells, benches, seeds
        self.rows, self.ranks = grid_rows(cells), rank_rows(cells)
        self.summary = summarize(self.rows)
        self.leading = {task: bench.data.task.metrics[0] for task, bench in benches.items()}
        self.compressed = _compressed(self.rows)
        self.methods = list(self.compressed.method.unique())
        if (mixed := self.rows.groupby("task").hardware.nunique()).gt(1).any():
            raise ValueError(f"Rows of {mixed.idxmax()} were made on {mixed.max()} kinds of hardware: run it on one.")
        kept = self.compressed[f"kept_{cells[0][0].recipe.count}"]
        aimed = self.compressed.method.map(_has_budget).astype(bool)
        missed = aimed & ~kept.between(self.compressed.keep - 0.01, self.compressed.keep)
        if missed.any():
            raise ValueError(f"Not filled to the budget: {self.compressed[missed].iloc[0].to_dict()}.")

    def table(self, split: str) -> pd.DataFrame | None:
        """Mean and standard deviation of every method on a split, untuned and recovered; None if it has no rows."""
        part = self.summary[(self.summary.split == split) & ~self.summary.method.str.contains(CUT_FROM)].copy()
        if part.empty:
            return None
        part["cell"] = part.apply(self._entry, axis=1)
        part["column"] = np.where(part.recovered, "recovered", "untuned")
        part["removed"] = _removed(part.keep)
        done = [job.method for job, _ in self.cells if job.method != "dense"]
        order = ["dense", *dict.fromkeys(done)]
        table = part.pivot_table(
            index=["task", "keep", "removed", "method"],
            columns=["metric", "column"],
            values="cell",
            aggfunc="first",
            sort=False,
        )
        places = {"task": list(self.benches).index, "keep": lambda keep: -keep, "removed": float, "method": order.index}
        table = table.sort_index(key=lambda index: index.map(places[index.name]))
        return table.sort_index(axis=1).fillna("")

    def _entry(self, row: pd.Series) -> str:
        # one dense model may serve all seeds
        seeds = f" ({row['count']})" if row["count"] < len(self.seeds) and row["method"] != "dense" else ""
        digits = 2 if row["metric"] in UNSCALED else 1
        spread = f" ± {row['std']:.{digits}f}" if row["count"] > 1 else ""
        return f"{row['mean']:.{digits}f}{spread}{seeds}"

    def verdicts(self) -> pd.DataFrame:
        """See `soft_verdicts`."""
        return soft_verdicts(self.rows, self.leading)

    def cut_further(self) -> pd.DataFrame:
        """Soft models cut to smaller budgets without training, beside models trained for that size; on dev."""
        of_dev = self.summary[(self.summary.split == "dev") & self.summary.recovered]
        further = of_dev[of_dev.method.str.contains(CUT_FROM)].copy()
        trained = {(r.task, r.keep, r.metric, r.method): self._entry(r) for _, r in of_dev.iterrows()}
        further["cut further"] = [self._entry(row) for _, row in further.iterrows()]
        further["trained for it"] = [
            trained.get((row.task, row.keep, row.metric, row.method.split(CUT_FROM)[0]), "not run")
            for _, row in further.iterrows()
        ]
        further["removed"] = _removed(further.keep)
        return further[["task", "metric", "method", "keep", "removed", "cut further", "trained for it"]]

    def costs(self, **options: int) -> pd.DataFrame:
        """FLOPs and time at the middle budget with the first seed's ranks; see `softlms.experiments.grid.costs`.

        Methods with equal ranks share one row, which names them all.
        """
        part = middle_budget(self.ranks)
        first = part[part.seed == part.seed.min()]
        kinds: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for method, ranks in first.groupby("method", sort=False):
            kinds.setdefault(tuple(zip(ranks.layer, ranks["rank"], strict=True)), []).append(str(method))
        profiles = {f"{', '.join(names)} at {first.keep.iloc[0]}": dict(ranks) for ranks, names in kinds.items()}
        return costs(next(iter(self.benches.values())), profiles, **options)

    def samples(self) -> pd.DataFrame:
        """Continuations of the same opening by each model of the first seed: dense, then every method and budget."""
        return pd.DataFrame(
            {"task": job.bench.data.task.name, "keep": 1.0 if job.method == "dense" else job.recipe.keep}
            | {"method": job.method, "sample": run.result["sample"]}
            for job, run in self.cells
            if (job.recipe.epochs or job.method == "dense") and job.seed == min(self.seeds)
        )


def soft_verdicts(rows: pd.DataFrame, leading: Mapping[str, str]) -> pd.DataFrame:
    """The better SoftLMs row against the best other row and, if different, against the best with uniform ranks.

    All are chosen on dev, among the methods run at all seeds. They are paired over seeds on test, or on dev if a task
    has no test rows.

    Parameters
    ----------
    rows : DataFrame
        See `softlms.experiments.grid.grid_rows`.
    leading : mapping
        Each task's first metric.

    Returns
    -------
    DataFrame
        Columns `VERDICT`. A difference above zero favours SoftLMs, even if lower values are better. The 95 % interval
        needs two seeds.
    """
    recovered = _compressed(rows)
    recovered = recovered[recovered.recovered]
    lines = []
    for (task, keep), of_task in recovered.groupby(["task", "keep"]):
        lower = leading[task] in UNSCALED
        of_metric = of_task[of_task.metric == leading[task]]
        order = _by_seed(of_metric, "dev").dropna(axis=1).mean().sort_values(ascending=lower).index
        learned = order.map(_is_soft).astype(bool)
        soft, others = order[learned], order[~learned]
        rivals = [*others[:1], *others[others.str.endswith("+uniform")][:1]] if len(soft) else []
        split = "test" if "test" in set(of_metric.split) else "dev"
        table = _by_seed(of_metric, split)
        for rival in dict.fromkeys(rivals):
            pair = table[[soft[0], rival]].dropna()
            larger, smaller = (rival, soft[0]) if lower else (soft[0], rival)
            line = {"task": task, "keep": keep, "split": split}
            line |= {"soft": soft[0], "soft_mean": table[soft[0]].mean()}
            line |= {"rival": rival, "rival_mean": table[rival].mean()}
            line |= {"seeds": len(pair), "difference": (pair[larger] - pair[smaller]).mean()}
            if len(pair) > 1:
                _, line["low95"], line["high95"] = paired_difference(pair[larger], pair[smaller])
            lines.append(line)
    return pd.DataFrame(lines, columns=VERDICT)


def adaptive_differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Adaptive ranks against static ones, and against the dense model: the comparison of notebook 04.

    Parameters
    ----------
    scores : DataFrame
        Columns method, seed, split, metric, value.

    Returns
    -------
    DataFrame
        One row for each split, metric and difference, in points (100 times the metric), paired over seeds, with its
        95 % interval.
    """
    lines = []
    for (split, metric), group in scores.groupby(["split", "metric"]):
        by_seed = 100 * group.pivot_table(index="seed", columns="method", values="value")
        for a, b in (("adaptive", "static"), ("adaptive", "dense")):
            mean, low, high = paired_difference(by_seed[a], by_seed[b])
            line = {"split": split, "metric": metric, "difference": f"{a} - {b}"}
            lines.append(line | {"mean": mean, "low95": low, "high95": high, "seeds": len(by_seed)})
    return pd.DataFrame(lines)


def _removed(keep: pd.Series) -> pd.Series:
    """Papers name one or the other, and 0.2 may be either: tables show both."""
    return (1 - keep).round(4)


def _has_budget(method: str) -> bool:
    """Whether the last method of a chain cuts to a budget."""
    return any(f.name == "keep" for f in fields(parse(method)[-1].method.config))


def _is_soft(method: str) -> bool:
    """Whether the last method of a chain learns its ranks by soft thresholds."""
    return issubclass(parse(method)[-1].method.config, SoftConfig)


def _compressed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of methods run at their own budget: neither dense nor cut from a larger model."""
    return rows[(rows.method != "dense") & ~rows.method.str.contains(CUT_FROM)]


def _by_seed(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """One metric's values on a split, in % except perplexity: a row for each seed, a column for each method."""
    values = rows[rows.split == split].pivot_table(index="seed", columns="method", values="value")
    return values if set(rows.metric) <= set(UNSCALED) else 100 * values
