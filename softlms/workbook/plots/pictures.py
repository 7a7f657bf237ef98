"""The figures of notebooks 00 to 04 and 09: each from the tables that the notebook wrote, or from formulas alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from softlms.data.tasks import TASKS
from softlms.layers import kept_parameters
from softlms.losses import COMPRESSION_LOSSES
from softlms.thresholds import hard_threshold, shifted_tanh, soft_threshold
from softlms.workbook.plots.style import MARKERS, PALETTE, as_formula, figure

__all__ = [
    "SHOWN_ALPHA",
    "describe_cut",
    "describe_speed",
    "draw_cut",
    "draw_speed_bars",
    "plot_block_sensitivity",
    "plot_compressing",
    "plot_compression_losses",
    "plot_learned_ranks",
    "plot_quickstart",
    "plot_spectra",
    "plot_speed",
    "plot_static_and_adaptive",
    "plot_threshold_functions",
    "plot_threshold_gradients",
]

SHOWN_ALPHA = 1.5  # where notebook 01 cuts its two layers

NAMES = {"f1": "F1"}
SHARPNESS = {2: (":", PALETTE["other"]), 5: ("--", PALETTE["linear"]), 50: ("-", PALETTE["adaptive"])}
LINES = {"linear": "--", "adaptive": "-"}
SPEED_CASES = {
    ("stack", "prefill", 1): "blocks, 1 row",
    ("stack", "prefill", 8): "blocks, 8 rows",
    ("model", "prefill", 1): "whole model, 1 row",
    ("model", "decode", 1): "one token more",
}


def plot_quickstart(history: pd.DataFrame, ranks: pd.DataFrame) -> Figure:
    """How the budget is met (columns step, kept_linear, frozen_at), and what each layer keeps (rank, full_rank)."""
    fig, (left, right) = figure(1, 2)
    left.plot(history.step, 100 * history.kept_linear, color=PALETTE["adaptive"])
    left.axvline(history.frozen_at.iloc[0], color="0.5", ls=":", label="thresholds frozen")
    left.set(
        xlabel="step", ylabel="weights of the linears kept (%)", ylim=(0, 105), title="the budget is met, then kept"
    )
    left.legend()
    right.bar(range(len(ranks)), 100 * ranks["rank"] / ranks.full_rank, color=PALETTE["adaptive"])
    right.set(xlabel="layer, from input to output", ylabel="components kept (%)", title="each layer has its own rank")
    return fig


def plot_threshold_functions() -> Figure:
    """The three threshold functions, at alpha = 1 (Fig. 4 of the paper)."""
    sigma, alpha = _sigma(), 1.0
    fig, axes = figure(1, 3, height=2.5)
    axes[0].plot(sigma, hard_threshold(sigma, alpha), color=PALETTE["dense"])
    axes[0].set_title("(a) hard: cuts, but cannot be learned")
    for s, (line, colour) in SHARPNESS.items():
        axes[1].plot(sigma, shifted_tanh(sigma, alpha, s), line, color=colour, label=f"s = {s}")
        axes[2].plot(sigma, soft_threshold(sigma, alpha, s), line, color=colour, label=f"s = {s}")
    axes[1].set_title("(b) shifted tanh: learnable, does not cut")
    axes[2].set_title("(c) soft: cuts and is learnable")
    for ax, name in zip(axes, ("H", "g", "T"), strict=True):
        ax.axvline(alpha, color=PALETTE["static"], linewidth=0.8)
        ax.set(xlabel=r"singular value $\sigma$ ($\alpha$ = 1)", ylabel=f"${name}$")
    for ax in axes[1:]:
        ax.legend()
    return fig


def plot_threshold_gradients() -> Figure:
    """The soft threshold's gradients in sigma and in alpha, at alpha = 1, by autograd."""
    fig, axes = figure(1, 2, height=2.5)
    for s, (line, colour) in SHARPNESS.items():
        sigma = _sigma().requires_grad_()
        alpha = torch.ones_like(sigma).requires_grad_()  # one alpha a point, so that each gradient stands alone
        by_sigma, by_alpha = torch.autograd.grad(soft_threshold(sigma, alpha, s).sum(), (sigma, alpha))
        axes[0].plot(sigma.detach(), by_sigma.clamp(max=8), line, color=colour, label=f"s = {s}")
        axes[1].plot(sigma.detach(), by_alpha.clamp(min=-8), line, color=colour, label=f"s = {s}")
    axes[0].set(xlabel=r"$\sigma$ ($\alpha$ = 1)", ylabel=r"$\partial T / \partial \sigma$, cut off at 8")
    axes[0].set_title("Kept components learn, cut ones do not")
    axes[1].set(xlabel=r"$\sigma$ ($\alpha$ = 1)", ylabel=r"$\partial T / \partial \alpha$, cut off at -8")
    axes[1].set_title(r"Only components just above $\alpha$ push it")
    for ax in axes:
        ax.legend()
    return fig


