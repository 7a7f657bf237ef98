"""One look for every figure: final size, legible in print, safe for colour-blind readers, stable bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from softlms.utils.files import whole_file

__all__ = ["COLUMN", "PAGE", "PALETTE", "as_formula", "figure", "save_figure", "use_style"]

# inches: one column of a two-column paper, and its full width
COLUMN, PAGE = 3.4, 7.0

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), one colour and one marker for each method everywhere
PALETTE = {"dense": "#000000", "static": "#D55E00", "adaptive": "#0072B2", "linear": "#E69F00", "other": "#009E73"}
MARKERS = {"dense": "s", "static": "v", "adaptive": "o", "linear": "^", "other": "D"}

_STYLE: Any = {
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
}


def use_style() -> None:
    """Take over the project's matplotlib defaults for this process."""
    mpl.rcParams.update(_STYLE)


def figure(rows: int = 1, columns: int = 1, *, width: float = PAGE, height: float = 2.4, **kwargs: Any) -> tuple:
    """``plt.subplots`` at final size in inches, with a layout that cuts nothing off."""
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **kwargs)


def as_formula(symbol: str) -> str:
    """A layer's symbol for matplotlib: ``W_Q`` as mathematics."""
    return f"${symbol.replace('_', '_{')}}}$"


def save_figure(fig: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write ``name.png`` and ``name.pdf`` into `folder`, without dates so that equal figures are equal files.

    Returns
    -------
    tuple of Path
        The PNG and the PDF.
    """
    dateless = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    for path, kind in ((png, "png"), (pdf, "pdf")):
        with whole_file(path) as partial:
            fig.savefig(partial, format=kind, metadata=dateless[kind])
    return png, pdf
