"""What is finished and what is stale, and why: notebooks of ``softlms figures``, and tables derived from others.

A JSON file beside each executed copy records what a finished notebook depended on and what it wrote. It is removed
before the notebook runs and written last, so that a kill at any moment never leaves a wrong one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd

from softlms.data.tasks import TASKS
from softlms.experiments.closure import library_hash
from softlms.experiments.grid import summarize
from softlms.experiments.report import adaptive_differences, soft_verdicts
from softlms.utils.files import whole_file
from softlms.utils.machine import hardware, versions
from softlms.workbook.book import DATA_VARIABLE
from softlms.workbook.registry import Folders, Notebook, read_registry, variant_name

__all__ = [
    "check_derived",
    "depends_on",
    "mark_finished",
    "read_tables",
    "reason_to_run",
    "typical_seconds",
    "unmark",
]

DIGITS = {"rtol": 1e-3, "atol": 2e-4}  # six digits are stored; an interval is a difference of them


def depends_on(notebook: Path, parameters: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """What a notebook's outputs depend on: cells, parameters, tables of others, library, versions and machine.

    A folder among the parameters counts by the names, sizes and times of its files; data on a hub does not count.
    """
    named = dict(parameters)
    if environment.get(DATA_VARIABLE) and "data" not in named:  # it replaces the profile's own data
        named[DATA_VARIABLE] = environment[DATA_VARIABLE]
    places = {name: Path(value) for name, value in named.items() if isinstance(value, str) and "/" in value}
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(notebook, as_version=4).cells]
    return {
        "notebook": _sha256(json.dumps(cells).encode()),
        "parameters": named,
        "folders": {name: _folder_state(place) for name, place in places.items() if place.is_dir()},
        "tables": read_tables(notebook.parent.parent, notebook.stem, named.get("profile")),
        "library": library_hash(),
        "versions": versions(),
        "machine": hardware(1),
    }


def read_tables(root: Path, notebook: str, profile: str | None = None) -> dict[str, str]:
    """The tables that a notebook reads but does not write: file in ``results`` to hash of its content.

    Parameters
    ----------
    root : Path
        The checkout.
    notebook : str
        Its name without ending.
    profile : str, optional
        The profile that runs; if None, only the tables that are read in every profile.
    """
    results, reads = root / "results", read_registry(root).get(notebook, Notebook()).reads
    patterns = [pattern for pattern in reads if profile or "{profile}" not in pattern]
    files = {file for pattern in patterns for file in results.glob(pattern.format(profile=profile))}
    return {
        file.relative_to(results).as_posix(): _sha256(file.read_bytes())
        for file in sorted(files)
        if not (file.parent.name == profile and file.name.startswith(notebook))
    }


def reason_to_run(folders: Folders, notebook: str, depends: Mapping[str, Any]) -> str | None:
    """Why a notebook is not finished, given what it `depends_on`; None if it is."""
    place = _place(folders, notebook)
    try:
        before = json.loads(place.read_text("utf-8"))
        wrote = [folders.root / file for file in before.pop("wrote")]
    except FileNotFoundError:
        return "not done before"
    except (ValueError, KeyError):
        return f"{place.name} cannot be read"
    for name, now in json.loads(json.dumps(depends)).items():
        if (old := before.get(name)) == now:
            continue
        if isinstance(now, dict) and isinstance(old, dict):
            changed = [key for key in sorted(old | now) if old.get(key) != now.get(key)]
            if name in ("folders", "tables"):
                return f"{'files' if name == 'folders' else name} changed: {', '.join(changed)}"
            return f"{name} changed: " + ", ".join(f"{key} {_show(old, key)} to {_show(now, key)}" for key in changed)
        return f"{name} changed" + (f": {old} to {now}" if name in ("versions", "machine") else "")
    missing = [file for file in (folders.executed / f"{notebook}.ipynb", *wrote) if not file.is_file()]
    return f"missing: {', '.join(str(file.relative_to(folders.root)) for file in missing)}" if missing else None


def unmark(folders: Folders, notebook: str) -> None:
    """Mark the notebook as not finished."""
    _place(folders, notebook).unlink(missing_ok=True)


def mark_finished(folders: Folders, notebook: str, depends: Mapping[str, Any], wrote: Iterable[Path]) -> None:
    """Record that a notebook is finished, what it depended on, and which figures and tables it wrote."""
    files = [file.relative_to(folders.root).as_posix() for file in wrote]
    with whole_file(_place(folders, notebook)) as partial:
        partial.write_text(json.dumps({**depends, "wrote": files}, indent=1) + "\n", "utf-8")


def typical_seconds(folders: Folders, notebook: str) -> float:
    """A notebook's approximate time: that of its executed copy here, else the time in the registry."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        executed = json.loads((folders.executed / f"{notebook}.ipynb").read_text("utf-8"))
        return float(executed["metadata"]["papermill"]["duration"])
    return read_registry(folders.root).get(notebook, Notebook()).typical_seconds(folders.profile)


def check_derived(results: Path) -> list[str]:
    """Summaries, verdicts and paired differences that do not match their rows; empty if all match.

    Parameters
    ----------
    results : Path
        The folder of one profile, ``results/laptop``.

    Raises
    ------
    ValueError
        No registry says which tables are derived: nothing would be checked.
    """
    wrong: list[str] = []
    registry = read_registry(results.parent.parent)
    if not any(notebook.derived for notebook in registry.values()):
        raise ValueError(f"{results.parent.parent} has no notebooks.toml that names derived tables.")
    for name, notebook in registry.items():
        for variant in ("", *notebook.variants) if notebook.derived else ():
            table = variant_name(name, variant)
            if variant and not (results / f"{table}.csv").is_file():
                continue  # the notebook did not run with that
            rows = pd.read_csv(results / f"{table}.csv")
            for kind in notebook.derived:
                wrong += _differences(_derive(kind, rows), results / f"{table}_{kind}.csv")
    return wrong


def _derive(kind: str, rows: pd.DataFrame) -> pd.DataFrame:
    if kind == "summary":
        return summarize(rows)
    if kind == "differences":
        return adaptive_differences(rows)
    metrics = {task: TASKS[task].metrics[0] if task in TASKS else "perplexity" for task in rows.task.unique()}
    return soft_verdicts(rows, metrics)


def _differences(made: pd.DataFrame, path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name} is missing, but its rows exist"
        return
    stored = pd.read_csv(path)
    if lacking := [column for column in made if column not in stored]:
        yield f"{path.name} has no column {lacking[0]}: run its notebook again"
    elif len(made) != len(stored):
        yield f"{path.name} has {len(stored)} rows instead of {len(made)}: run its notebook again"
    else:
        for column in made:
            was, now = stored[column], made[column].reset_index(drop=True)
            number = pd.api.types.is_float_dtype(now)
            same = np.isclose(was, now, equal_nan=True, **DIGITS) if number else (was == now).to_numpy()
            if not same.all():
                i = int(np.argmin(same))
                yield f"{path.name}, row {i + 1}: {column} is {was[i]}, its rows say {now[i]}"
                return


def _folder_state(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    state = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _sha256(repr(state).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _place(folders: Folders, notebook: str) -> Path:
    return folders.executed / f"{notebook}.json"


def _show(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "(default)"