def _sigma() -> Tensor:
    return torch.linspace(0, 3, 601, dtype=torch.float64)


def describe_cut(sigma: Tensor, shape: tuple[int, int], alpha: float) -> str:
    """One line: rank, and the weights that an (m, n) layer with singular values `sigma` keeps at this alpha."""
    rank = int((sigma > alpha).sum())
    m, n = shape
    kept = kept_parameters(m, n, rank)
    return f"rank {rank} of {len(sigma)}, {kept:,} of {m * n:,} weights kept ({kept / (m * n):.1%})"


def draw_cut(ax: Axes, sigma: Tensor, shape: tuple[int, int], alpha: float, s: float) -> None:
    """Draw a spectrum (shape (r,), falling), the threshold, and what T leaves of each component.

    Shows alpha as a line, sigma in grey, T(sigma) in blue; the title is `describe_cut`.
    """
    index = np.arange(1, len(sigma) + 1)
    kept = soft_threshold(sigma, alpha, s)
    ax.fill_between(index, sigma.numpy(), step="mid", color="0.85", label=r"$\sigma$, cut")
    ax.fill_between(index, kept.numpy(), step="mid", color=PALETTE["adaptive"], alpha=0.8, label=r"$T(\sigma)$, kept")
    ax.axhline(alpha, color=PALETTE["static"], linestyle="--", label=rf"$\alpha$ = {alpha:.2f}, $s$ = {s:.3g}")
    ax.set(xlabel="component", ylabel=r"singular value $\sigma$", xlim=(1, len(sigma)), ylim=(0, None))
    ax.set_title(describe_cut(sigma, shape, alpha))
    ax.legend(loc="upper right")


def plot_spectra(spectra: pd.DataFrame) -> Figure:
    """Singular values of real layers (columns symbol, m, n, sigma), cut at `SHOWN_ALPHA`."""
    layers = spectra.groupby("symbol", sort=False)
    fig, axes = figure(1, len(layers), height=2.5, squeeze=False)
    for ax, (symbol, layer) in zip(axes[0], layers, strict=True):
        sigma = torch.tensor(layer.sigma.to_numpy())
        m, n = int(layer.m.iloc[0]), int(layer.n.iloc[0])
        draw_cut(ax, sigma, (m, n), alpha=SHOWN_ALPHA, s=50)
        rank = int((sigma > SHOWN_ALPHA).sum())
        kept = kept_parameters(m, n, rank) / (m * n)
        ax.set_title(f"{as_formula(symbol)}, block 0: rank {rank} of {len(sigma)}, {kept:.0%} of its weights")
    return fig


def plot_compression_losses() -> Figure:
    """Both compression losses of one layer and their gradients in alpha."""
    alpha = torch.linspace(0, 4, 401, dtype=torch.float64, requires_grad=True)
    fig, axes = figure(1, 2, height=2.5)
    for name, line in LINES.items():
        loss = COMPRESSION_LOSSES[name]
        (gradient,) = torch.autograd.grad(loss(alpha), alpha)
        values = torch.stack([loss(a) for a in alpha.detach().unsqueeze(-1)])
        axes[0].plot(alpha.detach(), values, line, color=PALETTE[name], label=name)
        axes[1].plot(alpha.detach(), gradient, line, color=PALETTE[name], label=name)
    axes[0].set(ylabel="compression loss of one layer", title="Both reward a larger threshold")
    axes[1].set(ylabel=r"gradient in $\alpha$", title="Only the adaptive push fades", ylim=(-1.1, 0.1))
    for ax in axes:
        ax.set_xlabel(r"threshold $\alpha$")
        ax.legend()
    return fig


