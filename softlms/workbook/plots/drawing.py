"""Every figure of the workbook by name: the tables it is drawn from, how, and a note beside it that says so.

A figure is drawn from the CSV files that its notebook wrote, never from what is in memory: the notebook and
``softlms figures --replot`` make the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from softlms.files import whole_file
from softlms.workbook.plots import claim_pictures, grid_pictures, pictures
from softlms.workbook.plots.style import save_figure

__all__ = ["DRAWINGS", "Drawing", "check_drawing", "draw"]


@dataclass(frozen=True)
class Drawing:
    """How a figure is made.

    Attributes
    ----------
    plot : callable
        Takes the tables, in their order, and returns the figure.
    tables : tuple of str
        CSV files in ``results/<profile>``, without ending; none where all comes from formulas.
    """

    plot: Callable[..., Figure]
    tables: tuple[str, ...] = ()


DRAWINGS: dict[str, Drawing] = {
    "00_quickstart": Drawing(pictures.plot_quickstart, ("00_quickstart_history", "00_quickstart_ranks")),
    "01_threshold_functions_functions": Drawing(pictures.plot_threshold_functions),
    "01_threshold_functions_gradients": Drawing(pictures.plot_threshold_gradients),
    "01_threshold_functions_spectrum": Drawing(pictures.plot_spectra, ("01_threshold_functions_spectra",)),
    "02_compression_loss_curves": Drawing(pictures.plot_compression_losses),
    "02_compression_loss_training": Drawing(pictures.plot_compressing, ("02_compression_loss",)),
    "03_block_sensitivity": Drawing(pictures.plot_block_sensitivity, ("03_block_sensitivity",)),
    "04_static_vs_adaptive_rank": Drawing(
        pictures.plot_static_and_adaptive, ("04_static_vs_adaptive_rank", "04_static_vs_adaptive_rank_ranks")
    ),
    "04_static_vs_adaptive_rank_ranks": Drawing(pictures.plot_learned_ranks, ("04_static_vs_adaptive_rank_ranks",)),
    "09_speedup": Drawing(pictures.plot_speed, ("09_speedup",)),
    "10_paper_vs_reproduced": Drawing(claim_pictures.plot_claims, ("10_paper_vs_reproduced",)),
}
for _table in ("05_bert_table", "06_gpt2_table", "07_tinyllama_table", "08_mamba_table"):
    DRAWINGS[_table] = Drawing(grid_pictures.plot_quality, (_table,))
    DRAWINGS[f"{_table}_ranks"] = Drawing(grid_pictures.plot_ranks, (f"{_table}_ranks",))


def draw(name: str, figures: Path, results: Path) -> list[Path]:
    """Draw a figure from its tables and write it as PNG and PDF, with a note of what was drawn beside them.

    Parameters
    ----------
    name : str
        A key of `DRAWINGS`.
    figures, results : Path
        Folders of one profile.

    Returns
    -------
    list of Path
        The files written. The figure stays open: a notebook shows it.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown figure, or a table of it is missing: nothing is written then.
    """
    if name not in DRAWINGS:
        raise ValueError(f"Unknown figure {name!r}; known: {', '.join(sorted(DRAWINGS))}.")
    drawing = DRAWINGS[name]
    paths = [results / f"{table}.csv" for table in drawing.tables]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {name} is drawn from it. Run the notebook that writes it.")
    tables = [pd.read_csv(path) for path in paths]
    fig = drawing.plot(*tables)
    files = save_figure(fig, figures, name)
    note = {
        "figure": name,
        "drawn_by": f"{drawing.plot.__module__}.{drawing.plot.__name__}",
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
    """What does not match between a figure, the note beside it and the tables; empty where all does.

    Parameters
    ----------
    name, figures, results
        See `draw`.
    """
    beside, parts = figures / f"{name}.json", ((results, "tables"), (figures, "files"))
    if not beside.is_file():
        return [f"{name}: {beside} is missing"]
    if name not in DRAWINGS:
        return [f"{name}: {beside} is of no figure that is known"]
    try:
        note: dict[str, Any] = json.loads(beside.read_text("utf-8"))
        hashes = {folder / entry["file"]: entry["sha256"] for folder, key in parts for entry in note[key]}
    except (ValueError, KeyError, TypeError):
        return [f"{name}: {beside} cannot be read: draw it again"]
    due = {results / f"{table}.csv" for table in DRAWINGS[name].tables}
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
