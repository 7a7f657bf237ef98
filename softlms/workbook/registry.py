"""The checkout: its folders, and the entries of ``notebooks/notebooks.toml``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softlms.utils.files import lock, whole_file

__all__ = [
    "LANES",
    "Drawing",
    "Folders",
    "Notebook",
    "choose_notebooks",
    "find_drawing",
    "keep_seconds",
    "project_root",
    "read_complete_registry",
    "read_registry",
    "variant_name",
]

REGISTRY = "notebooks.toml"
LANES = {"strict": "--nbval", "lax": "--nbval-lax"}  # nbval's options
TYPICAL_SECONDS = 60  # of a notebook that is not listed
ALIKE = 2  # times within this factor count as equal, so that stamping again changes no file


@dataclass(frozen=True)
class Drawing:
    """A figure: the function in `softlms.workbook.plots` that draws it, and the names of its tables.

    The figure of a `variant`, a model beside or a part of a grid, is drawn only where its notebook ran with that.
    """

    plot: str
    tables: tuple[str, ...] = ()
    variant: str = ""


@dataclass(frozen=True)
class Notebook:
    """An entry of ``notebooks.toml``, which explains each field; `figures` by their full names."""

    lane: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    reads: Sequence[str] = ()
    figures: Mapping[str, Drawing] = field(default_factory=dict)
    derived: Sequence[str] = ()
    variants: Sequence[str] = ()

    @property
    def follows_others(self) -> bool:
        """Whether it reads the outputs of others in the same profile, so that it must run after them."""
        return any("{profile}" in pattern for pattern in self.reads)

    def typical_seconds(self, profile: str) -> float:
        """Its approximate time; the longest known time if there is none for this profile."""
        return self.seconds.get(profile) or max(self.seconds.values(), default=TYPICAL_SECONDS)


def variant_name(notebook: str, *of: str) -> str:
    """The name of a notebook's files when it runs with a model beside or a part of its grid; without them its own."""
    return "_".join([notebook, *filter(None, of)])


class Folders:
    """A checkout's folders for one profile.

    Attributes
    ----------
    profile : str
    root, figures, results, executed, runs : Path
    """

    def __init__(self, root: Path, profile: str) -> None:
        self.root, self.profile, self.runs = root, profile, root / "runs"
        self.figures, self.results, self.executed = (
            root / kind / profile for kind in ("figures", "results", "executed")
        )

    def written(self, notebook: str) -> dict[Path, tuple[int, int]]:
        """A notebook's figures and tables, each with its inode and time, which change when it is rewritten."""
        files = [file for folder in (self.figures, self.results) for file in folder.glob(f"{notebook}*")]
        return {file: (stat.st_ino, stat.st_mtime_ns) for file in sorted(files) if (stat := file.stat())}


def project_root() -> Path:
    """The checkout that contains ``notebooks/``, searched upwards from the working folder.

    Raises
    ------
    FileNotFoundError
        The working folder is not in a checkout.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError(f"{here} is not in a softlms checkout (a folder with notebooks/ and pyproject.toml).")


def read_registry(root: Path) -> dict[str, Notebook]:
    """The entries of a checkout's ``notebooks.toml`` by name; empty without that file.

    Raises
    ------
    ValueError
        The file is malformed, or an entry has an unknown key or lane.
    """
    place = root / "notebooks" / REGISTRY
    if not place.is_file():
        return {}
    try:
        return {name: _entry(name, entry) for name, entry in tomllib.loads(place.read_text("utf-8")).items()}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{place}: {error}") from None


def read_complete_registry(root: Path) -> dict[str, Notebook]:
    """Like `read_registry`; ValueError if a notebook is not listed, or a listed one is missing."""
    registry, place = read_registry(root), root / "notebooks" / REGISTRY
    there = {path.stem for path in place.parent.glob("*.ipynb")}
    if unlisted := there - set(registry):
        raise ValueError(f"Notebooks not listed in {place}: {', '.join(sorted(unlisted))}.")
    if missing := set(registry) - there:
        raise ValueError(f"Notebooks listed in {place}, but missing: {', '.join(sorted(missing))}.")
    return registry


def _entry(name: str, entry: dict[str, Any]) -> Notebook:
    if entry.get("lane") not in LANES:
        raise ValueError(f"{name} has the unknown lane {entry.get('lane')!r}; known: {', '.join(LANES)}.")
    figures = {}
    for variant in ("", *entry.get("variants", ())):
        files = variant_name(name, variant)
        for suffix, figure in entry.get("figures", {}).items():
            tables = tuple(files + table for table in figure.get("tables", ()))
            figures[files + suffix] = Drawing(figure["plot"], tables, variant)
    return Notebook(**entry | {"figures": figures})


def choose_notebooks(folder: Path, names: Sequence[str]) -> list[Path]:
    """Notebooks of a folder by name or its beginning, all when `names` is empty; ValueError for an unknown one."""
    known = sorted(folder.glob("[0-9]*.ipynb"))
    unknown = [name for name in names if not any(path.stem.startswith(name) for path in known)]
    if unknown:
        raise ValueError(f"Unknown notebook {unknown[0]!r}; known: {', '.join(path.stem for path in known)}.")
    return [path for path in known if not names or any(path.stem.startswith(name) for name in names)]


def find_drawing(figure: str) -> Drawing:
    """How a figure is drawn; ValueError if no notebook of this checkout draws it."""
    registry = read_registry(project_root())
    drawings = {name: drawing for notebook in registry.values() for name, drawing in notebook.figures.items()}
    if figure not in drawings:
        raise ValueError(f"Unknown figure {figure!r}; known: {', '.join(sorted(drawings))}.")
    return drawings[figure]


def keep_seconds(root: Path, name: str, seconds: float) -> None:
    """Record a notebook's time with profile quick in ``notebooks.toml``, if it is new or far from the known one."""
    place, seconds = root / "notebooks" / REGISTRY, max(1, round(seconds))
    with lock(place):
        known = read_registry(root)[name].seconds.get("quick", float("inf"))
        if 1 / ALIKE <= seconds / known <= ALIKE:
            return
        text, line = place.read_text("utf-8"), f"seconds.quick = {seconds}\n"
        heading = rf"^\[{re.escape(name)}\]\n"
        changed, found = re.subn(rf"(?m)({heading}(?:[^\[\n].*\n)*?)seconds\.quick = .*\n", rf"\g<1>{line}", text)
        with whole_file(place) as partial:
            partial.write_text(changed if found else re.sub(f"(?m){heading}", rf"\g<0>{line}", text), "utf-8")