def plot_compressing(history: pd.DataFrame) -> Figure:
    """Thresholds and kept weights over training (compression_loss, seed, step, alpha_mean, kept_linear, keep, unit)."""
    fig, axes = figure(1, 2, height=2.6)
    for (name, seed), run in history.groupby(["compression_loss", "seed"]):
        label = name if seed == history.seed.min() else None
        axes[0].plot(run.step, run.alpha_mean, LINES[name], color=PALETTE[name], label=label)
        axes[1].plot(run.step, 100 * run.kept_linear, LINES[name], color=PALETTE[name], label=label)
    unit = " (multiples of the largest $\\sigma$)" if history.unit.iloc[0] == "max" else ""
    axes[0].set(xlabel="training step", ylabel=r"mean $\alpha$" + unit, title="Thresholds rise, then are frozen")
    axes[1].axhline(100 * history.keep.iloc[0], color="0.4", linewidth=0.8, label="budget")
    axes[1].set(xlabel="training step", ylabel="kept weights of the linears (%)", ylim=(0, 105))
    axes[1].set_title("Weights fall until the budget is met")
    for ax in axes:
        ax.legend()
    return fig


def plot_block_sensitivity(table: pd.DataFrame) -> Figure:
    """What cutting one block alone costs (columns metric, block, seed, drop)."""
    metrics = list(table.metric.unique())
    fig, axes = figure(1, len(metrics), height=2.5, sharey=True, squeeze=False)
    for ax, metric, colour in zip(axes[0], metrics, (PALETTE["adaptive"], PALETTE["linear"]), strict=False):
        drop = 100 * table[table.metric == metric].pivot_table(index="block", columns="seed", values="drop")
        ax.bar(drop.index, drop.mean(axis=1), color=colour, alpha=0.6)
        for seed in drop:
            ax.plot(drop.index, drop[seed], MARKERS["dense"], color="black", markersize=2)
        ax.axhline(0, color="black", linewidth=0.6)
        name = NAMES.get(metric, metric)
        ax.set(xlabel="block that is cut by 50 %", ylabel=f"drop in dev {name} (points)", xticks=drop.index)
        ax.set_title(f"{name}: blocks differ (bars: mean, dots: seeds)")
    return fig


def plot_static_and_adaptive(scores: pd.DataFrame, ranks: pd.DataFrame) -> Figure:
    """The rank of W_Q in each block, and the scores of dense, static and adaptive (Fig. 1b of the paper)."""
    fig, axes = figure(1, 2, height=2.6, width_ratios=(1.3, 1))
    query = ranks[ranks.symbol == "W_Q"]
    for method in ("static", "adaptive"):
        by_block = query[query.method == method].pivot_table(index="block", columns="seed", values="rank")
        style = f"{MARKERS[method]}-"
        axes[0].plot(by_block.index, by_block.mean(axis=1), style, color=PALETTE[method], label=method)
        if method == "adaptive":
            axes[0].plot(by_block.index, by_block, ".", color=PALETTE[method], alpha=0.6, markersize=5)
    full = query.full_rank.iloc[0]
    axes[0].axhline(full / 2, color="0.4", linewidth=0.8, linestyle=":", label="break-even")
    axes[0].set(xlabel="block", ylabel=f"rank of $W_Q$ (of {full})", ylim=(0, None))
    axes[0].set_title("Learned ranks differ from block to block")
    axes[0].set_xticks(sorted(query.block.unique()))
    axes[0].legend()

    metric = TASKS[scores.task.iloc[0]].metrics[0]
    name = NAMES.get(metric, metric)
    lead = scores[scores.metric == metric]
    splits = [split for split in ("dev", "test") if split in set(lead.split)]
    for i, split in enumerate(splits):
        for j, method in enumerate(("dense", "static", "adaptive")):
            values = 100 * lead[(lead.split == split) & (lead.method == method)].value
            x = i + (j - 1) * 0.22
            axes[1].plot([x] * len(values), values, MARKERS[method], color=PALETTE[method], alpha=0.4, markersize=3)
            axes[1].errorbar(
                x, values.mean(), values.std(), fmt=MARKERS[method], color=PALETTE[method], capsize=2, markersize=5,
                label=method if i == 0 else None,
            )  # fmt: skip
    axes[1].set_xticks(range(len(splits)), splits)
    axes[1].set_ylabel(f"{name} (%), mean and sd")
    axes[1].set_title(f"{name} with {lead[lead.method == 'static'].kept_linear.mean():.0%} of the linears")
    axes[1].legend(loc="center")
    return fig


