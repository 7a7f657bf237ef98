"""The figures of the workbook: each is drawn from tables, with a note beside it that names the tables.

A figure is drawn from the CSV files that its notebook wrote, never from values in memory. So the notebook and
``softlms figures --replot`` make the same bytes. ``notebooks/notebooks.toml`` lists the figures.
"""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from softlms.utils.files import whole_file
from softlms.workbook.plots.style import save_figure
from softlms.workbook.registry import find_drawing

__all__ = ["check_drawing", "draw"]


def draw(name: str, figures: Path, results: Path) -> list[Path]:
    """Draw a figure from its tables; write it as PNG and PDF, and a note of how it was drawn.

    Parameters
    ----------
    name : str
        A notebook's name and the figure's suffix, as in ``notebooks.toml``.
    figures, results : Path
        Folders of one profile.

    Returns
    -------
    list of Path
        The files written. The figure stays open so that a notebook shows it.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown figure, or one of its tables is missing. Nothing is written then.
    """
    drawing = find_drawing(name)
    paths = [results / f"{table}.csv" for table in drawing.tables]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {name} is drawn from it. Run the notebook that writes it.")
    tables = [pd.read_csv(path) for path in paths]
    module, function = drawing.plot.split(".")
    place = f"{__package__}.{module}"
    files = save_figure(getattr(import_module(place), function)(*tables), figures, name)
    note = {
        "figure": name,
        "drawn_by": f"{place}.{function}",
        "matplotlib": mpl.__version__,
        "tables": [
            {"file": path.name, "rows": len(table), "sha256": _sha256(path)}
            for path, table in zip(paths, tables, strict=True)
        ],
        "files": [{"file": file.name, "sha256": _sha256(file)} for file in files],
    }
    beside = figures / f"{name}.json"
    with whole_file(beside) as partial:
        partial.write_text(json.dumps(note, indent=1) + "\n", "utf-8")
    return [*files, beside]


def check_drawing(name: str, figures: Path, results: Path) -> list[str]:
    """Mismatches between a figure, its note and its tables; empty if there are none.

    Parameters
    ----------
    name, figures, results
        See `draw`.
    """
    beside, parts = figures / f"{name}.json", ((results, "tables"), (figures, "files"))
    if not beside.is_file():
        return [f"{name}: {beside} is missing"]
    try:
        tables = find_drawing(name).tables
    except ValueError:
        return [f"{name}: {beside} belongs to no known figure"]
    try:
        note: dict[str, Any] = json.loads(beside.read_text("utf-8"))
        hashes = {folder / entry["file"]: entry["sha256"] for folder, key in parts for entry in note[key]}
    except (ValueError, KeyError, TypeError):
        return [f"{name}: {beside} cannot be read: draw it again"]
    due = {results / f"{table}.csv" for table in tables}
    due |= {figures / f"{name}.{kind}" for kind in ("png", "pdf")}
    if note.get("figure") != name or set(hashes) != due:
        return [f"{name}: {beside} does not name its figure, tables and files: draw it again"]
    wrong = []
    for path, expected in hashes.items():
        if not path.is_file():
            wrong.append(f"{name}: {path} is missing")
        elif _sha256(path) != expected:
            wrong.append(f"{name}: {path} is not the file that the note names: draw it again")
    return wrong


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
