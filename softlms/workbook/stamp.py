"""Stamps: whether a notebook's committed outputs are those of its sources, this library and these versions.

A notebook whose own sources changed since it was executed, or committed tables that it reads, fails CI. A change of the
library or of the pinned versions makes it stale too, and CI only warns: else each commit to the library would ask for a
quarter of an hour of execution.
``softlms stamp`` executes and stamps, and keeps how long that took (`durations.py`); ``softlms stamp --check``
says what is stale, and why.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from softlms.experiments.closure import library_hash
from softlms.files import whole_file
from softlms.workbook.durations import keep_seconds
from softlms.workbook.folders import project_root
from softlms.workbook.lanes import read_lanes
from softlms.workbook.lint import lint
from softlms.workbook.reads import read_tables
from softlms.workbook.run import choose_notebooks

__all__ = ["CELL_TIMEOUT_S", "OWN_PARTS", "describe", "make_stamp", "stale_parts", "stamp_notebooks"]

CELL_TIMEOUT_S = 1800
OWN_PARTS = {"source", "tables"}  # where they changed the outputs are wrong; of the others, maybe
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"  # an id of one run, of no use without its kernel


def make_stamp(name: str, book: dict[str, Any], root: Path) -> dict[str, str]:
    """Hashes of what a notebook's outputs depend on.

    Parameters
    ----------
    name : str
        The notebook's.
    book : dict
        Its JSON; its code cells count, its prose does not.
    root : Path
        The checkout, for its ``requirements.txt`` and ``results``.

    Returns
    -------
    dict
        ``source``, ``tables`` (committed ones that it reads: `reads.py`), ``library`` (all modules, without
        comments and docstrings) and ``environment`` (the pinned versions and Python's own).
    """
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    pins = [line for line in (root / "requirements.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    return {
        "source": _digest(code),
        "tables": _digest([*read_tables(root / "results", name).items()]),
        "library": library_hash(),
        "environment": _digest([*pins, f"python {sys.version_info.major}.{sys.version_info.minor}"]),
    }


def stale_parts(name: str, book: dict[str, Any], root: Path) -> list[str]:
    """Which parts of a notebook's stamp are not those of today: none where it is fresh, all where it has no stamp."""
    stamp = book["metadata"].get("softlms", {}).get("stamp", {})
    return [part for part, value in make_stamp(name, book, root).items() if stamp.get(part) != value]


def describe(stale: Sequence[str]) -> str:
    """What `stale_parts` found, in words."""
    return f"{' and '.join(stale)} changed since it was stamped"


def stamp_notebooks(names: Sequence[str] = (), *, check: bool = False) -> int:
    """Execute notebooks in place on the profile that their parameters name, ``quick``, and stamp them.

    A notebook that fails, or that does not pass `softlms.workbook.lint.lint` afterwards, stays as it was; the others go
    on.

    Parameters
    ----------
    names : sequence of str
        Notebooks by name or by its beginning (``03``); all when empty.
    check : bool
        Execute nothing, say which are stale and why.

    Returns
    -------
    int
        Exit status: 0, or 1 if a notebook failed or, with `check`, is stale.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown notebook, one without an entry in ``lanes.toml``, or no checkout: before anything runs.
    """
    root = project_root()
    checks = {path: check for job in read_lanes(root / "notebooks").values() for path, check in job.items()}
    status = 0
    for path in choose_notebooks(root / "notebooks", names):
        if check:
            stale = stale_parts(path.stem, json.loads(path.read_text("utf-8")), root)
            said = f"stale, {describe(stale)}" if stale else "fresh"
            status |= bool(stale)
        else:
            said = _execute(path, checks[path], root)
            status |= said != "executed"
        print(f"{path.stem}: {said}", flush=True)
    return status


def _execute(path: Path, check: str, root: Path) -> str:
    before = path.read_bytes()
    book = nbformat.reads(before.decode("utf-8"), as_version=4)
    client = NotebookClient(
        book,
        kernel_name=KERNEL["name"],
        timeout=CELL_TIMEOUT_S,
        startup_timeout=120,
        iopub_timeout=60,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--Application.log_level=ERROR"],  # a line about TCP at each kernel's start
    )
    started = time.monotonic()
    try:
        # started here, as execute() leaves a hook that fails at exit where the kernel does not start
        client.create_kernel_manager()
        client.start_new_kernel()
        client.start_new_kernel_client()
        client.execute()
        seconds = time.monotonic() - started
    except CellExecutionError as failure:
        return f"failed, and left as it was: {failure.ename}: {failure.evalue}"
    except Exception as failure:  # a kernel that does not start, or that dies
        return f"failed, and left as it was: {type(failure).__name__}: {failure}"
    book.metadata = {
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
        "softlms": {"stamp": make_stamp(path.stem, book, root)},
    }
    for cell in book.cells:
        for name in ("execution", "papermill"):
            cell.metadata.pop(name, None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)
    faults = lint(book, check)
    if faults:
        return f"left as it was: {'; '.join(faults)}"
    if path.read_bytes() != before:
        return "left as it was: it was edited while it ran"
    with whole_file(path) as partial:
        nbformat.write(book, partial)
    keep_seconds(path.parent, path.stem, seconds)
    return "executed"


def _digest(lines: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()
