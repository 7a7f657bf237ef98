"""Notebooks in parallel, each in its own process.

`run_notebooks` starts this file once for each notebook. It imports nothing from softlms, so that the process need not
wait for torch. The process reports on standard output, one JSON object per line. Its standard input only shows whether
the driver is alive: when it closes, for whatever reason, the process stops the kernel and everything it started, and
removes partial files. This needs no signals and works on every system.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbformat import NotebookNode

if TYPE_CHECKING:
    from softlms.workbook.progress import Progress

__all__ = ["Ending", "Work", "check_kernel", "run_notebooks"]

KERNEL = "python3"
CELL_TIMEOUT = 12 * 3600  # seconds; papermill would wait forever


@dataclass(frozen=True)
class Work:
    """A notebook, the path of its executed copy, its parameters, and whether it must wait for those before it."""

    notebook: Path
    executed: Path
    parameters: Mapping[str, Any]
    waits: bool = False

    @property
    def name(self) -> str:
        return self.notebook.stem


@dataclass(frozen=True)
class Ending:
    """How a notebook ended: an error if there was one, the last cell that ran, and the executed copy."""

    seconds: float
    error: str | None
    cell: int
    copy: str | None


def check_kernel() -> tuple[str, str]:
    """Check that the notebooks' kernel is installed.

    Returns
    -------
    tuple of str
        The folder of its kernel spec, and the program that it starts.

    Raises
    ------
    ValueError
        The kernel or its interpreter is missing, or its kernel spec cannot be read; the message says what to do.
    """
    folder = KernelSpecManager().find_kernel_specs().get(KERNEL)
    if folder is None:
        raise ValueError(f"The Jupyter kernel {KERNEL!r} is missing; run: {sys.executable} -m pip install ipykernel")
    fix = f"remove {folder}: {sys.executable} brings its own"
    try:
        command = KernelManager(kernel_name=KERNEL).format_kernel_cmd()[0]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{folder}/kernel.json cannot be read: {error}; {fix}") from None
    if shutil.which(command) is None:
        raise ValueError(f"{folder}/kernel.json starts {command}, which does not exist; {fix}")
    return folder, command


def run_notebooks(
    works: Sequence[Work],
    jobs: int,
    environment: Mapping[str, str],
    progress: Progress,
    before: Callable[[Work], None],
) -> Generator[tuple[Work, Ending]]:
    """Run notebooks in this order and yield each as it ends; a failure does not stop the others.

    Parameters
    ----------
    works : sequence of Work
    jobs : int
        Notebooks at a time.
    environment : mapping
        Environment variables of the processes.
    progress : Progress
        Receives all events.
    before : callable
        Called when a notebook is about to start.

    Notes
    -----
    When the generator is closed early, by Ctrl-C or an error, the running notebooks are stopped. They also stop when
    this process is killed.
    """
    waiting, running = list(works), list[_Process]()
    events: queue.Queue[tuple[_Process, dict[str, Any] | None]] = queue.Queue()
    try:
        while waiting or running:
            while waiting and len(running) < jobs and not (running and waiting[0].waits):
                before(waiting[0])
                running.append(_Process(waiting.pop(0), environment, events))
                progress.start(running[-1].work.name)
            try:
                process, event = events.get(timeout=1)
            except queue.Empty:
                progress.tick()
                continue
            if event is None:
                running.remove(process)
                ending = process.ending()
                progress.end(process.work.name, ending.seconds, ending.error)
                yield process.work, ending
            else:
                progress.cell(process.work.name, event["cell"], event["of"])
    finally:
        for process in running:
            process.close()


class _Process:
    """A notebook's process, and a thread that passes its reports on, with None after the last one."""

    def __init__(self, work: Work, environment: Mapping[str, str], events: queue.Queue) -> None:
        self.work, self._started = work, time.monotonic()
        self._last: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        arguments = [str(work.notebook), str(work.executed), json.dumps(work.parameters)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, *arguments],  # -P: its folder holds softlms's modules, not libraries
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=work.notebook.parent,
            env=dict(environment),
            start_new_session=True,  # only the driver gets Ctrl-C, and stops the others
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.Queue) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if "error" in event:
                self._last = event
            else:
                events.put((self, event))
        events.put((self, None))

    def ending(self) -> Ending:
        """How the process ended, after its last report."""
        status, seconds = self.close(), time.monotonic() - self._started
        if self._last:
            return Ending(seconds, **self._last)
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return Ending(seconds, ": ".join([f"its process ended with status {status}", *said]), 0, None)

    def close(self) -> int:
        """Make the process stop its kernel and end; returns its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _run_notebook(notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook in this process; report the start of each cell, and finally how it ended.

    The executed copy appears only when complete; after a failure as ``NAME.failed.ipynb``, and an older good one stays.
    """
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # a kernel's standard output must not mix with the reports
    failed = executed.with_name(f"{executed.stem}.failed.ipynb")
    partial = executed.with_name(f".{executed.stem}.ipynb.partial-{socket.gethostname()}-{os.getpid()}.ipynb")
    threading.Thread(target=_end_with_driver, args=(partial,), daemon=True).start()
    total, number = _count_cells(nbformat.read(notebook, as_version=4)) + bool(parameters), 0

    def tell_cell(cell: NotebookNode, cell_index: int) -> None:
        nonlocal number
        number += 1
        print(json.dumps({"cell": number, "of": total}), file=events)

    error = copy = None
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            parameters=parameters,
            kernel_name=KERNEL,
            progress_bar=False,
            start_timeout=120,
            execution_timeout=CELL_TIMEOUT,
            iopub_timeout=60,
            record_timing=False,
            store_widget_state=False,
            on_cell_execute=tell_cell,
            extra_arguments=["--Application.log_level=ERROR"],  # a line about TCP at each kernel's start
        )
        if number < total:  # papermill treats sys.exit() as success
            error = "the notebook ended itself before its last cell"
    except papermill.PapermillExecutionError as failure:
        error = f"{failure.ename}: {_first_line(failure.evalue)}"
    except Exception as failure:  # a kernel that dies, a full disk
        if isinstance(failure, OSError):
            failure.filename = failure.filename or str(executed)  # papermill writes the copy after each cell
        error = _describe(failure)
    try:
        copy = str(_keep(partial, failed if error else executed))
        if not error:
            failed.unlink(missing_ok=True)
    except (OSError, ValueError) as failure:  # no copy is better than a partial one
        error = error or _describe(failure)
    finally:
        partial.unlink(missing_ok=True)
    print(json.dumps({"error": error, "cell": number, "copy": copy}), file=events)


def _count_cells(book: NotebookNode) -> int:
    """Cells that will run, as nbclient decides it."""
    code = [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]
    return sum("skip-execution" not in cell.metadata.get("tags", []) for cell in code)


def _keep(partial: Path, place: Path) -> Path:
    book = nbformat.read(partial, as_version=4)  # an error if it is incomplete
    book.metadata.papermill["output_path"] = str(place)
    nbformat.write(book, partial)
    return partial.replace(place)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(str(error))}"


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
    _run_notebook(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
