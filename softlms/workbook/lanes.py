"""The manifest ``notebooks/lanes.toml``: which notebooks there are, and how CI checks each."""

from __future__ import annotations

import tomllib
from pathlib import Path

__all__ = ["LANES", "read_lanes"]

LANES = {"strict": "--nbval", "lax": "--nbval-lax"}  # nbval's options


def read_lanes(folder: Path) -> dict[str, dict[Path, str]]:
    """The manifest: job, notebook, and how it is checked.

    Parameters
    ----------
    folder : Path
        With the notebooks and ``lanes.toml``.

    Raises
    ------
    ValueError
        A notebook that is not listed or listed twice, a listed one that is not there, or an unknown lane.
    FileNotFoundError
        No manifest.
    """
    manifest = tomllib.loads((folder / "lanes.toml").read_text("utf-8"))
    listed = [name for job in manifest.values() for name in job]
    there = {path.stem for path in folder.glob("*.ipynb")}
    twice = {name for name in listed if listed.count(name) > 1}
    wrong = {
        f"are not listed in {folder / 'lanes.toml'}": there - set(listed),
        f"are listed in {folder / 'lanes.toml'} and not there": set(listed) - there,
        f"are listed in {folder / 'lanes.toml'} more than once": twice,
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(f"Notebooks {what}: {', '.join(sorted(names))}.")
    for name, lane in ((name, lane) for job in manifest.values() for name, lane in job.items()):
        if lane not in LANES:
            raise ValueError(f"{name} has the unknown lane {lane!r}; known: {', '.join(LANES)}.")
    return {job: {folder / f"{name}.ipynb": lane for name, lane in books.items()} for job, books in manifest.items()}
