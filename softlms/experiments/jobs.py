"""Runs in parallel."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
import transformers
from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor

from softlms.experiments.recipe import Recipe
from softlms.experiments.store import Run
from softlms.methods.base import Method
from softlms.methods.registry import methods, register

__all__ = ["Job", "available_processes", "be_quiet", "run_jobs", "tell_stored"]


@dataclass(frozen=True)
class Job:
    """One method at one seed, on one bench."""

    bench: Any  # a Bench, which imports this
    method: str
    recipe: Recipe
    seed: int


def available_processes(threads: int = 1) -> int:
    """How many runs of so many threads go in parallel: on two cores at most; one if there is an accelerator.

    joblib's variable LOKY_MAX_CPU_COUNT lowers the number of cores.
    """
    return 1 if torch.cuda.is_available() else max(1, min(2, cpu_count()) // threads)


def tell_stored(jobs: Iterable[Job]) -> Iterator[str]:
    """Lines to print: how many runs are stored, and why the others must be done."""
    once = list(dict.fromkeys(jobs))
    missing = [job for job in once if job.bench.stored(job.method, job.recipe, job.seed) is None]
    yield f"{len(once) - len(missing)} of {len(once)} runs are stored"
    reasons = Counter(job.bench.why_missing(job.method, job.recipe, job.seed) for job in missing)
    for reason, number in reasons.most_common():
        yield f"{number} to do: {reason}"


def run_jobs(units: Sequence[Sequence[Job]], processes: int) -> Iterator[tuple[Job, Run]]:
    """Do all jobs and yield each with its run as it ends; stored ones come first.

    Parameters
    ----------
    units : sequence of sequence of Job
        The jobs of a unit run one after the other in one process, which keeps what they share (the dense model, its
        factors). Units run in parallel and start in the given order. If two need the same dense model, one trains it
        and the other waits.
    processes : int
        Units at a time; with 1 everything runs in this process.

    Raises
    ------
    Exception
        The error of a job. Jobs running at the same time are finished and stored first; no other job starts.
    """
    left: list[list[Job]] = []
    for unit in units:
        left.append([])
        for job in unit:
            if run := job.bench.stored(job.method, job.recipe, job.seed):
                yield job, run
            else:
                left[-1].append(job)
    left = [unit for unit in left if unit]
    if processes > 1 and len(left) > 1:
        yield from _side_by_side(left, processes)
    for unit in left:
        for job in unit:
            yield job, job.bench.run(job.method, job.recipe, job.seed)


def _side_by_side(left: list[list[Job]], processes: int) -> Iterator[tuple[Job, Run]]:
    """Run the units in other processes; a job is removed from `left` once its run is stored."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as beside:
        stop = Path(folder) / "stop"
        with parallel_config("loky", inner_max_num_threads=1, initializer=_begin, initargs=_begun_by()):
            pool = Parallel(processes, pre_dispatch="all", batch_size=1, max_nbytes=None)
        work = beside.submit(pool, [delayed(_work)(tuple(unit), stop) for unit in left])
        try:
            ended = False
            while not ended:
                ended = bool(wait([work], timeout=0.5).done)
                for unit in [unit for unit in left if unit][:processes]:  # those running
                    while unit and (run := unit[0].bench.stored(unit[0].method, unit[0].recipe, unit[0].seed)):
                        yield unit.pop(0), run
            for error in filter(None, work.result()):
                raise error
        finally:
            stop.touch()
            wait([work])
            get_reusable_executor(reuse=True).shutdown()  # idle workers would hold their memory for minutes


def _work(unit: Sequence[Job], stop: Path) -> Exception | None:
    """Do the jobs of a unit until one fails, here or in another process; raising would end the other one too."""
    bench = unit[0].bench  # one object for all, so that they share its memory
    try:
        for job in unit:
            if not stop.exists():
                bench.run(job.method, job.recipe, job.seed)
    except Exception as error:
        stop.touch()
        error.add_note(traceback.format_exc())
        return error
    return None


def _begun_by() -> tuple[int, list[Method]]:
    """What other processes need from this one: its id, and the methods registered in it."""
    return os.getpid(), list(methods().values())


def _begin(parent: int, known: Sequence[Method]) -> None:
    """Make this process quiet, and end it when its parent ends or is killed."""
    register(*known)

    def follow() -> None:
        while os.getppid() == parent and psutil.pid_exists(parent):  # on Windows the first never changes
            time.sleep(0.5)
        os._exit(1)

    be_quiet()
    threading.Thread(target=follow, daemon=True).start()


def be_quiet() -> None:
    """Hide short progress bars and reports of a new head: both are expected when many models are made."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
