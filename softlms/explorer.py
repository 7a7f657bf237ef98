"""Interactive pictures for JupyterLab; what they draw, `softlms.pictures` draws without widgets."""

from __future__ import annotations

import io

import ipywidgets as widgets
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from softlms.pictures import describe_cut, draw_cut
from softlms.plotting import PALETTE, figure
from softlms.thresholds import soft_threshold

__all__ = ["threshold_explorer"]


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
