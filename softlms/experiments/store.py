"""Stored runs: what one is, its key (a hash of all it depends on), and why a run is missing: what has changed."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ALIKE", "DEPENDS", "Run", "key", "why_missing"]

DEPENDS = "depends.json"  # beside a run's result
ALIKE = 6  # names that may differ between runs worth comparing
SHOWN = 4  # of the definitions that differ


@dataclass(frozen=True)
class Run:
    """The outcome of one run.

    Attributes
    ----------
    result : dict
        "method", "seed", "scores" (split, then metric; 0 to 1, except perplexity), "untuned" (those of dev before any
        training after the cut), "ranks" (layer to components), "kept_linear", "kept_total", "steps", "frozen_at" (soft
        thresholds: the step at which the budget was met), "further" (keep to scores on dev; see `Recipe`), "history"
        (one entry per logging step), "seconds" (shared work, that is the teacher's logits, calibration and factors,
        counts for the first method that needs it; after an interruption, only the rest), "hardware", "versions",
        "commit", "encoder", "data".
    model : Path or None
        The saved model, if the run keeps one (dense runs do).
    """

    result: dict[str, Any]
    model: Path | None = None


def key(depends: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a run.

    Parameters
    ----------
    depends : mapping
        Everything that a run's numbers depend on, as values for JSON.
    """
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]


def why_missing(folder: Path, kind: str, depends: Mapping[str, Any]) -> str:
    """What differs from the most similar stored run.

    Parameters
    ----------
    folder : Path
        Holds a folder for each run, named ``<kind>-<key>``.
    kind : str
        Method and seed.
    depends : mapping
        See `key`.

    Returns
    -------
    str
        "changed: " and the names, with both values if they are short, or with the definitions that differ; "none like
        it is stored" if more than `ALIKE` differ: then it belongs to another model or task.
    """
    here = json.loads(json.dumps(depends))
    results = folder.glob(f"{glob.escape(kind)}-*/result.json")
    others = [json.loads(path.read_text("utf-8")) for r in results if (path := r.with_name(DEPENDS)).is_file()]
    if not others:
        return "none like it is stored"
    differing = [sorted(n for n in here.keys() | other.keys() if here.get(n) != other.get(n)) for other in others]
    names, other = min(zip(differing, others, strict=True), key=lambda pair: len(pair[0]))
    if len(names) > ALIKE:
        return "none like it is stored"
    return "changed: " + ", ".join(f"{name}{_change(other.get(name), here.get(name))}" for name in names)


def _change(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):  # of code: definitions
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        return f" of {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    change = f" {before} -> {now}"
    return change if len(change) < 40 else ""
