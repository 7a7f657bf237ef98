"""Tables that follow from other tables: made again from their rows, and compared with what is committed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from softlms.comparison import summarize
from softlms.evaluation import paired_difference
from softlms.report import soft_verdicts
from softlms.tasks import TASKS

__all__ = ["check_derived"]

GRIDS = ("05_bert_table", "06_gpt2_table", "07_tinyllama_table", "08_mamba_table")
PAIRED = "04_static_vs_adaptive_rank"
DIGITS = {"rtol": 1e-3, "atol": 2e-4}  # six digits are stored; an interval is a difference of them


def check_derived(results: Path) -> list[str]:
    """Which of the summaries, verdicts and paired differences of a profile are not what the rows say; empty for none.

    Parameters
    ----------
    results : Path
        The folder of one profile, ``results/laptop``.
    """
    wrong = []
    for book in GRIDS:
        rows = pd.read_csv(results / f"{book}.csv")
        leading = {task: TASKS[task].metrics[0] if task in TASKS else "perplexity" for task in rows.task.unique()}
        for kind, made in (("summary", summarize(rows)), ("verdicts", soft_verdicts(rows, leading))):
            wrong += _compare(made, results / f"{book}_{kind}.csv")
    return wrong + _compare(_differences(results), results / f"{PAIRED}_differences.csv")


def _differences(results: Path) -> pd.DataFrame:
    """What notebook 04 makes of its rows."""
    rows = pd.read_csv(results / f"{PAIRED}.csv")
    made = []
    for (split, metric), group in rows.groupby(["split", "metric"]):
        values = 100 * group.pivot_table(index="seed", columns="method", values="value")
        for a, b in (("adaptive", "static"), ("adaptive", "dense")):
            mean, low, high = paired_difference(values[a], values[b])
            line = {"split": split, "metric": metric, "difference": f"{a} - {b}"}
            made.append(line | {"mean": mean, "low95": low, "high95": high, "seeds": len(values)})
    return pd.DataFrame(made)


def _compare(made: pd.DataFrame, path: Path) -> list[str]:
    if not path.is_file():
        return [f"{path.name} is missing: it follows from rows that are there"]
    stored = pd.read_csv(path)
    if len(made) != len(stored) or not set(made) <= set(stored):
        return [f"{path.name} has {len(stored)} rows, its own rows give {len(made)}: run its notebook again"]
    for column in made:
        was, now = stored[column], made[column].reset_index(drop=True)
        same = (
            np.isclose(was, now, equal_nan=True, **DIGITS)
            if pd.api.types.is_float_dtype(now)
            else (was == now).to_numpy()
        )
        if not same.all():
            i = int(np.argmin(same))
            return [f"{path.name}, row {i + 1}: {column} is {was[i]}, the rows it follows from give {now[i]}"]
    return []
