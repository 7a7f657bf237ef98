"""One notebook in a process of its own; `softlms.workbook.batch` starts this file by its path.

It imports nothing of softlms, so that it need not wait for torch. What happens goes to standard output, one JSON object
a line. Standard input says only whether the driver lives: when it closes, however the driver ended, the kernel and all
that it started are stopped and what is half-written is taken away. This needs no signal and works on every system.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
from nbformat import NotebookNode

__all__ = ["run_notebook"]

CELL_TIMEOUT = 12 * 3600  # seconds; papermill would wait for ever


def run_notebook(notebook: Path, executed: Path, kernel: str, parameters: dict[str, Any]) -> None:
    """Run a notebook and tell each cell's start, and at last how it ended.

    Parameters
    ----------
    notebook, executed : Path
        What is run, and where its executed copy goes when it is whole. After a failure that copy goes to
        ``NAME.failed.ipynb``, and an older good one stays.
    kernel : str
    parameters : dict
        Those that papermill injects.
    """
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what a kernel writes to its standard output is no event

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=events)

    failed = executed.with_name(f"{executed.stem}.failed.ipynb")
    partial = executed.with_name(f".{executed.stem}.ipynb.partial-{socket.gethostname()}-{os.getpid()}.ipynb")
    threading.Thread(target=_end_with_driver, args=(partial,), daemon=True).start()
    total, number = _count_cells(nbformat.read(notebook, as_version=4)) + bool(parameters), 0

    def tell_cell(cell: NotebookNode, cell_index: int) -> None:
        nonlocal number
        number += 1
        tell(cell=number, of=total)

    error = None
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            parameters=parameters,
            kernel_name=kernel,
            progress_bar=False,
            start_timeout=120,
            execution_timeout=CELL_TIMEOUT,
            iopub_timeout=60,
            record_timing=False,
            store_widget_state=False,
            on_cell_execute=tell_cell,
            extra_arguments=["--Application.log_level=ERROR"],  # a line about TCP at each kernel's start
        )
        if number < total:  # papermill takes sys.exit() for an end like any other
            error = "the notebook ended itself before its last cell"
    except papermill.PapermillExecutionError as failure:
        error = f"{failure.ename}: {_first_line(failure.evalue)}"
    except Exception as failure:  # a kernel that dies, a full disk
        if isinstance(failure, OSError):
            failure.filename = failure.filename or str(executed)  # papermill writes the copy after each cell
        error = f"{type(failure).__name__}: {_first_line(str(failure))}"
    copy = None
    try:
        copy = _keep(partial, failed if error else executed)
        if not error:
            failed.unlink(missing_ok=True)
    except (OSError, ValueError) as failure:  # no copy is better than half of one
        error = error or f"{type(failure).__name__}: {_first_line(str(failure))}"
    finally:
        partial.unlink(missing_ok=True)
    tell(error=error, cell=number, copy=copy and str(copy))


def _count_cells(book: NotebookNode) -> int:
    """Cells that will run, as nbclient decides it."""
    code = [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]
    return sum("skip-execution" not in cell.metadata.get("tags", []) for cell in code)


def _keep(partial: Path, place: Path) -> Path:
    book = nbformat.read(partial, as_version=4)  # an error where it is not whole
    book.metadata.papermill["output_path"] = str(place)
    nbformat.write(book, partial)
    return partial.replace(place)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def _end_with_driver(partial: Path) -> None:
    while os.read(0, 1):
        pass
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    partial.unlink(missing_ok=True)
    os._exit(1)


if __name__ == "__main__":
    run_notebook(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