def plot_learned_ranks(ranks: pd.DataFrame) -> Figure:
    """Mean learned rank of every layer (columns method, symbol, block, rank, full_rank)."""
    fig, ax = figure(width=4.2, height=2.6)
    learned = ranks[ranks.method == "adaptive"]
    share = (learned.assign(share=100 * learned["rank"] / learned.full_rank)
             .pivot_table(index="symbol", columns="block", values="share", sort=False))  # fmt: skip
    share.index = share.index.map(as_formula)
    options = {"annot": True, "fmt": ".0f", "annot_kws": {"size": 6}, "cbar_kws": {"label": "rank (% of full)"}}
    sns.heatmap(share, ax=ax, cmap="cividis", vmin=0, vmax=100, **options)
    ax.set(xlabel="block", ylabel="", title="Learned ranks, mean over seeds")
    ax.tick_params(axis="y", rotation=0)
    ax.grid(False)
    return fig


def plot_speed(table: pd.DataFrame) -> Figure:
    """Speed-up of each model and case beside its FLOP limit, at one thread; rows of `compare_speed`."""
    one = table[(table.threads == 1) & (table.form != "dense")]
    cases = [c for c in SPEED_CASES if ((one.part == c[0]) & (one.phase == c[1]) & (one.batch == c[2])).any()]
    models = list(dict.fromkeys(one.model))
    fig, axes = figure(1, len(cases), height=0.7 + 0.42 * len(models), sharey=True, squeeze=False)
    for ax, case in zip(axes[0], cases, strict=True):
        rows = one[(one.part == case[0]) & (one.phase == case[1]) & (one.batch == case[2])]
        for form, style, shift in (("uniform ranks", "static", 0.15), ("trained ranks", "adaptive", -0.15)):
            here = rows[rows.form == form]
            y = [models.index(model) + shift for model in here.model]
            ax.plot(here.speed_up, y, MARKERS[style], color=PALETTE[style], label=form)
            ax.plot(here.flop_limit, y, "|", ms=9, color=PALETTE[style], label=f"FLOP limit, {form}")
        ax.axvline(1, color="0.5", lw=0.8)
        ax.set(
            title=SPEED_CASES[case], xlabel="times as fast as dense", xlim=(min(0.9, 0.95 * rows.speed_up.min()), None)
        )
        ax.set_yticks(range(len(models)), models)
    axes[0, 0].set_ylim(len(models) - 0.5, -0.5)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=4)
    return fig


def describe_speed(table: pd.DataFrame, model: str, batch: int, threads: int) -> str:
    """The speed-up of a model's blocks in one line, and how much of what FLOPs allow that is."""
    rows = _speed_rows(table, model, batch, threads)
    blocks = rows[(rows.part == "stack") & (rows.phase == "prefill")]
    said = [f"{row.form} {row.speed_up:.2f} of {row.flop_limit:.2f}" for row in blocks.itertuples()]
    return f"{model}, blocks, times as fast as dense: {'; '.join(said)}"


def draw_speed_bars(ax: Axes, table: pd.DataFrame, model: str, batch: int, threads: int) -> None:
    """Draw the speed-up of each part that was timed as a bar, and its FLOP limit as a line across it.

    Parameters
    ----------
    table : DataFrame
        Rows of `softlms.experiments.speed.compare_speed`.
    """
    rows = _speed_rows(table, model, batch, threads)
    cases = list(dict.fromkeys(zip(rows.part, rows.phase, strict=True)))
    for form, style, shift in (("uniform ranks", "static", -0.2), ("trained ranks", "adaptive", 0.2)):
        here = rows[rows.form == form]
        x = [cases.index(case) + shift for case in zip(here.part, here.phase, strict=True)]
        ax.bar(x, here.speed_up, width=0.36, color=PALETTE[style], label=form)
        ax.hlines(here.flop_limit, [i - 0.19 for i in x], [i + 0.19 for i in x], color="black")
    ax.plot([], [], color="black", label="FLOP limit")
    ax.axhline(1, color="0.5", lw=0.8)
    names = {"stack": "blocks", "model": "whole model"}
    ax.set_xticks(range(len(cases)), [f"{names[part]}, {phase}" for part, phase in cases])
    ax.set(ylabel="times as fast as dense", title=f"{model}, rows: {batch}, threads: {threads}")
    ax.grid(axis="x", visible=False)
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.08))


def _speed_rows(table: pd.DataFrame, model: str, batch: int, threads: int) -> pd.DataFrame:
    chosen = (table.model == model) & (table.batch == batch) & (table.threads == threads)
    return table[chosen & (table.form != "dense")]
