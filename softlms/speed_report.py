"""What notebook 09 measures in each profile, and its drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from softlms.full_size import FULL_SIZE
from softlms.plotting import MARKERS, PALETTE, figure
from softlms.profiles import Book, make_book

__all__ = ["SPEED_PROFILES", "SpeedProfile", "open_speed_book", "plot_speed"]

CASES = {
    ("stack", "prefill", 1): "blocks, 1 row",
    ("stack", "prefill", 8): "blocks, 8 rows",
    ("model", "prefill", 1): "whole model, 1 row",
    ("model", "decode", 1): "one token more",
}


@dataclass(frozen=True)
class SpeedProfile:
    """What is measured.

    Attributes
    ----------
    name : str
    models : tuple of str
        Keys of `softlms.full_size.FULL_SIZE`.
    settings : mapping
        For `softlms.speed.compare_speed`.
    changes : mapping
        What single models have instead.
    onnx : tuple of str
        Models that are exported and timed under onnxruntime too.
    """

    name: str
    models: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    onnx: tuple[str, ...] = ()

    def of(self, model: str) -> dict[str, Any]:
        """The settings of one model."""
        return {**self.settings, **self.changes.get(model, {})}


_ALL = SpeedProfile(
    "laptop",
    tuple(FULL_SIZE),
    {"threads": (1, 2)},
    {"tinyllama-1.1b": {"rounds": 5}},
    ("bert-base", "gpt2"),
)
SPEED_PROFILES = {
    "quick": SpeedProfile(
        "quick",
        ("bert-base", "gpt2", "mamba-130m"),
        {"layers": 2, "rounds": 3, "tokens": 64, "batches": (1,)},
        onnx=("bert-base",),
    ),
    "laptop": _ALL,
    "paper": replace(_ALL, name="paper"),
}


def open_speed_book(name: str, *, profile: str) -> Book:
    """Open a notebook that trains nothing; see `softlms.profiles.open_book`.

    Raises
    ------
    ValueError
        Unknown profile.
    """
    if profile not in SPEED_PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; known: {', '.join(SPEED_PROFILES)}.")
    return make_book(name, SPEED_PROFILES[profile], None, "")


def plot_speed(table: pd.DataFrame) -> Figure:
    """Speed-up of each model and case beside its FLOP limit, at one thread.

    Parameters
    ----------
    table : DataFrame
        Of `softlms.speed.compare_speed`, for one model or several.
    """
    one = table[(table.threads == 1) & (table.form != "dense")]
    cases = [c for c in CASES if ((one.part == c[0]) & (one.phase == c[1]) & (one.batch == c[2])).any()]
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
        ax.set(title=CASES[case], xlabel="times as fast as dense", xlim=(min(0.9, 0.95 * rows.speed_up.min()), None))
        ax.set_yticks(range(len(models)), models)
    axes[0, 0].set_ylim(len(models) - 0.5, -0.5)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=4)
    return fig
