"""Runs side by side, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers

if TYPE_CHECKING:
    from softlms.experiments.bench import Bench, Run
    from softlms.experiments.recipe import Recipe

__all__ = ["Job", "available_processes", "be_quiet", "run_jobs", "tell_stored"]


@dataclass(frozen=True)
class Job:
    """One method at one seed, on one bench."""

    bench: Bench
    method: str
    recipe: Recipe
    seed: int


def available_processes() -> int:
    """How many runs this machine takes side by side: its cores, two at most; one where an accelerator does the work."""
    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def tell_stored(jobs: Iterable[Job]) -> Iterator[str]:
    """Lines for people: how many of the runs are stored, and why the others are to be done."""
    once = list(dict.fromkeys(jobs))
    missing = [job for job in once if job.bench.stored(job.method, job.recipe, job.seed) is None]
    yield f"{len(once) - len(missing)} of {len(once)} runs are stored"
    reasons = Counter(job.bench.why_missing(job.method, job.recipe, job.seed) for job in missing)
    for reason, number in reasons.most_common():
        yield f"{number} to do: {reason}"


def run_jobs(units: Sequence[Sequence[Job]], processes: int) -> Iterator[tuple[Job, Run]]:
    """Do all jobs and yield each with its run as it ends; those that were done before come first.

    Parameters
    ----------
    units : sequence of sequence of Job
        The jobs of a unit run in one process, one after the other (they share the dense model and its factors); units
        run side by side; a dense model that two of them need is trained by one while the other waits. They start in
        the order given.
    processes : int
        Units at a time; with 1 all happens in this process.

    Raises
    ------
    Exception
        Whatever a job raised. The job that runs beside it is done first; nothing else is started, and what is
        finished is stored.
    """
    missing: list[list[Job]] = []
    for unit in units:
        missing.append([])
        for job in unit:
            run = job.bench.stored(job.method, job.recipe, job.seed)
            if run is None:
                missing[-1].append(job)
            else:
                yield job, run
    units = [unit for unit in missing if unit]
    if processes == 1 or len(units) < 2:
        for unit in units:
            for job in unit:
                yield job, job.bench.run(job.method, job.recipe, job.seed)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    manager = SyncManager(ctx=context)
    manager.start(_end_with_parent)
    with manager, ProcessPoolExecutor(processes, context, _begin) as pool:
        finished: Any = manager.Queue()
        stop: Any = manager.Event()
        futures = [pool.submit(_work, unit, number, finished, stop) for number, unit in enumerate(units)]
        try:
            yield from _collect(units, futures, finished)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _collect(units: Sequence[Sequence[Job]], futures: list[Future], finished: Any) -> Iterator[tuple[Job, Run]]:
    left = sum(map(len, units))
    while left:
        try:
            unit, job, run = finished.get(timeout=0.5)
        except queue.Empty:
            for future in futures:
                if future.done() and future.exception() is not None:
                    raise future.exception() from None  # type: ignore[misc]
            continue
        left -= 1
        yield units[unit][job], run


def be_quiet() -> None:
    """No bars of a second, and no report of a new head: both are expected where many models are made."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _begin() -> None:
    be_quiet()
    _end_with_parent()


def _end_with_parent() -> None:
    """Make this process end when the one that started it does, even where that is killed."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(unit: Sequence[Job], number: int, finished: Any, stop: Any) -> None:
    bench = unit[0].bench  # one object for all, so that they share what it keeps in memory
    for i, job in enumerate(unit):
        if stop.is_set():
            return
        finished.put((number, i, bench.run(job.method, job.recipe, job.seed)))
