"""Rows that others published beside ours, and whether the two can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from softlms.experiments.grid import CUT_FROM
from softlms.workbook.claims import NOT_COMPARABLE

__all__ = ["COMPARABLE", "beside_public"]

COMPARABLE = "COMPARABLE"
# what must be equal, and the columns that say it, theirs and ours
SETTING = {
    "model": ("model", "encoder"),
    "budget": ("kept_linear", "kept_linear"),
    "length": ("max_length", "max_length"),
    "epochs": ("epochs", "epochs"),
}
FILLED = 0.01  # a budget counts as filled up to this much below it, as in our own grids


def beside_public(public: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Published scores beside ours, in %, right after the cut and after training; each line with a verdict.

    Ours are means over seeds on the same split and in the same metric, at the budget that is nearest to theirs.

    Parameters
    ----------
    public : DataFrame
        As ``results/public.csv``: columns task, split, metric, start (the dense model that they cut), method, beside
        (our method that stands next to it), model (its name on the hub), kept_linear, max_length (tokens), epochs
        (trained after the cut; 0: none) and value (0 to 1).
    rows : DataFrame
        See `softlms.experiments.grid.grid_rows`. A column that they lack is one of the differences.

    Returns
    -------
    DataFrame
        Columns task, metric, start, method, before, after, beside, ours_before, ours_after, verdict. The verdict is
        COMPARABLE if model, budget, length and epochs are equal, else "NOT COMPARABLE: " and what differs.
    """
    lines = []
    for key, published in public.groupby(["task", "metric", "start", "method", "beside"], sort=False):
        line: dict[str, Any] = dict(zip(["task", "metric", "start", "method", "beside"], key, strict=True))
        differences: list[str] = []
        for theirs in published.to_dict("records"):
            ours, when = _ours(rows, theirs), "after" if theirs["epochs"] else "before"
            line |= {when: 100 * theirs["value"], f"ours_{when}": 100 * ours["value"].mean()}
            differences += _differences(theirs, ours)
        line["verdict"] = f"{NOT_COMPARABLE}: {'; '.join(dict.fromkeys(differences))}" if differences else COMPARABLE
        lines.append(line)
    columns = ["task", "metric", "start", "method", "before", "after", "beside", "ours_before", "ours_after", "verdict"]
    return pd.DataFrame(lines, columns=columns)


def _ours(rows: pd.DataFrame, theirs: dict[str, Any]) -> pd.DataFrame:
    """Our rows of the same score; empty if there are none."""
    trained = rows["recovered"] & rows["method"].ne("dense")  # the dense model is never cut, nor trained after it
    chosen = trained == bool(theirs["epochs"])
    for there, here in (("task", "task"), ("split", "split"), ("metric", "metric"), ("beside", "method")):
        chosen &= rows[here] == theirs[there]
    ours = rows[chosen & ~rows["method"].str.contains(CUT_FROM)]
    distance = (ours["keep"] - theirs["kept_linear"]).abs()
    return ours[distance == distance.min()]


def _differences(theirs: dict[str, Any], ours: pd.DataFrame) -> Iterator[str]:
    if ours.empty:
        yield "not run"
        return
    for what, (there, here) in SETTING.items():
        if here not in ours:
            yield f"{what} not in our rows"
        elif not all(_equal(what, theirs[there], value) for value in ours[here]):
            yield f"{what} {_show(theirs[there])}, ours {', '.join(dict.fromkeys(map(_show, ours[here])))}"


def _equal(what: str, theirs: Any, ours: Any) -> bool:
    if what == "model":
        return str(ours).partition("@")[0] == f"hub: {theirs}"  # what is in a folder is not known by its name
    return bool(np.isclose(theirs, ours, rtol=0, atol=FILLED if what == "budget" else 0))


def _show(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
