"""Comparisons of the companion notebooks: variants of one recipe, side by side on the same tasks and seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from softlms.evaluation.metrics import paired_difference
from softlms.experiments.bench import Bench
from softlms.experiments.grid import Setting, grid_rows
from softlms.experiments.jobs import Job, available_processes, run_jobs, tell_stored
from softlms.experiments.recipe import Recipe
from softlms.experiments.store import Run

__all__ = ["Comparison", "Variant", "paired", "run_comparison"]


@dataclass(frozen=True)
class Variant:
    """A chain of methods, and changes to the recipe; its name in tables is its key in `Comparison.variants`."""

    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One size of a comparison.

    Attributes
    ----------
    name : str
        Of the profile.
    encoder, data : str
        See `softlms.experiments.profiles.Profile`.
    recipe : Recipe
        What all variants share.
    tasks : mapping
        Setting of each task.
    keeps : tuple of float
    seeds : tuple of int
    variants : mapping
        By name.
    facts : tuple of str
        Entries of a run's result that rows have too.
    """

    name: str
    encoder: str
    data: str
    recipe: Recipe
    tasks: Mapping[str, Setting]
    keeps: tuple[float, ...]
    seeds: tuple[int, ...]
    variants: Mapping[str, Variant]
    facts: tuple[str, ...] = ()

    def units(self, benches: Mapping[str, Bench]) -> Iterator[list[tuple[str, Job]]]:
        """Named jobs that share a dense model and a budget; dense comes first."""
        for keep in self.keeps:
            for task, setting in self.tasks.items():
                recipe = self.recipe.changed(**setting.changes, keep=keep)
                for seed in self.seeds:
                    unit = [("dense", Job(benches[task], "dense", recipe, seed))]
                    for name, variant in self.variants.items():
                        own = recipe.changed(**{**variant.changes, **setting.methods.get(variant.method, {})})
                        unit.append((name, Job(benches[task], variant.method, own, seed)))
                    yield unit


def run_comparison(
    comparison: Comparison,
    benches: Mapping[str, Bench],
    *,
    stored_only: bool = False,
    note: Callable[[str], None] = print,
    grown: Callable[[pd.DataFrame], None] = lambda rows: None,
) -> pd.DataFrame:
    """Run what is missing, and return tidy rows: `softlms.experiments.grid.grid_rows`, with names.

    Parameters
    ----------
    comparison : Comparison
    benches : mapping
        The bench of each task.
    stored_only : bool
        Run nothing.
    note : callable
        Called with a line of progress.
    grown : callable
        Called with the rows so far after each run, to store them.

    Returns
    -------
    DataFrame
        A run has a row for each score, untuned and recovered; "variant" and `Comparison.facts` are columns too.

    Raises
    ------
    FileNotFoundError
        `stored_only`, and nothing is stored.
    """
    units = list(comparison.units(benches))
    named = {job: name for unit in units for name, job in unit}
    stored = {job: run for job in named if (run := job.bench.stored(job.method, job.recipe, job.seed))}
    for line in tell_stored(named):
        note(line)
    if stored_only and not stored:
        raise FileNotFoundError("No run of this comparison is stored here yet: run it with stored_only = False.")
    runs = dict(stored)
    missing = [] if stored_only else [[job for _, job in unit if job not in stored] for unit in units]
    total, started = sum(map(len, missing)), time.monotonic()
    processes = available_processes(max(bench.threads for bench in benches.values()))
    for done, (job, run) in enumerate(run_jobs([unit for unit in missing if unit], processes), 1):
        task, left = job.bench.data.task, (time.monotonic() - started) / done * (total - done)
        note(
            f"{done:>4} of {total}: {task.name}, keep {job.recipe.keep}, {named[job]}, seed {job.seed}: "
            f"dev {task.metrics[0]} {run.result['scores']['dev'][task.metrics[0]]:.3f}; about {left / 60:.0f} min left"
        )
        runs[job] = run
        grown(_rows(comparison, named, runs))
    return _rows(comparison, named, runs)


def _rows(comparison: Comparison, named: Mapping[Job, str], runs: Mapping[Job, Run]) -> pd.DataFrame:
    parts = []
    for job, name in named.items():
        if job in runs:
            part = grid_rows([(job, runs[job])]).assign(variant=name)
            for fact in comparison.facts:
                part[fact] = [runs[job].result.get(fact)] * len(part)  # it may be a list or a dict
            parts.append(part)
    rows = pd.concat([part.dropna(axis=1, how="all") for part in parts]).reindex(columns=[*parts[0]])
    keys = ["task", "keep", "variant", "recovered", "seed", "split", "metric"]
    return rows.drop_duplicates(keys).reset_index(drop=True)  # a dense model is that of every budget


def paired(rows: pd.DataFrame, one: str, other: str, columns: Sequence[str] = ("task", "keep")) -> pd.DataFrame:
    """Differences of two variants' recovered scores, paired over seeds, in points: mean and 95 % interval.

    Parameters
    ----------
    rows : DataFrame
        From `run_comparison`, of one split and one metric.
    one, other : str
        Variants; above zero, the first is better. Fewer than two pairs have no row.
    columns : sequence of str
        A row of the answer for each combination of their values.

    Returns
    -------
    DataFrame
        `columns`, "one", "other", "seeds", "mean", "low95", "high95".
    """
    index = [*columns, "seed"]
    table = rows[rows.recovered].pivot_table(index=index, columns="variant", values="value", sort=False)
    made = []
    pairs = table.reindex(columns=[one, other]).dropna().groupby(level=list(columns), sort=False)
    for place, part in pairs:
        if len(part) < 2:
            continue
        mean, low, high = (100 * value for value in paired_difference(part[one], part[other]))
        where = dict(zip(columns, place, strict=True))
        made.append(
            where | {"one": one, "other": other, "seeds": len(part), "mean": mean, "low95": low, "high95": high}
        )
    return pd.DataFrame(made)
