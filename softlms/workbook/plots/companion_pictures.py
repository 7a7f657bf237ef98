"""The figures of comparisons of named variants, from their rows."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from softlms.experiments.grid import UNSCALED, leading_metric
from softlms.workbook.plots.style import PAGE, figure

__all__ = ["plot_differences", "plot_embedding_distances", "plot_embeddings", "plot_recovery", "plot_stored"]

# Okabe and Ito's palette
RECOVERIES = {
    "LoRA-XS": {"color": "#0072B2", "marker": "o"},
    "LoRA-XS, random": {"color": "#56B4E9", "marker": "X", "ls": ""},
    "LoRA-XS, bottom": {"color": "#CC79A7", "marker": "v", "ls": ""},
    "LoRA": {"color": "#E69F00", "marker": "^"},
    "head alone": {"color": "#009E73", "marker": "D", "ls": ""},
    "all weights": {"color": "#000000", "marker": "s", "ls": ""},
}


def plot_recovery(rows: pd.DataFrame) -> Figure:
    """Scores after recovery against the numbers that were trained: a column for each task, a row for each budget.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.variants.run_comparison`, with a column "trained".
    """
    tasks, keeps = list(rows.task.unique()), sorted(rows[rows.keep < 1].keep.unique(), reverse=True)
    wide = len(tasks) > 1
    fig, axes = figure(
        len(keeps), len(tasks), width=PAGE if wide else 4.4, height=1.2 + 1.9 * len(keeps), squeeze=False
    )
    for i, keep in enumerate(keeps):
        for j, task in enumerate(tasks):
            part = rows[(rows.task == task) & (rows.metric == leading_metric(task))]
            split = "test" if "test" in set(part.split) else "dev"
            dense = 100 * part[(part.variant == "dense") & (part.split == split)].value.mean()
            at_keep = part[part.keep == keep]
            untuned = 100 * at_keep[~at_keep.recovered].value.mean()
            _plot_recoveries(axes[i, j], at_keep[at_keep.recovered & (at_keep.split == split)])
            axes[i, j].axhline(dense, color="black", lw=1)
            axes[i, j].axhline(untuned, color="0.5", lw=1, ls=":")
            axes[i, j].set(
                xscale="log",
                title=f"{task}, {100 * keep:.0f} % kept",
                xlabel="numbers trained",
                ylabel=f"{split} {leading_metric(task)} (%)",
            )
    handles: list[Any] = axes[0, 0].get_legend_handles_labels()[0]
    handles += axes[0, 0].plot([], [], color="black", lw=1, label="dense")
    handles += axes[0, 0].plot([], [], color="0.5", lw=1, ls=":", label="cut, untuned (dev)")
    fig.legend(handles=handles, loc="outside lower center", ncols=4 if wide else 3)
    fig.suptitle("Recovery against the numbers trained (mean, std over seeds)")
    return fig


def _plot_recoveries(ax: Any, rows: pd.DataFrame) -> None:
    for family, style in RECOVERIES.items():
        of_family = rows[rows.variant.map(_family) == family]
        if not of_family.empty:
            # the ranks of a seed's layers bound r: its numbers differ a little
            of = of_family.assign(score=100 * of_family.value).groupby("variant", sort=False)
            points = of.agg(x=("trained", "mean"), y=("score", "mean"), spread=("score", "std")).sort_values("x")
            ax.errorbar(points.x, points.y, points.spread, label=family, capsize=2, **style)


def _family(variant: str) -> str:
    name, *more = variant.split(", ")
    return f"{name}, {more[-1]}" if more and more[-1] in ("random", "bottom") else name.split(" on ")[0]


DODGE = 1.03
FITS = {
    "direction loss": {"color": "#0072B2", "marker": "o"},
    "SVD": {"color": "#D55E00", "marker": "v"},
    "SVD by frequency": {"color": "#009E73", "marker": "D"},
}
CODECS = {
    "shared decoder": {"color": "#0072B2", "marker": "o"},
    "SVD": {"color": "#D55E00", "marker": "v"},
    "whitened SVD": {"color": "#E69F00", "marker": "^"},
    "one SVD for all": {"color": "#CC79A7", "marker": "P"},
    "Kronecker": {"color": "#56B4E9", "marker": "X"},
    "pruned": {"color": "#000000", "marker": "s"},
    "few bits": {"color": "#009E73", "marker": "D"},
}


def plot_embedding_distances(rows: pd.DataFrame) -> Figure:
    """How far decoded embeddings are from the table: direction and distance, against how many times fewer numbers.

    Parameters
    ----------
    rows : DataFrame
        Columns model, variant, cosine, rmse.
    """
    models = list(rows.model.unique())
    fig, axes = figure(len(models), 2, width=5.4, height=0.8 + 1.8 * len(models), squeeze=False)
    for line, model in zip(axes, models, strict=True):
        part = rows[(rows.model == model) & rows.cosine.notna()]
        for ax, column, label in zip(line, ("cosine", "rmse"), ("mean 1 - cos", "RMSE of an entry"), strict=True):
            _lines(ax, part.assign(value=part[column]), FITS)
            ax.margins(y=0.1)
            ax.set(title=model, xlabel="times fewer numbers", ylabel=label, ylim=(0, None))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    fig.suptitle("Decoded embeddings: how far from the table")
    return fig


def plot_embeddings(rows: pd.DataFrame) -> Figure:
    """Scores against how many times fewer numbers the embeddings have: untuned above, recovered below.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.variants.run_comparison`.
    """
    return _plot_sizes(rows, FITS, "times fewer numbers", "Compressed embeddings (mean, std over seeds)")


def plot_stored(rows: pd.DataFrame) -> Figure:
    """Scores against how many times fewer bytes the linears have, without any training.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.variants.run_comparison`.
    """
    return _plot_sizes(rows, CODECS, "times fewer bytes than in float32", "Stored linears (mean, std over seeds)")


def _plot_sizes(rows: pd.DataFrame, styles: dict[str, dict[str, str]], xlabel: str, title: str) -> Figure:
    tasks = list(rows.task.unique())
    states = [state for state in (False, True) if state in set(rows[rows.variant != "dense"].recovered)]
    wide = len(tasks) > 1
    fig, axes = figure(
        len(states), len(tasks), width=7.0 if wide else 4.4, height=1.2 + 1.9 * len(states), squeeze=False
    )
    for line, recovered in zip(axes, states, strict=True):
        for ax, task in zip(line, tasks, strict=True):
            metric = leading_metric(task)
            part = rows[(rows.task == task) & (rows.metric == metric)]
            scale = 1 if metric in UNSCALED else 100
            # an untuned state that is recovered afterwards is scored on dev alone
            of_state = part[(part.recovered == recovered) & (part.variant != "dense")]
            split = "test" if "test" in set(of_state.split) else "dev"
            dense = scale * part[(part.variant == "dense") & (part.split == split)].value.mean()
            chosen = of_state[of_state.split == split]
            _lines(ax, chosen.assign(value=scale * chosen.value), styles)
            ax.axhline(dense, color="black", lw=1)
            if metric in UNSCALED:
                ax.set_yscale("log")
            state = "after recovery" if recovered else "untuned"
            ax.set(title=f"{task}, {state}", xlabel=xlabel, ylabel=f"{split} {metric}{' (%)' if scale > 1 else ''}")
    handles: list[Any] = axes[0, 0].get_legend_handles_labels()[0]
    handles += axes[0, 0].plot([], [], color="black", lw=1, label="dense")
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
    fig.suptitle(title)
    return fig


def _lines(ax: Any, rows: pd.DataFrame, styles: dict[str, dict[str, str]]) -> None:
    """A line for each family of variants "family, N times"."""
    parts = rows.variant.str.extract(r"^(?P<family>[^,]+), (?P<times>[\d.]+) times$")
    rows = rows.assign(family=parts.family, times=parts.times.astype(float)).dropna(subset=["times"])
    middle = (len(styles) - 1) / 2
    for number, (family, style) in enumerate(styles.items()):
        points = rows[rows.family == family].groupby("times").value.agg(["mean", "std"])
        if len(points):
            beside = points.index * DODGE ** (number - middle)  # else equal scores hide one another
            ax.errorbar(beside, points["mean"], points["std"], label=family, capsize=2, **style)
    ax.set_xscale("log")
    known = sorted(rows.times.unique())
    ax.set_xticks(known, [f"{times:g}" for times in known])
    ax.minorticks_off()


SPLITS = {"dev": {"color": "#E69F00", "marker": "o"}, "test": {"color": "#0072B2", "marker": "s"}}


def plot_differences(rows: pd.DataFrame) -> Figure:
    """How much better or worse variants are than one of them, paired over seeds: a column for each budget.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.variants.paired`, with a column "split"; "other" is one variant.
    """
    keeps, names = sorted(rows.keep.unique(), reverse=True), list(rows.one.unique())
    metric = leading_metric(rows.task.iloc[0])
    fig, axes = figure(1, len(keeps), width=PAGE, height=1.4 + 0.28 * len(names), squeeze=False, sharey=True)
    for ax, keep in zip(axes[0], keeps, strict=True):
        for number, (split, style) in enumerate(SPLITS.items()):
            part = rows[(rows.keep == keep) & (rows.split == split)]
            heights = [names.index(name) + 0.24 * (number - 0.5) for name in part.one]
            spread = [part["mean"] - part.low95, part.high95 - part["mean"]]
            ax.errorbar(part["mean"], heights, xerr=spread, label=split, capsize=2, ls="", **style)
        ax.axvline(0, color="black", lw=1)
        ax.set(title=f"{rows.task.iloc[0]}, {100 * keep:.0f} % kept", xlabel=f"difference in {metric} (points)")
        ax.set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.suptitle(f"Against “{rows.other.iloc[0]}” (mean and 95 % interval, paired over seeds)")
    return fig
