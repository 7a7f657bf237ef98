"""The figures of the notebooks about not running everything: exits, experts and depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softlms.experiments.grid import leading_metric
from softlms.workbook.plots.style import PAGE, figure

__all__ = [
    "describe_point",
    "draw_curve",
    "plot_depth",
    "plot_exit_rows",
    "plot_exits",
    "plot_experts",
    "plot_token_experts",
]

# Okabe and Ito's palette
EXITS: dict[str, dict[str, Any]] = {
    "Zero Time Waste": {"color": "#0072B2", "ls": "-"},
    "heads alone": {"color": "#D55E00", "ls": "-"},
    "heads alone, entropy": {"color": "#E69F00", "ls": "--"},
    "heads alone, patience": {"color": "#009E73", "ls": ":", "marker": "s", "ms": 3},
    "cascade without ensembles": {"color": "#CC79A7", "ls": "-."},
    "ensembles without cascade": {"color": "#56B4E9", "ls": "-."},
    "Zero Time Waste, 50 % of the linears": {"color": "#000000", "ls": "--"},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "dynamic-k": {"color": "#0072B2", "marker": "o"},
    "random experts": {"color": "#E69F00", "marker": "X"},
    "top-k (MoEfication)": {"color": "#D55E00", "marker": "v"},
    "dynamic-k, not sparsified": {"color": "#009E73", "marker": "D"},
    "dynamic-k, 50 % of the linears": {"color": "#000000", "marker": "s"},
}
DEPTHS: dict[str, dict[str, Any]] = {
    "learned": {"color": "#0072B2", "marker": "o", "ls": ""},
    "learned, normalised": {"color": "#CC79A7", "marker": "X", "ls": ""},
    "first": {"color": "#D55E00", "marker": "v"},
    "most needed": {"color": "#009E73", "marker": "D"},
    "learned, 50 % of the linears": {"color": "#000000", "marker": "s", "ls": ""},
}


def plot_exits(rows: pd.DataFrame) -> Figure:
    """Score against the mean number of blocks that ran: a column for each task.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.execution.exit_curves`, with a column "family".
    """
    means = rows.groupby(["task", "split", "family", "threshold"], sort=False, as_index=False)
    return _columns(
        means[["blocks", "value"]].mean(),
        "blocks",
        EXITS,
        "blocks that ran, mean over rows",
        "Early exits: score against blocks (mean over seeds)",
    )


def plot_experts(rows: pd.DataFrame) -> Figure:
    """Score against the feed-forwards' FLOPs, routers included: a column for each task.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.execution.expert_curves`.
    """
    means = rows.assign(family=rows.variant).groupby(
        ["task", "split", "family", "threshold"], sort=False, as_index=False
    )
    return _columns(
        means[["flops", "value"]].mean().assign(flops=lambda part: 100 * part.flops),
        "flops",
        EXPERTS,
        "FLOPs of the feed-forwards (%)",
        "Experts: score against what ran (mean over seeds)",
    )


def plot_depth(rows: pd.DataFrame) -> Figure:
    """Score against the number of blocks: a column for each task.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.variants.run_comparison`, with a column "blocks".
    """
    leading = rows[rows.recovered & (rows.metric == rows.task.map(leading_metric)) & rows.blocks.notna()]
    leading = leading.assign(family=leading.variant.map(_depth_family), threshold=leading.variant)
    means = leading.groupby(["task", "split", "family", "threshold"], sort=False, as_index=False)
    fig = _columns(
        means[["blocks", "value"]].mean(),
        "blocks",
        DEPTHS,
        "blocks, mean over seeds",
        "Fewer blocks: score against depth (mean over seeds)",
    )
    whole = rows[(rows.variant == "dense") & (rows.metric == rows.task.map(leading_metric))]
    for ax, task in zip(fig.axes, rows.task.unique(), strict=False):
        of_task = whole[whole.task == task]
        ax.axhline(100 * of_task[of_task.split == of_task.split.max()].value.mean(), color="black", lw=1)
        ax.set_title(f"{task} (black: the whole model)")
    return fig


def _depth_family(variant: str) -> str:
    if variant.startswith("first"):
        return "first"
    if "50 %" in variant:
        return "learned, 50 % of the linears"
    return "most needed" if "most needed" in variant else variant if variant in DEPTHS else "learned"


def _columns(rows: pd.DataFrame, x: str, styles: Mapping[str, Mapping[str, Any]], xlabel: str, title: str) -> Figure:
    """A column for each task, on test where it has labels; a line for each family."""
    tasks = list(rows.task.unique())
    fig, axes = figure(1, len(tasks), width=PAGE if len(tasks) > 1 else 4.4, height=3.2, squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        part = rows[rows.task == task]
        split = part.split.max()  # test, or dev
        _lines(ax, part[part.split == split], x, styles)
        ax.set(title=task, xlabel=xlabel, ylabel=f"{split} {leading_metric(task)} (%)")
    handles = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    fig.suptitle(title)
    return fig


def _lines(ax: Axes, rows: pd.DataFrame, x: str, styles: Mapping[str, Mapping[str, Any]]) -> None:
    for family, style in styles.items():
        part = rows[rows.family == family].sort_values(x)
        if len(part):
            ax.plot(part[x], 100 * part.value, label=family, **style)


def draw_curve(ax: Axes, curves: pd.DataFrame, task: str, family: str, threshold: float, x: str) -> None:
    """One family's curve on a task, mean over seeds, with the point of a threshold; twin of `curve_explorer`.

    Parameters
    ----------
    ax : Axes
    curves : DataFrame
        With columns task, split, family, threshold, value and `x`.
    task, family : str
    threshold : float
    x : str
        What it costs: "blocks", or "share".
    """
    part, split = _means(curves, task, family, x)
    ax.plot(part[x], 100 * part.value, color="#0072B2")
    point = part[part.threshold == threshold]
    ax.plot(point[x], 100 * point.value, "o", color="#D55E00", ms=8)
    ax.set(xlabel=f"{x}, mean", ylabel=f"{split} {leading_metric(task)} (%)", title=f"{task}, {family}")


def describe_point(curves: pd.DataFrame, task: str, family: str, threshold: float, x: str) -> str:
    """The score at a threshold, and what it costs; see `draw_curve`."""
    part, split = _means(curves, task, family, x)
    point = part[part.threshold == threshold]
    score, whole = 100 * point.value.iloc[0], 100 * part.sort_values(x).value.iloc[-1]
    return (
        f"{split} {leading_metric(task)} {score:.1f} at {point[x].iloc[0]:.2f} {x} "
        f"({score - whole:+.1f} against everything run)"
    )


def _means(curves: pd.DataFrame, task: str, family: str, x: str) -> tuple[pd.DataFrame, str]:
    part = curves[(curves.task == task) & (curves.family == family)]
    split = part.split.max()  # test, or dev
    means = part[part.split == split].groupby("threshold", as_index=False)[[x, "value"]].mean()
    return means.sort_values(x), split


def plot_exit_rows(rows: pd.DataFrame) -> Figure:
    """Where rows left: a line for each, its text beside a bar of the blocks that ran.

    Parameters
    ----------
    rows : DataFrame
        Columns text, blocks, depth, threshold, right (whether the answer is).
    """
    fig, axes = figure(1, 1, width=PAGE, height=0.9 + 0.22 * len(rows))
    colours = ["#0072B2" if right else "#D55E00" for right in rows.right]
    axes.barh(range(len(rows)), rows.blocks, color=colours)
    axes.set_yticks(range(len(rows)), [_short(text) for text in rows.text], fontsize=6, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlabel="blocks that ran", xlim=(0, rows.depth.iloc[0]))
    for label, colour in (("right", "#0072B2"), ("wrong", "#D55E00")):
        axes.bar(0, 0, color=colour, label=label)
    fig.legend(loc="outside lower center", ncols=2)
    fig.suptitle(f"Where rows left, with a threshold of {rows.threshold.iloc[0]:g}")
    return fig


WIDE = 72  # of a line of tokens


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def plot_token_experts(rows: pd.DataFrame) -> Figure:
    """How many experts each token ran: a line of tokens for each row, darker where more.

    Parameters
    ----------
    rows : DataFrame
        Columns row, place, token, ran (experts, mean over blocks), experts (in a block).
    """
    numbers = list(rows.row.unique())
    fig, ax = figure(1, 1, width=PAGE, height=0.8 + 0.35 * len(numbers))
    shades = colormaps["cividis"]
    most, least = rows.ran.max(), rows.ran.min()
    for line, number in enumerate(numbers):
        x = 0.0
        for token in rows[rows.row == number].fillna({"token": "nan"}).itertuples():  # CSV reads such a word as none
            wide = 0.55 * len(token.token) + 0.5
            if x + wide > WIDE:
                break
            shade = (token.ran - least) / max(1e-9, most - least)
            ax.add_patch(_box(x, line, wide, shades(shade)))
            colour = "white" if shade < 0.6 else "black"
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6, "parse_math": False}
            ax.text(x + wide / 2, line + 0.4, token.token, color=colour, **style)
            x += wide
    ax.set(xlim=(0, WIDE), ylim=(len(numbers), 0), xticks=[], yticks=[])
    ax.grid(visible=False)
    scale = fig.colorbar(_scale(shades, least, most), ax=ax, location="bottom", shrink=0.5, pad=0.02)
    scale.set_label(f"experts that ran, of {rows.experts.iloc[0]} (mean over blocks)")
    fig.suptitle("How much of the feed-forward each token runs")
    return fig


def _box(x: float, line: int, wide: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, line), wide, 0.8, color=colour, lw=0)


def _scale(shades: Any, least: float, most: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(least, most), shades)
