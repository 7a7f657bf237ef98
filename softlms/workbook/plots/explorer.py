"""Interactive pictures for JupyterLab; `pictures` and `grid_pictures` draw the same without widgets."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from softlms.thresholds import soft_threshold
from softlms.workbook.plots.execution_pictures import describe_point, draw_curve
from softlms.workbook.plots.grid_pictures import describe_budget, draw_rank_bars
from softlms.workbook.plots.pictures import describe_cut, describe_speed, draw_cut, draw_speed_bars
from softlms.workbook.plots.style import PALETTE, figure

__all__ = ["curve_explorer", "rank_explorer", "speed_explorer", "threshold_explorer"]


def threshold_explorer(sigma: Tensor, shape: tuple[int, int], *, alpha: float = 1.0, s: float = 50.0) -> widgets.VBox:
    """Sliders for alpha and s over a real spectrum: the cut, its gate, the rank and the parameters kept.

    Parameters
    ----------
    sigma : Tensor
        Singular values, shape (r,), in descending order.
    shape : tuple of int
        (m, n) of the layer.
    alpha, s : float
        Initial values of the sliders.
    """
    alphas = widgets.FloatSlider(alpha, min=0, max=round(float(sigma[0]), 2), step=0.01, description="alpha")
    sharpness = widgets.FloatLogSlider(s, base=10, min=-1, max=3, step=0.05, description="s")

    def draw(alpha: float, s: float) -> tuple[str, Figure]:
        fig, (left, right) = figure(1, 2)
        draw_cut(left, sigma, shape, alpha, s)
        grid = torch.linspace(0, float(sigma[0]), 400)
        right.plot(grid, soft_threshold(grid, alpha, s), color=PALETTE["adaptive"])
        right.plot(grid, grid, color="0.6", linestyle=":")
        right.set(xlabel=r"$\sigma$", ylabel=r"$T(\sigma; \alpha, s)$")
        return describe_cut(sigma, shape, alpha), fig

    return _explorer(draw, alpha=alphas, s=sharpness)


def rank_explorer(rows: pd.DataFrame, ranks: pd.DataFrame, *, method: str = "whitened+soft") -> widgets.VBox:
    """A slider over the budgets that were run: the ranks of all layers, and the score.

    Parameters
    ----------
    rows, ranks : DataFrame
        Of `softlms.experiments.grid.grid_rows` and `rank_rows`, as a grid's notebook writes them.
    method : str
        The method selected at first.

    Raises
    ------
    ValueError
        No ranks of that method.
    """
    methods = sorted(ranks.method.unique())
    if method not in methods:
        raise ValueError(f"There are no ranks of {method!r}; known: {', '.join(methods)}.")
    keeps = sorted(ranks.keep.unique())
    budgets = [(f"{keep:.0%}", keep) for keep in keeps]

    def draw(task: str, method: str, keep: float) -> tuple[str, Figure | None]:
        if keep not in set(ranks[(ranks.task == task) & (ranks.method == method)].keep):
            return f"{method} was not run at {keep:.0%} on {task}.", None
        fig, ax = figure(height=2.8)
        draw_rank_bars(ax, ranks, task, method, keep)
        return describe_budget(rows, task, method, keep), fig

    return _explorer(
        draw,
        task=widgets.Dropdown(options=list(ranks.task.unique()), description="task"),
        method=widgets.Dropdown(options=methods, value=method, description="method"),
        keep=widgets.SelectionSlider(options=budgets, value=keeps[-1], description="kept"),
    )


def speed_explorer(table: pd.DataFrame) -> widgets.VBox:
    """Menus for model, rows and threads: measured speed-up beside the limit set by FLOPs.

    Parameters
    ----------
    table : DataFrame
        Rows of `softlms.experiments.speed.compare_speed`.
    """
    choices = {
        name: widgets.Dropdown(options=list(dict.fromkeys(table[name])), description=said)
        for name, said in (("model", "model"), ("batch", "rows"), ("threads", "threads"))
    }

    def draw(**case: Any) -> tuple[str, Figure]:
        fig, ax = figure(height=2.8)
        draw_speed_bars(ax, table, **case)
        return describe_speed(table, **case), fig

    return _explorer(draw, **choices)


def curve_explorer(curves: pd.DataFrame, x: str) -> widgets.VBox:
    """A slider over a method's thresholds, from its first to its last: the score, and what it costs.

    Parameters
    ----------
    curves : DataFrame
        As notebooks 14 and 15 write them, with a column "family".
    x : str
        What it costs: "blocks", or "share".
    """

    def draw(task: str, family: str, place: float) -> tuple[str, Figure | None]:
        known = sorted(curves[(curves.task == task) & (curves.family == family)].threshold.unique())
        if not known:
            return f"{family} was not run on {task}.", None
        threshold = known[round(place * (len(known) - 1))]
        said = f"threshold {threshold:.6g}: {describe_point(curves, task, family, threshold, x)}"
        fig, ax = figure(height=2.8)
        draw_curve(ax, curves, task, family, threshold, x)
        return said, fig

    return _explorer(
        draw,
        task=widgets.Dropdown(options=list(curves.task.unique()), description="task"),
        family=widgets.Dropdown(options=list(curves.family.unique()), description="method"),
        place=widgets.FloatSlider(1.0, min=0, max=1, step=0.01, description="threshold", readout=False),
    )


def _explorer(draw: Callable[..., tuple[str, Figure | None]], **controls: widgets.Widget) -> widgets.VBox:
    """Widgets over a text and a picture, which `draw` makes from their values whenever one of these changes."""
    text, picture = widgets.HTML(), widgets.Image(format="png")  # no Output: batch runners without widget state fail

    def redraw(change: object = None) -> None:
        said, fig = draw(**{name: control.value for name, control in controls.items()})
        text.value = f"<b>{said}</b>" if fig else said
        png = io.BytesIO()
        if fig:
            fig.savefig(png, dpi=120)
            plt.close(fig)
        picture.value = png.getvalue()

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([*controls.values(), text, picture])
