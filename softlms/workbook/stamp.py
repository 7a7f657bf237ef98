"""Committed notebooks: executed and stamped by ``softlms stamp``, run under nbval by ``softlms check-notebooks``.

A stamp records what a notebook's outputs were made from. If its own sources or the tables that it reads have changed,
the check fails. If the library or the pinned versions have changed, it only warns; otherwise each commit to the library
would require half an hour of execution.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from softlms.experiments.closure import library_hash
from softlms.utils.files import whole_file
from softlms.workbook.lint import lint
from softlms.workbook.registry import LANES, choose_notebooks, keep_seconds, project_root, read_complete_registry
from softlms.workbook.state import read_tables

__all__ = ["OWN_PARTS", "check_notebooks", "describe", "make_stamp", "stale_parts", "stamp_notebooks"]

CELL_TIMEOUT_S = 1800
OWN_PARTS = {"source", "tables"}  # if these change, the outputs are wrong; if others change, they may be
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"  # an id of one run, useless without its kernel


def make_stamp(name: str, book: dict[str, Any], root: Path) -> dict[str, str]:
    """Hashes of what a notebook's outputs depend on.

    Parameters
    ----------
    name : str
        The notebook's name.
    book : dict
        Its JSON; its code cells count, its prose does not.
    root : Path
        The checkout, for its ``requirements.txt`` and ``results``.

    Returns
    -------
    dict
        ``source``, ``tables`` (committed ones that it reads), ``library`` (all modules without comments and docstrings)
        and ``environment`` (the pinned versions and Python's own).
    """
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    pins = [line for line in (root / "requirements.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    return {
        "source": _digest(code),
        "tables": _digest([*read_tables(root, name).items()]),
        "library": library_hash(),
        "environment": _digest([*pins, f"python {sys.version_info.major}.{sys.version_info.minor}"]),
    }


def stale_parts(name: str, book: dict[str, Any], root: Path) -> list[str]:
    """Which parts of a notebook's stamp have changed: none if it is fresh, all if it has no stamp."""
    stamp = book["metadata"].get("softlms", {}).get("stamp", {})
    return [part for part, value in make_stamp(name, book, root).items() if stamp.get(part) != value]


def describe(stale: Sequence[str]) -> str:
    """The result of `stale_parts`, in words."""
    return f"{' and '.join(stale)} changed since it was stamped"


def stamp_notebooks(names: Sequence[str] = (), *, check: bool = False) -> int:
    """Execute notebooks in place with profile quick, and stamp them.

    A notebook that fails, or does not pass `softlms.workbook.lint.lint` afterwards, stays unchanged; the others go on.

    Parameters
    ----------
    names : sequence of str
        Notebooks by name or its beginning (``03``); all when empty.
    check : bool
        Execute nothing; report which are stale, and why.

    Returns
    -------
    int
        Exit status: 0, or 1 if a notebook failed or, with `check`, is stale.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown notebook, one without an entry in ``notebooks.toml``, or no checkout: before anything runs.
    """
    root = project_root()
    registry, status = read_complete_registry(root), 0
    for path in choose_notebooks(root / "notebooks", names):
        if check:
            stale = stale_parts(path.stem, json.loads(path.read_text("utf-8")), root)
            said = f"stale, {describe(stale)}" if stale else "fresh"
            status |= bool(stale)
        else:
            said = _execute(path, registry[path.stem].lane, root)
            status |= said != "executed"
        print(f"{path.stem}: {said}", flush=True)
    return status


def check_notebooks(names: Sequence[str] = ()) -> int:
    """Run notebooks under nbval, two at a time; any that could pass without a check fails before anything runs.

    Parameters
    ----------
    names : sequence of str
        Notebooks by name or its beginning (``03``); all when empty.

    Returns
    -------
    int
        Exit status: 0, or 1 if a notebook failed.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown notebook, an incomplete ``notebooks.toml``, or no checkout.
    """
    root = project_root()
    registry = read_complete_registry(root)
    rounds: dict[tuple[bool, str], list[str]] = {}
    faults = []
    chosen = choose_notebooks(root / "notebooks", names)
    longest_first = sorted(chosen, key=lambda path: -registry[path.stem].typical_seconds("quick"))
    for path in longest_first:
        name, notebook = path.stem, registry[path.stem]
        rounds.setdefault((notebook.follows_others, notebook.lane), []).append(str(path))
        book = json.loads(path.read_text("utf-8"))
        faults += [f"{name}: {fault}" for fault in lint(book, notebook.lane)]
        stale = stale_parts(name, book, root)
        if OWN_PARTS & set(stale):
            faults.append(f"{name}: stale, {describe(stale)}: run softlms stamp {name}")
        elif stale:
            print(f"warning: {name} is stale, {describe(stale)}", flush=True)
    if faults:
        print("\n".join(faults))
        return 1
    # nbval opens notebooks in the locale's encoding; two notebooks with two jobs each would share the cores badly
    environment = {"LOKY_MAX_CPU_COUNT": "1"} | os.environ | {"PYTHONUTF8": "1"}
    settings = ["--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT_S}", "--durations=8"]
    status = 0
    for (_, lane), paths in sorted(rounds.items()):
        together = ["-n", str(min(2, len(paths))), "--dist", "loadfile", "--no-loadscope-reorder"]
        command = [sys.executable, "-m", "pytest", LANES[lane], *settings, *together, *paths]
        status |= bool(subprocess.run(command, cwd=root, env=environment).returncode)
    return status


def _execute(path: Path, lane: str, root: Path) -> str:
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
        # started here, because execute() leaves a hook that fails at exit if the kernel does not start
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
    faults = lint(book, lane)
    if faults:
        return f"left as it was: {'; '.join(faults)}"
    if path.read_bytes() != before:
        return "left as it was: it was edited while it ran"
    with whole_file(path) as partial:
        nbformat.write(book, partial)
    keep_seconds(root, path.stem, seconds)
    return "executed"


def _digest(lines: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()
