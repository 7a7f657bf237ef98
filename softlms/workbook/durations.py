"""How long notebooks take with profile quick: ``notebooks/seconds.toml``, for the time left where they never ran."""

from __future__ import annotations

import tomllib
from pathlib import Path

from softlms.files import lock, whole_file

__all__ = ["keep_seconds", "read_seconds"]

SECONDS = "seconds.toml"
ALIKE = 2  # an estimate: times within this factor are one, so that stamping twice changes no file


def read_seconds(notebooks: Path) -> dict[str, float]:
    """Seconds by notebook, on the machine that stamped it; none where no notebook was."""
    place = notebooks / SECONDS
    return tomllib.loads(place.read_text("utf-8")) if place.is_file() else {}


def keep_seconds(notebooks: Path, name: str, seconds: float) -> None:
    """Write down how long a notebook took, where that is not known yet or far from what is."""
    place, seconds = notebooks / SECONDS, max(1, round(seconds))
    with lock(place):
        known = read_seconds(notebooks)
        if 1 / ALIKE <= seconds / known.get(name, float("inf")) <= ALIKE:
            return
        lines = [f"{notebook} = {took}\n" for notebook, took in sorted((known | {name: seconds}).items())]
        with whole_file(place) as partial:
            partial.write_text("".join(["# made by softlms stamp, profile quick\n", *lines]), "utf-8")
