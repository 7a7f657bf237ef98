"""The figures of notebooks 05 to 08, from a grid's rows and ranks."""

from __future__ import annotations

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from softlms.experiments.grid import CUT_FROM, UNSCALED, leading_metric, middle_budget, summarize
from softlms.layers import kept_parameters
from softlms.workbook.plots.style import PALETTE, as_formula, figure

__all__ = ["describe_budget", "draw_rank_bars", "plot_quality", "plot_ranks"]

# Okabe and Ito's palette
COLOURS = {"svd": "#D55E00", "fwsvd": "#E69F00", "asvd": "#CC79A7", "whitened": "#0072B2", "kfac": "#009E73"}
OTHERS = ("#56B4E9", "#F0E442", "#000000")
MARKERS = {
    "uniform": "v", "energy": "P", "greedy": "X", "sensitivity": "D", "cliff": "^", "cliff-gradient": "<",
    "cliff-energy": ">", "cliff-greedy": "d", "mask": "s", "soft": "o", "cliff-soft": "h",
}  # fmt: skip
LEARNED = ("soft", "cliff-soft")  # filled


def plot_quality(rows: pd.DataFrame) -> Figure:
    """Quality against size: a column for each task, untuned above, recovered below.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.grid.grid_rows`.
    """
    tasks = list(rows.task.unique())
    compressed = rows[(rows.method != "dense") & ~rows.method.str.contains(CUT_FROM) & (rows.keep < 1)]
    methods, keeps = list(compressed.method.unique()), sorted(compressed.keep.unique())
    summary, styles = summarize(rows), _styles(methods)
    fig, axes = figure(2, len(tasks), width=min(7.0, 2.2 + 2.4 * len(tasks)), height=4.6, squeeze=False)
    for column, task in enumerate(tasks):
        metric = leading_metric(task)
        of_task = summary[(summary.task == task) & (summary.metric == metric)]
        reported = "test" if "test" in set(of_task.split) else "dev"
        unit = "" if metric in UNSCALED else " (%)"
        for ax, recovered in zip(axes[:, column], (False, True), strict=True):
            split = reported if recovered else "dev"
            of_split = of_task[of_task.split == split]
            ax.axhline(of_split[of_split.method == "dense"]["mean"].iloc[0], color="black", lw=1)
            part = of_split[(of_split.recovered == recovered) & of_split.method.isin(methods)]
            for trained in part[part.keep == 1]["mean"] if recovered else ():
                ax.axhline(trained, color="black", lw=1, ls="--")
            part = part[part.keep < 1]
            _plot_methods(ax, part, keeps, styles)
            ax.set_xticks(range(len(keeps)), [f"{100 * keep:.0f}" for keep in keeps])
            ax.set_xlim(-0.5, len(keeps) - 0.5)
            for i in range(1, len(keeps)):  # methods stand side by side at one budget
                ax.axvline(i - 0.5, color="0.8", lw=0.6)
            if metric in UNSCALED and part["mean"].max() > 10 * part["mean"].min():
                ax.set_yscale("log")  # untuned perplexities may span orders of magnitude
            ax.grid(axis="x", visible=False)
            ax.set(
                title=f"{task}, {'after recovery' if recovered else 'untuned'}",
                xlabel="weights of the linears kept (%)",
                ylabel=f"{split} {metric}{unit}",
            )
    trained = (rows.method != "dense") & (rows.keep == 1)
    columns = 6 if len(tasks) > 1 else 4
    fig.legend(handles=_legend(styles, trained=bool(trained.any())), loc="outside lower center", ncols=columns)
    fig.suptitle("Quality against size (mean, std over seeds)")
    return fig


def _pair(method: str) -> tuple[str, str] | None:
    """Factorization and allocation; None for any other method and for chains."""
    factorization, _, allocation = method.partition("+")
    return (factorization, allocation) if factorization in COLOURS and allocation in MARKERS else None


