"""Notebooks side by side, each in a process of its own (one process has one working folder)."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from softlms.workbook.progress import Progress
from softlms.workbook.reads import follows_others

__all__ = ["Ending", "Work", "check_kernel", "run_notebooks"]

KERNEL = "python3"


@dataclass(frozen=True)
class Work:
    """A notebook, where its executed copy goes, and its parameters."""

    notebook: Path
    executed: Path
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.notebook.stem


@dataclass(frozen=True)
class Ending:
    """How a notebook ended: the error, if one ended it, the last cell that ran, and where the executed copy lies."""

    seconds: float
    error: str | None
    cell: int
    copy: str | None


def check_kernel() -> tuple[str, str]:
    """See whether the notebooks' kernel is installed.

    Returns
    -------
    tuple of str
        The folder that describes it, and the program that it starts: this Python where that says just ``python``.

    Raises
    ------
    ValueError
        It is not there, its description cannot be read, or its interpreter is gone; with what mends it.
    """
    folder = KernelSpecManager().find_kernel_specs().get(KERNEL)
    if folder is None:
        raise ValueError(f"The Jupyter kernel {KERNEL!r} is missing; run: {sys.executable} -m pip install ipykernel")
    try:
        command = KernelManager(kernel_name=KERNEL).format_kernel_cmd()[0]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{folder}/kernel.json cannot be read: {error}; {_remove(folder)}") from None
    if shutil.which(command) is None:
        raise ValueError(f"{folder}/kernel.json starts {command}, which is not there; {_remove(folder)}")
    return folder, command


def _remove(folder: str) -> str:
    return f"remove {folder}: {sys.executable} brings its own"


def run_notebooks(
    works: Sequence[Work],
    jobs: int,
    environment: Mapping[str, str],
    progress: Progress,
    before: Callable[[Work], None],
) -> Generator[tuple[Work, Ending]]:
    """Run notebooks and yield each as it ends; one that fails does not stop the others.

    Parameters
    ----------
    works : sequence of Work
        They start in this order; one that reads what the others write waits for those before it.
    jobs : int
        So many at a time.
    environment : mapping
        Variables of the processes.
    progress : Progress
        Is told what happens.
    before : callable
        Is called when a notebook is about to start.

    Notes
    -----
    Where the generator is left early, by Ctrl-C or an error, the notebooks that run are stopped. They stop as well when
    this process is killed; see `softlms.workbook.process`.
    """
    waiting, running = list(works), list[_Running]()
    events: queue.Queue[tuple[_Running, dict[str, Any] | None]] = queue.Queue()
    try:
        while waiting or running:
            while waiting and len(running) < jobs and not (running and follows_others(waiting[0].name)):
                before(waiting[0])
                running.append(_Running(waiting.pop(0), environment, events))
                progress.start(running[-1].work.name)
            try:
                one, event = events.get(timeout=1)
            except queue.Empty:
                progress.tick()
                continue
            if event is None:
                running.remove(one)
                ending = one.ending()
                progress.end(one.work.name, ending.seconds, ending.error)
                yield one.work, ending
            else:
                progress.cell(one.work.name, event["cell"], event["of"])
    finally:
        for one in running:
            one.stop()


class _Running:
    """A notebook's process, and a thread that passes on what it tells; None when it tells no more."""

    def __init__(self, work: Work, environment: Mapping[str, str], events: queue.Queue) -> None:
        self.work, self._started = work, time.monotonic()
        self._last: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        script = Path(__file__).with_name("process.py")
        arguments = [str(work.notebook), str(work.executed), KERNEL, json.dumps(work.parameters)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), *arguments],  # -P: its folder holds softlms's modules, not libraries
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=work.notebook.parent,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C is for the driver alone, which stops the others
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
        """How the process ended, which told all that it had to."""
        status, seconds = self._close(), time.monotonic() - self._started
        if self._last:
            return Ending(seconds, self._last["error"], self._last["cell"], self._last["copy"])
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return Ending(seconds, ": ".join([f"its process ended with status {status}", *said]), 0, None)

    def stop(self) -> None:
        """Make the process stop its kernel and end, and wait for it."""
        self._close()

    def _close(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
