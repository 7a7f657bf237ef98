"""What notebook 09 measures in each profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from softlms.full_size import FULL_SIZE
from softlms.profiles import Book, make_book

__all__ = ["SPEED_PROFILES", "SpeedProfile", "open_speed_book"]


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
    in_detail : tuple of str
        Models that are also timed in parts, and under onnxruntime.
    """

    name: str
    models: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    in_detail: tuple[str, ...] = ()

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
        in_detail=("bert-base",),
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