def _styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Pairs by their parts; each other method has a colour of its own, and a star."""
    styles: dict[str, dict[str, Any]] = {}
    for method in methods:
        if (pair := _pair(method)) is not None:
            colour = COLOURS[pair[0]]
            face = colour if pair[1] in LEARNED else "white"
            styles[method] = {"color": colour, "marker": MARKERS[pair[1]], "mfc": face}
        else:
            number = sum(style["marker"] == "*" for style in styles.values())
            styles[method] = {"color": OTHERS[number % len(OTHERS)], "marker": "*"}
    return styles


def _plot_methods(ax: Axes, part: pd.DataFrame, keeps: list[float], styles: dict[str, dict[str, Any]]) -> None:
    colours = list(COLOURS)
    methods = sorted(part.method.unique(), key=lambda m: (colours.index(p[0]) if (p := _pair(m)) else len(colours), m))
    for i, method in enumerate(methods):
        line = part[part.method == method].sort_values("keep")
        side = 0.7 * ((i + 0.5) / len(methods) - 0.5)
        ax.errorbar(
            [keeps.index(keep) + side for keep in line.keep], line["mean"], line["std"].fillna(0),
            ls="none", elinewidth=0.8, ms=4, **styles[method],  # a line would be read between budgets
        )  # fmt: skip


def _legend(styles: dict[str, dict[str, Any]], *, trained: bool) -> list[Line2D]:
    pairs = [pair for pair in map(_pair, styles) if pair]
    factorizations, allocations = ({pair[i] for pair in pairs} for i in (0, 1))
    handles = [Line2D([], [], color="black", label="dense")]
    handles += [Line2D([], [], color="black", ls="--", label="dense, trained as long")] if trained else []
    handles += [Line2D([], [], color=c, lw=4, label=f) for f, c in COLOURS.items() if f in factorizations]
    handles += [
        Line2D([], [], color="0.3", marker=m, ls="", mfc="0.3" if a in LEARNED else "white", label=a)
        for a, m in MARKERS.items()
        if a in allocations
    ]
    others = [method for method in styles if _pair(method) is None]
    return handles + [Line2D([], [], ls="", label=method, **styles[method]) for method in others]


def plot_ranks(ranks: pd.DataFrame) -> Figure:
    """Share of each layer's weights that is stored, at the middle budget on the first task, mean over seeds.

    Parameters
    ----------
    ranks : DataFrame
        Of `softlms.experiments.grid.rank_rows`.
    """
    part = middle_budget(ranks)
    shares = [kept_parameters(r.m, r.n, r.rank) / (r.m * r.n) for r in part.itertuples()]
    shown = part.assign(share=shares)
    symbols = list(shown.symbol.unique())
    methods = list(shown.method.unique())
    height = -(-len(methods) // 4)
    width = -(-len(methods) // height)
    fig, axes = figure(height, width, height=1.9 * height + 0.4, squeeze=False, sharey=True)
    for ax in axes.flat[len(methods) :]:
        ax.axis("off")
    for ax, method in zip(axes.flat, methods, strict=False):
        shares_of = shown[shown.method == method].pivot_table(index="symbol", columns="block", values="share")
        shares_of = shares_of.loc[symbols].rename(as_formula)
        sns.heatmap(shares_of, ax=ax, vmin=0, vmax=1, cmap="cividis", cbar=False, linewidths=0.3)
        ax.grid(visible=False)
        ax.set(title=method, xlabel="block", ylabel="")
        ax.tick_params(axis="y", rotation=0)
    fig.colorbar(axes[0, 0].collections[0], ax=axes, label="share of weights stored")
    budget, task = part.keep.iloc[0], part.task.iloc[0]
    fig.suptitle(f"Where {budget:.0%} of the linears' weights are spent, {task}, mean over seeds")
    return fig


def describe_budget(rows: pd.DataFrame, task: str, method: str, keep: float) -> str:
    """What a method scored at a budget: trained for it, and cut down to it from a larger one without training.

    Parameters
    ----------
    rows : DataFrame
        Of `softlms.experiments.grid.grid_rows`; only budgets that were run are known.
    """
    summary = summarize(rows[rows.recovered & (rows.task == task) & (rows.metric == leading_metric(task))])
    said = []
    for name, scores in summary[summary.keep == keep].groupby("method"):
        start, _, larger = str(name).partition(CUT_FROM)
        if start == method:
            how = f"cut from {float(larger):.0%} without training" if larger else f"trained for {keep:.0%}"
            said.append(f"{how}: {', '.join(map(_describe_score, scores.to_dict('records')))}")
    return "; ".join(said)


def _describe_score(score: dict[str, Any]) -> str:
    spread = "" if pd.isna(score["std"]) else f" ± {score['std']:.1f}"
    return f"{score['split']} {score['metric']} {score['mean']:.1f}{spread}"


def draw_rank_bars(ax: Axes, ranks: pd.DataFrame, task: str, method: str, keep: float) -> None:
    """Draw the rank of every layer at a budget, mean over seeds, before what it was at the largest and at full rank.

    Parameters
    ----------
    ranks : DataFrame
        Of `softlms.experiments.grid.rank_rows`.
    """
    chosen = ranks[(ranks.task == task) & (ranks.method == method)]
    by_layer = chosen.pivot_table(index=["block", "symbol", "m", "n"], columns="keep", values="rank", sort=False)
    layers = by_layer.sort_index(level="block", sort_remaining=False)
    places, largest = range(len(layers)), layers.columns.max()
    full = layers.index.to_frame()[["m", "n"]].min(axis=1)
    ax.bar(places, full, color="0.9", label="full rank")
    if largest > keep:
        ax.bar(places, layers[largest], color=PALETTE["linear"], label=f"falls between {largest:.0%} and {keep:.0%}")
    ax.bar(places, layers[keep], color=PALETTE["adaptive"], label=f"kept at {keep:.0%}")
    ax.set_xticks(places, [as_formula(symbol) for _, symbol, _, _ in layers.index], rotation=90)
    ax.set(xlabel="layer, from input to output", ylabel="rank", xlim=(-0.6, len(layers) - 0.4))
    ax.set_title(f"{task}, {method}: {keep:.0%} of the linears' weights, mean over {chosen.seed.nunique()} seeds")
    ax.grid(axis="x", visible=False)
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.1))
