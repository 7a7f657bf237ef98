"""The figure of notebook 10: claimed against measured values."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import markers
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softlms.workbook.claims import DIFFERS, NOT_COMPARABLE, REPRODUCED, WITHIN
from softlms.workbook.plots.style import PAGE, PALETTE, figure

__all__ = ["plot_claims"]

# distinguished by shape as well as colour; hollow if not comparable
VERDICTS: dict[str, Any] = {
    REPRODUCED: {"marker": "o", "color": PALETTE["adaptive"]},
    WITHIN: {"marker": "s", "color": PALETTE["linear"]},
    DIFFERS: {"marker": "X", "color": PALETTE["static"]},
    NOT_COMPARABLE: {"marker": "D", "color": "0.35", "markerfacecolor": "white"},
}
# points to the side on which a claim holds
CLAIMED: dict[str, tuple[str, Any]] = {
    "at_least": ("claimed: at least", markers.CARETRIGHTBASE),
    "at_most": ("claimed: at most", markers.CARETLEFTBASE),
    "equals": ("claimed", "|"),
}


def plot_claims(table: pd.DataFrame) -> Figure:
    """Claimed and measured value of every claim that has both, with one axis per unit.

    Parameters
    ----------
    table : DataFrame
        Of `softlms.workbook.claims.claims_table`.
    """
    both = table[table.bound.notna() & table.measured.notna()]
    units = list(both.unit.unique())
    sizes = [1.5 + (both.unit == unit).sum() for unit in units]
    fig, axes = figure(len(units), 1, width=PAGE, height=0.5 + 0.17 * sum(sizes), height_ratios=sizes, squeeze=False)
    for ax, unit in zip(axes[:, 0], units, strict=True):
        _plot_unit(ax, both[both.unit == unit], unit)
    shown = {label: handle for ax in axes[:, 0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend([shown[label] for label in sorted(shown)], sorted(shown), loc="outside upper center", ncols=4)
    return fig


def _plot_unit(ax: Axes, claims: pd.DataFrame, unit: str) -> None:
    for y, claim in enumerate(claims.itertuples()):
        below = claim.tolerance if claim.bound in ("at_least", "equals") else 0
        above = claim.tolerance if claim.bound in ("at_most", "equals") else 0
        if claim.tolerance:
            ends = (claim.claimed - below, claim.claimed + above)
            ax.plot(ends, (y, y), color="0.75", lw=5, solid_capstyle="butt", label="tolerance")
        label, marker = CLAIMED[claim.bound]
        ax.plot(claim.claimed, y, marker=marker, color="black", ls="", ms=7, label=label)
        ax.plot(claim.measured, y, ls="", ms=5, label=f"measured: {claim.verdict}", **VERDICTS[claim.verdict])
    names = [
        f"{claim} (paper)" if who == "paper" else claim for claim, who in zip(claims.claim, claims.who, strict=True)
    ]
    ax.set_yticks(range(len(claims)), names, fontsize=6)
    ax.set_ylim(len(claims) - 0.5, -0.5)
    ax.set_xlabel(unit, labelpad=1)
    if unit == "times":  # from a third faster to forty times
        ax.set_xscale("log")
        ax.set_xticks((1, 2, 5, 10, 20, 40), ("1", "2", "5", "10", "20", "40"))
        ax.minorticks_off()
    low, high = ax.get_xlim()
    if high - low < 0.01 * abs(high):  # practically equal
        ax.set_xlim(low - 0.01 * abs(high), high + 0.01 * abs(high))
    ax.margins(x=0.08)
