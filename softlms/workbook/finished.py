"""Which notebooks are finished: a small JSON beside each executed copy says for what, and what was written.

It is removed before a notebook runs and written after all else, so that a kill at any moment leaves none that is wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat

from softlms.experiments.closure import library_hash
from softlms.files import whole_file
from softlms.machine import hardware, versions
from softlms.workbook.book import DATA_VARIABLE
from softlms.workbook.durations import read_seconds
from softlms.workbook.folders import Folders, folder_state
from softlms.workbook.reads import read_tables

__all__ = ["depends_on", "mark_finished", "reason_to_run", "stored_seconds", "unmark"]


def depends_on(notebook: Path, parameters: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """All that a notebook's outputs depend on: cells, parameters, tables of others, library, versions and machine.

    Of a folder among the parameters, names, sizes and times of its files count; what a hub holds is not looked at.
    """
    named = dict(parameters)
    # the profile's data is what the variable says, where nothing else is given
    if environment.get(DATA_VARIABLE) and "data" not in named:
        named[DATA_VARIABLE] = environment[DATA_VARIABLE]
    places = {name: Path(value) for name, value in named.items() if isinstance(value, str) and "/" in value}
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(notebook, as_version=4).cells]
    return {
        "notebook": hashlib.sha256(json.dumps(cells).encode()).hexdigest(),
        "parameters": named,
        "folders": {name: folder_state(place) for name, place in places.items() if place.is_dir()},
        "tables": read_tables(notebook.parent.parent / "results", notebook.stem, named.get("profile")),
        "library": library_hash(),
        "versions": versions(),
        "machine": hardware(1),
    }


def reason_to_run(folders: Folders, notebook: str, depends: Mapping[str, Any]) -> str | None:
    """Why a notebook is not finished; None where it is.

    Parameters
    ----------
    folders : Folders
    notebook : str
    depends : mapping
        See `depends_on`.
    """
    try:
        before = json.loads(_place(folders, notebook).read_text("utf-8"))
        wrote = [folders.root / file for file in before.pop("wrote")]
    except FileNotFoundError:
        return "not done before"
    except (ValueError, KeyError):
        return f"{_place(folders, notebook).name} cannot be read"
    now = json.loads(json.dumps(depends))
    for name, value in now.items():
        if (old := before.get(name)) == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            changed = (key for key in sorted(old | value) if old.get(key) != value.get(key))
            if name in ("folders", "tables"):
                return f"{'files' if name == 'folders' else name} changed: {', '.join(changed)}"
            return f"{name} changed: " + ", ".join(f"{k} {_show(old, k)} to {_show(value, k)}" for k in changed)
        return f"{name} changed" + (f": {old} to {value}" if name in ("versions", "machine") else "")
    missing = [file for file in (folders.executed / f"{notebook}.ipynb", *wrote) if not file.is_file()]
    return f"missing: {', '.join(str(file.relative_to(folders.root)) for file in missing)}" if missing else None


def unmark(folders: Folders, notebook: str) -> None:
    """From now on the notebook is not finished."""
    _place(folders, notebook).unlink(missing_ok=True)


def mark_finished(folders: Folders, notebook: str, depends: Mapping[str, Any], wrote: Iterable[Path]) -> None:
    """Say that a notebook is finished, for what, and which figures and tables it wrote."""
    files = [file.relative_to(folders.root).as_posix() for file in wrote]
    with whole_file(_place(folders, notebook)) as partial:
        partial.write_text(json.dumps({**depends, "wrote": files}, indent=1) + "\n", "utf-8")


def stored_seconds(folders: Folders, notebook: str) -> float | None:
    """How long the notebook took when its executed copy was made, or was stamped; None where neither is known."""
    with suppress(FileNotFoundError, ValueError, KeyError):  # a time is only an estimate: none is no error
        executed = json.loads((folders.executed / f"{notebook}.ipynb").read_text("utf-8"))
        return executed["metadata"]["papermill"]["duration"]
    with suppress(ValueError):
        return read_seconds(folders.root / "notebooks").get(notebook) if folders.profile == "quick" else None
    return None


def _place(folders: Folders, notebook: str) -> Path:
    return folders.executed / f"{notebook}.json"


def _show(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "(default)"
