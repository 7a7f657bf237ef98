"""Tables that follow from other tables: made again from their rows, and compared with what is committed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from softlms.data.tasks import TASKS
from softlms.experiments.grid import summarize
from softlms.experiments.report import adaptive_differences, soft_verdicts

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
    rows = pd.read_csv(results / f"{PAIRED}.csv")
    return wrong + _compare(adaptive_differences(rows), results / f"{PAIRED}_differences.csv")


def _compare(made: pd.DataFrame, path: Path) -> list[str]:
    if not path.is_file():
        return [f"{path.name} is missing: it follows from rows that are there"]
    stored = pd.read_csv(path)
    if lacking := [column for column in made if column not in stored]:
        return [f"{path.name} has no column {lacking[0]}: run its notebook again"]
    if len(made) != len(stored):
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
