"""The command ``softlms figures``: run notebooks, or redraw their figures from the tables."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from softlms.data.hub import is_hub
from softlms.experiments.profiles import PROFILES, find_profile
from softlms.utils.files import check_writable, remove_leftovers
from softlms.workbook.book import DATA_VARIABLE
from softlms.workbook.parameters import assign_parameters, split_assignments
from softlms.workbook.plots.drawing import draw
from softlms.workbook.plots.style import use_style
from softlms.workbook.process import Ending, Work, check_kernel, run_notebooks
from softlms.workbook.progress import Progress, clock, say
from softlms.workbook.registry import Drawing, Folders, Notebook, choose_notebooks, project_root, read_registry
from softlms.workbook.state import depends_on, mark_finished, reason_to_run, typical_seconds, unmark

__all__ = ["make_figures", "replot_figures"]

INTERRUPTED = 130  # as in a shell


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
    replot: bool = False,
    console: Console | None = None,
) -> int:
    """Run notebooks headless, each in its own process; a failure does not stop the others.

    Parameters
    ----------
    names : sequence of str
        Notebooks by name or its beginning (``03``); all when empty.
    profile, data, model : str
        See `softlms.workbook.book.open_book`; each notebook gets those that it declares.
    text : str
        See `softlms.workbook.book.open_language_book`.
    parameters : sequence of str
        Other parameters, as ``name=value``.
    jobs : int
        Notebooks at a time; each may use two processes.
    resume : bool
        Skip finished notebooks: those that ran with the same cells, parameters, tables of others, library, versions and
        machine, and whose files all still exist.
    replot : bool
        Run nothing; see `replot_figures`.
    console : rich.console.Console, optional
        For progress and the final table; errors go to standard error.

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
    if replot:
        others = {"data": data, "model": model, "text": text, "parameters": parameters, "jobs": jobs != 1}
        if useless := [name for name, value in (others | {"resume": resume}).items() if value]:
            raise ValueError(f"--replot runs no notebook: {', '.join(useless)} would have no effect.")
        return replot_figures(names, profile=profile, console=console)
    if jobs < 1:
        raise ValueError(f"-j is {jobs}; it must be at least 1.")
    folders, chosen = _open(profile, names)
    # folders are relative to the user's folder; the notebooks run elsewhere
    options = {"data": _resolve("--data", data), "model": _resolve_model(model), "text": _resolve("--text", text)}
    environment = dict(os.environ)
    if environment.get(DATA_VARIABLE):
        environment[DATA_VARIABLE] = _resolve(DATA_VARIABLE, environment[DATA_VARIABLE])
    given = {"profile": profile} | {name: value for name, value in options.items() if value}
    assigned = assign_parameters(chosen, given | split_assignments(parameters))
    registry = read_registry(folders.root)
    check_kernel()
    check_writable((folders.figures, folders.results, folders.executed, folders.runs))
    for file in remove_leftovers((folders.figures, folders.results, folders.executed)):
        say(console, f"removed {file.relative_to(folders.root)}, left by a killed run")
    works = [
        Work(path, folders.executed / path.name, assigned[path], registry.get(path.stem, Notebook()).follows_others)
        for path in chosen
    ]
    if resume:
        works = _unfinished(works, folders, environment, console)
    try:
        outcomes = _run(works, folders, environment, jobs, console)
    except KeyboardInterrupt:
        _complain("stopped; finished notebooks are kept, and the same command with --resume continues.")
        return INTERRUPTED
    console.print(_table([path.stem for path in chosen], outcomes, profile))
    for name, outcome in outcomes.items():
        if outcome.error:
            place = outcome.copy and Path(outcome.copy).relative_to(folders.root)
            copy = f"executed copy: {place}" if place else "no executed copy"
            _complain(f"{name} failed in cell {outcome.cell}: {outcome.error} ({copy})")
    return int(any(outcome.error for outcome in outcomes.values()))


