"""The command ``softlms figures``: notebooks through papermill, checked before, resumed, told about after."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from softlms.data.hub import is_hub
from softlms.experiments.profiles import PROFILES
from softlms.files import check_writable, remove_leftovers
from softlms.workbook.batch import Ending, Work, check_kernel, run_notebooks
from softlms.workbook.book import DATA_VARIABLE
from softlms.workbook.finished import depends_on, mark_finished, reason_to_run, stored_seconds, unmark
from softlms.workbook.folders import Folders, project_root
from softlms.workbook.parameters import assign_parameters, split_assignments
from softlms.workbook.progress import Progress, clock, say
from softlms.workbook.reads import follows_others
from softlms.workbook.replot import replot

__all__ = ["choose_notebooks", "make_figures", "replot_figures"]

INTERRUPTED = 130  # as a shell says it


def make_figures(
    names: Sequence[str] = (),
    *,
    profile: str = "quick",
    data: str = "",
    model: str = "",
    text: str = "",
    parameters: Sequence[str] = (),
    jobs: int = 1,
    resume: bool = False,
    console: Console | None = None,
) -> int:
    """Run notebooks headless, each in a process of its own; a failure does not stop the others.

    Parameters
    ----------
    names : sequence of str
        Notebooks by name or by its beginning (``03``); all when empty.
    profile, data, model : str
        See `softlms.workbook.book.open_book`; a notebook gets those that it has.
    text : str
        See `softlms.workbook.book.open_language_book`.
    parameters : sequence of str
        Others, as ``name=value``.
    jobs : int
        Notebooks at a time; the runs inside of one may use two processes.
    resume : bool
        Leave out notebooks that are finished: for the same cells, parameters, tables that they read, library, versions
        and machine, with all that they wrote still there.
    console : rich.console.Console, optional
        Where progress and the table go; errors go to standard error.

    Returns
    -------
    int
        Exit status: 0; 1 if a notebook failed; 130 after Ctrl-C.

    Raises
    ------
    ValueError, OSError
        Bad input, no checkout, no kernel, or a folder that cannot be written: before anything runs.
    """
    console = console or Console()
    if jobs < 1:
        raise ValueError(f"-j is {jobs}; it must be at least 1.")
    folders, chosen = _open(profile, names)
    # a folder is given from where the user stands, the notebooks run elsewhere
    options = {"data": _resolve("--data", data), "model": _resolve_model(model), "text": _resolve("--text", text)}
    environment = dict(os.environ)
    if environment.get(DATA_VARIABLE):
        environment[DATA_VARIABLE] = _resolve(DATA_VARIABLE, environment[DATA_VARIABLE])
    given = {"profile": profile} | {name: value for name, value in options.items() if value}
    assigned = assign_parameters(chosen, given | split_assignments(parameters))
    check_kernel()
    check_writable((folders.figures, folders.results, folders.executed, folders.runs))
    for file in remove_leftovers((folders.figures, folders.results, folders.executed)):
        say(console, f"removed {file.relative_to(folders.root)}, which a killed run left")
    works = [Work(notebook, folders.executed / notebook.name, assigned[notebook]) for notebook in chosen]
    if resume:
        reasons = {
            work.name: reason_to_run(folders, work.name, depends_on(work.notebook, work.parameters, environment))
            for work in works
        }
        if any(reasons.values()):
            followers = filter(follows_others, reasons)
            reasons |= {name: reasons[name] or "it reads what others write" for name in followers}
        for name, reason in reasons.items():
            say(console, f"{name}: {f'will run, {reason}' if reason else 'skipped, done before'}")
        works = [work for work in works if reasons[work.name]]
    try:
        outcomes = _run(works, folders, environment, jobs, console)
    except KeyboardInterrupt:
        _complain("stopped; what is finished stays, and the same command with --resume continues.")
        return INTERRUPTED
    console.print(_table([notebook.stem for notebook in chosen], outcomes, profile))
    for name, outcome in outcomes.items():
        if outcome.error:
            _complain(f"{name} failed in cell {outcome.cell}: {outcome.error} ({_copy(outcome, folders)})")
    return int(any(outcome.error for outcome in outcomes.values()))


def replot_figures(names: Sequence[str] = (), *, profile: str = "quick", console: Console | None = None) -> int:
    """Draw all figures of the chosen notebooks again from ``results/<profile>``; no notebook runs.

    Parameters
    ----------
    names, profile, console
        See `make_figures`. Where none is named, notebooks that have not run in this profile are left out.

    Returns
    -------
    int
        Exit status: 0, or 1 if a figure could not be drawn.

    Raises
    ------
    ValueError, OSError
        Bad input, no checkout, or a folder that cannot be written: before anything is drawn.
    """
    console = console or Console()
    folders, chosen = _open(profile, names)
    check_writable([folders.figures])
    remove_leftovers([folders.figures])
    wrong = replot([notebook.stem for notebook in chosen], folders, console, named=bool(names))
    for line in wrong:
        _complain(line)
    return int(bool(wrong))


@dataclass(frozen=True)
class Outcome(Ending):
    """An ending, and how many figures and tables were written."""

    figures: int
    tables: int


def _run(
    works: Sequence[Work],
    folders: Folders,
    environment: Mapping[str, str],
    jobs: int,
    console: Console,
) -> dict[str, Outcome]:
    outcomes = {}
    present: dict[str, dict[Path, tuple[int, int]]] = {}
    depends: dict[str, dict[str, Any]] = {}

    def prepare(work: Work) -> None:
        unmark(folders, work.name)
        depends[work.name] = depends_on(work.notebook, work.parameters, environment)
        present[work.name] = folders.written(work.name)

    seconds = {work.name: stored_seconds(folders, work.name) for work in works}
    with (
        Progress(console, seconds, jobs) as progress,
        contextlib.closing(run_notebooks(works, jobs, environment, progress, prepare)) as endings,
    ):
        for work, ending in endings:
            files = [
                file for file, state in folders.written(work.name).items() if present[work.name].get(file) != state
            ]
            if not ending.error:
                try:
                    mark_finished(folders, work.name, depends[work.name], files)
                except OSError as error:  # a full disk
                    ending = replace(ending, error=f"OSError: {error}")
            counts = (sum(file.suffix == kind for file in files) for kind in (".png", ".csv"))
            outcomes[work.name] = Outcome(ending.seconds, ending.error, ending.cell, ending.copy, *counts)
    return outcomes


def _open(profile: str, names: Sequence[str]) -> tuple[Folders, list[Path]]:
    if profile not in PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; known: {', '.join(PROFILES)}.")
    root = project_root()
    return Folders(root, profile), choose_notebooks(root / "notebooks", names)


def choose_notebooks(folder: Path, names: Sequence[str]) -> list[Path]:
    """Notebooks of a folder by name or by its beginning, all when `names` is empty; ValueError for an unknown one."""
    known = sorted(folder.glob("[0-9]*.ipynb"))
    unknown = [name for name in names if not any(path.stem.startswith(name) for path in known)]
    if unknown:
        raise ValueError(f"Unknown notebook {unknown[0]!r}; known: {', '.join(path.stem for path in known)}.")
    return [path for path in known if not names or any(path.stem.startswith(name) for name in names)]


def _resolve(option: str, value: str) -> str:
    if value in ("", "embedded") or is_hub(value):
        return value
    folder = Path(value).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} is {value!r}; there is no such folder, and it is neither hub nor embedded.")
    return str(folder)


def _resolve_model(value: str) -> str:
    folder = Path(value).expanduser()
    if value and folder.is_dir():
        return str(folder.resolve())
    if value.startswith((".", "/", "~")):  # what else is no folder may be a name on the hub
        raise FileNotFoundError(f"--model is {value!r}; there is no such folder.")
    return value


def _table(names: Sequence[str], outcomes: Mapping[str, Outcome], profile: str) -> Table:
    places = f"figures/{profile} (PNG and PDF), results/{profile}, executed/{profile}"
    table = Table("notebook", "status", "time", "wrote", title=f"softlms figures, profile {profile}", caption=places)
    for name in names:
        if (outcome := outcomes.get(name)) is None:
            table.add_row(name, "skipped", "", "")
            continue
        status = "[red]failed[/red]" if outcome.error else "[green]done[/green]"
        wrote = f"{outcome.figures} figures, {outcome.tables} tables"
        table.add_row(name, status, clock(outcome.seconds), wrote)
    return table


def _copy(outcome: Outcome, folders: Folders) -> str:
    if outcome.copy is None:
        return "no executed copy"
    return f"executed copy: {Path(outcome.copy).relative_to(folders.root)}"


def _complain(text: str) -> None:
    print(f"softlms figures: {text}", file=sys.stderr)
