"""Interactive pictures for JupyterLab; `pictures` and `grid_pictures` draw the same without widgets."""

from __future__ import annotations

import io

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from softlms.thresholds import soft_threshold
from softlms.workbook.plots.grid_pictures import describe_budget, draw_rank_bars
from softlms.workbook.plots.pictures import describe_cut, describe_speed, draw_cut, draw_speed_bars
from softlms.workbook.plots.style import PALETTE, figure

__all__ = ["rank_explorer", "speed_explorer", "threshold_explorer"]


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
    text, picture = _display()

    def redraw(change: object = None) -> None:
        text.value = f"<b>{describe_cut(sigma, shape, alphas.value)}</b>"
        fig, (left, right) = figure(1, 2)
        draw_cut(left, sigma, shape, alphas.value, sharpness.value)
        grid = torch.linspace(0, float(sigma[0]), 400)
        right.plot(grid, soft_threshold(grid, alphas.value, sharpness.value), color=PALETTE["adaptive"])
        right.plot(grid, grid, color="0.6", linestyle=":")
        right.set(xlabel=r"$\sigma$", ylabel=r"$T(\sigma; \alpha, s)$")
        picture.value = _png(fig)

    alphas.observe(redraw, names="value")
    sharpness.observe(redraw, names="value")
    redraw()
    return widgets.VBox([alphas, sharpness, text, picture])


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
    tasks = widgets.Dropdown(options=list(ranks.task.unique()), description="task")
    chosen = widgets.Dropdown(options=methods, value=method, description="method")
    budget = widgets.SelectionSlider(options=_keeps(ranks), value=max(ranks.keep), description="kept")
    text, picture = _display()

    def redraw(change: object = None) -> None:
        run = ranks[(ranks.task == tasks.value) & (ranks.method == chosen.value)]
        if budget.value not in set(run.keep):
            text.value = f"{chosen.value} was not run at {budget.label} on {tasks.value}."
            picture.value = b""
            return
        text.value = f"<b>{describe_budget(rows, tasks.value, chosen.value, budget.value)}</b>"
        fig, ax = figure(height=2.8)
        draw_rank_bars(ax, ranks, tasks.value, chosen.value, budget.value)
        picture.value = _png(fig)

    for widget in (tasks, chosen, budget):
        widget.observe(redraw, names="value")
    redraw()
    return widgets.VBox([tasks, chosen, budget, text, picture])


def _keeps(ranks: pd.DataFrame) -> list[tuple[str, float]]:
    return [(f"{keep:.0%}", keep) for keep in sorted(ranks.keep.unique())]


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
    text, picture = _display()

    def redraw(change: object = None) -> None:
        case = {name: choice.value for name, choice in choices.items()}
        text.value = f"<b>{describe_speed(table, **case)}</b>"
        fig, ax = figure(height=2.8)
        draw_speed_bars(ax, table, **case)
        picture.value = _png(fig)

    for choice in choices.values():
        choice.observe(redraw, names="value")
    redraw()
    return widgets.VBox([*choices.values(), text, picture])


def _display() -> tuple[widgets.HTML, widgets.Image]:
    return widgets.HTML(), widgets.Image(format="png")  # no Output: batch runners without widget state fail on it


def _png(fig: Figure) -> bytes:
    png = io.BytesIO()
    fig.savefig(png, dpi=120)
    plt.close(fig)
    return png.getvalue()