def replot_figures(names: Sequence[str] = (), *, profile: str = "quick", console: Console | None = None) -> int:
    """Redraw the figures of some notebooks from ``results/<profile>``.

    Parameters
    ----------
    names, profile, console
        See `make_figures`. If no notebook is named, those without tables in this profile are skipped.

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
    registry, results = read_registry(folders.root), folders.results.relative_to(folders.root)
    check_writable([folders.figures])
    remove_leftovers([folders.figures])
    mpl.use("agg")
    use_style()
    drawn, wrong = 0, []
    for notebook in (path.stem for path in chosen):
        figures = registry.get(notebook, Notebook()).figures

        def lacks(drawings: Iterable[Drawing]) -> bool:
            tables = {table for drawing in drawings for table in drawing.tables}
            return bool(tables) and not any((folders.results / f"{table}.csv").is_file() for table in tables)

        if not names and lacks(figures.values()):
            say(console, f"{notebook}: skipped, {results} has no table of it")
            continue
        for figure, drawing in figures.items():
            if drawing.variant and lacks([drawing]):
                say(console, f"{figure}: skipped, {results} has no table of {drawing.variant}")
                continue
            try:
                draw(figure, folders.figures, folders.results)
                drawn += 1
                say(console, f"{figure}: drawn")
            except Exception as error:  # one figure that fails does not stop the others
                said = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                wrong.append(f"{figure}: {said}")
                say(console, f"{figure}: not drawn")
            finally:
                plt.close("all")
    if not drawn and not wrong:
        wrong = [f"nothing to draw: {results} has no tables yet."]
    for line in wrong:
        _complain(line)
    return int(bool(wrong))


def _unfinished(
    works: Sequence[Work], folders: Folders, environment: Mapping[str, str], console: Console
) -> list[Work]:
    """The notebooks that have to run; prints a line for each notebook."""
    reasons = {
        work.name: reason_to_run(folders, work.name, depends_on(work.notebook, work.parameters, environment))
        for work in works
    }
    if any(reasons.values()):
        reasons |= {work.name: reasons[work.name] or "it reads the outputs of others" for work in works if work.waits}
    for name, reason in reasons.items():
        say(console, f"{name}: {f'will run, {reason}' if reason else 'skipped, done before'}")
    return [work for work in works if reasons[work.name]]


@dataclass(frozen=True)
class Outcome(Ending):
    """An ending, with the numbers of figures and tables written."""

    figures: int
    tables: int


def _run(
    works: Sequence[Work], folders: Folders, environment: Mapping[str, str], jobs: int, console: Console
) -> dict[str, Outcome]:
    outcomes, depends, present = {}, dict[str, dict[str, Any]](), dict[str, dict[Path, tuple[int, int]]]()

    def prepare(work: Work) -> None:
        unmark(folders, work.name)
        depends[work.name] = depends_on(work.notebook, work.parameters, environment)
        present[work.name] = folders.written(work.name)

    seconds = {work.name: typical_seconds(folders, work.name) for work in works}
    with (
        Progress(console, seconds, jobs) as progress,
        contextlib.closing(run_notebooks(works, jobs, environment, progress, prepare)) as endings,
    ):
        for work, ending in endings:
            before = present[work.name].items()
            files = [file for file, state in folders.written(work.name).items() if (file, state) not in before]
            if not ending.error:
                try:
                    mark_finished(folders, work.name, depends[work.name], files)
                except OSError as error:  # a full disk
                    ending = replace(ending, error=f"OSError: {error}")
            counts = (sum(file.suffix == kind for file in files) for kind in (".png", ".csv"))
            outcomes[work.name] = Outcome(ending.seconds, ending.error, ending.cell, ending.copy, *counts)
    return outcomes


def _open(profile: str, names: Sequence[str]) -> tuple[Folders, list[Path]]:
    find_profile(profile, PROFILES)
    root = project_root()
    return Folders(root, profile), choose_notebooks(root / "notebooks", names)


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
    if value.startswith((".", "/", "~")):  # any other name may be on the hub
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


def _complain(text: str) -> None:
    print(f"softlms figures: {text}", file=sys.stderr)
