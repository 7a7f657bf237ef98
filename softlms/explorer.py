"""Interactive pictures for JupyterLab, each with a drawing function that makes the same picture without widgets."""

from __future__ import annotations

import io

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from softlms.layers import kept_parameters
from softlms.plotting import PALETTE, figure
from softlms.thresholds import soft_threshold

__all__ = ["describe_cut", "draw_cut", "threshold_explorer"]


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
    ax.axhline(alpha, color=PALETTE["static"], linestyle="--", label=rf"$\alpha$ = {alpha:.2f}, $s$ = {s:g}")
    ax.set(xlabel="component", ylabel=r"singular value $\sigma$", xlim=(1, len(sigma)), ylim=(0, None))
    ax.set_title(describe_cut(sigma, shape, alpha))
    ax.legend(loc="upper right")


def threshold_explorer(sigma: Tensor, shape: tuple[int, int], *, alpha: float = 1.0, s: float = 50.0) -> widgets.VBox:
    """Sliders for alpha and s over a real spectrum: the cut, its gate, the rank and the parameters kept.

    Parameters
    ----------
    sigma : Tensor
        Singular values, shape (r,), falling.
    shape : tuple of int
        (m, n) of the layer.
    alpha, s : float
        Where the sliders start.
    """
    alphas = widgets.FloatSlider(alpha, min=0, max=round(float(sigma[0]), 2), step=0.01, description="alpha")
    sharpness = widgets.FloatLogSlider(s, base=10, min=-1, max=3, step=0.05, description="s")
    text = widgets.HTML()
    picture = widgets.Image(format="png")  # not an Output: batch runners without widget state fail on that

    def redraw(change: object = None) -> None:
        text.value = f"<b>{describe_cut(sigma, shape, alphas.value)}</b>"
        fig, (left, right) = figure(1, 2)
        draw_cut(left, sigma, shape, alphas.value, sharpness.value)
        grid = torch.linspace(0, float(sigma[0]), 400)
        right.plot(grid, soft_threshold(grid, alphas.value, sharpness.value), color=PALETTE["adaptive"])
        right.plot(grid, grid, color="0.6", linestyle=":")
        right.set(xlabel=r"$\sigma$", ylabel=r"$T(\sigma; \alpha, s)$")
        png = io.BytesIO()
        fig.savefig(png, dpi=120)
        picture.value = png.getvalue()
        plt.close(fig)

    alphas.observe(redraw, names="value")
    sharpness.observe(redraw, names="value")
    redraw()
    return widgets.VBox([alphas, sharpness, text, picture])
