"""The batch driver: every notebook through papermill, with progress, and a table of what came of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import papermill
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from softlms.profiles import DATA_VARIABLE, PROFILES, project_root

__all__ = ["choose_notebooks", "make_figures"]

CELL_TIMEOUT = 12 * 3600  # seconds; papermill would wait for ever
KERNEL = "python3"


@dataclass(frozen=True)
class Outcome:
    """One notebook's run: files written, seconds, and the error that ended it, if one did."""

    name: str
    seconds: float
    files: tuple[Path, ...]
    error: str | None


def make_figures(
    names: Sequence[str] = (),
    *,
    profile: str = "quick",
    data: str = "",
    model: str = "",
    text: str = "",
    console: Console | None = None,
) -> int:
    """Run notebooks headless, one after the other; a failure does not stop the others.

    Parameters
    ----------
    names : sequence of str
        Notebooks by name or by its beginning (``03``); all when empty.
    profile, data, model : str
        See `softlms.profiles.open_book`; a notebook gets those that it has.
    text : str
        See `softlms.language_profiles.open_language_book`.
    console : rich.console.Console, optional
        Where progress and the table go.

    Returns
    -------
    int
        Exit status: 0, or 1 if a notebook failed.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown profile or notebook, what was given is no parameter of any of them, or no checkout: before anything
        runs.
    """
    console = console or Console()
    if profile not in PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; known: {', '.join(PROFILES)}.")
    # a folder is given from where the user stands, the notebooks run elsewhere
    data, text = (str(Path(x).resolve()) if x and x not in ("hub", "embedded") else x for x in (data, text))
    if os.environ.get(DATA_VARIABLE) and os.environ[DATA_VARIABLE] != "hub":
        os.environ[DATA_VARIABLE] = str(Path(os.environ[DATA_VARIABLE]).resolve())
    model = str(Path(model).resolve()) if model and Path(model).is_dir() else model
    root = project_root()
    chosen = choose_notebooks(root / "notebooks", names)
    known = {path: papermill.inspect_notebook(path) for path in chosen}
    given = {"profile": profile} | {k: v for k, v in {"data": data, "model": model, "text": text}.items() if v}
    for name in given:
        if not any(name in parameters for parameters in known.values()):
            raise ValueError(f"None of {', '.join(path.stem for path in chosen)} has the parameter {name!r}.")
    outcomes = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        for path in chosen:
            progress.update(task, description=f"{path.stem} ({profile})")
            outcomes.append(_run(path, root, {name: given[name] for name in given if name in known[path]}))
            progress.advance(task)
            if outcomes[-1].error:
                progress.console.print(f"[red]{path.stem} failed[/red]: {outcomes[-1].error}", highlight=False)
    console.print(_table(outcomes, profile))
    return int(any(outcome.error for outcome in outcomes))


def choose_notebooks(folder: Path, names: Sequence[str]) -> list[Path]:
    """Notebooks of a folder by name or by its beginning, all when `names` is empty; ValueError for an unknown one."""
    known = sorted(folder.glob("[0-9]*.ipynb"))
    unknown = [name for name in names if not any(path.stem.startswith(name) for path in known)]
    if unknown:
        raise ValueError(f"Unknown notebook {unknown[0]!r}; known: {', '.join(path.stem for path in known)}.")
    return [path for path in known if not names or any(path.stem.startswith(name) for name in names)]


def _run(path: Path, root: Path, parameters: dict[str, str]) -> Outcome:
    executed = root / "executed" / parameters["profile"]
    executed.mkdir(parents=True, exist_ok=True)
    started, clock = time.time(), time.monotonic()
    error = None
    try:
        papermill.execute_notebook(
            path,
            executed / path.name,
            parameters=parameters,
            kernel_name=KERNEL,
            cwd=str(path.parent),
            progress_bar=False,
            start_timeout=120,
            execution_timeout=CELL_TIMEOUT,
            iopub_timeout=60,
            record_timing=False,
            store_widget_state=False,
            extra_arguments=["--Application.log_level=ERROR"],  # a line about TCP at each kernel's start
        )
    except papermill.PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue} (cell {failure.exec_count}, see {executed / path.name})"
    except Exception as failure:  # a kernel that dies must not stop the other notebooks
        error = f"{type(failure).__name__}: {failure}"
    folders = (root / "figures" / parameters["profile"], root / "results" / parameters["profile"])
    files = [file for folder in folders for file in folder.glob(f"{path.stem}*") if file.stat().st_mtime >= started - 1]
    return Outcome(path.stem, time.monotonic() - clock, tuple(sorted(files)), error)


def _table(outcomes: Sequence[Outcome], profile: str) -> Table:
    places = f"figures/{profile} (PNG and PDF), results/{profile}, executed/{profile}"
    table = Table("notebook", "status", "time", "wrote", title=f"softlms figures, profile {profile}", caption=places)
    for outcome in outcomes:
        status = "[red]failed[/red]" if outcome.error else "[green]done[/green]"
        minutes, seconds = divmod(round(outcome.seconds), 60)
        figures, tables = (sum(file.suffix == kind for file in outcome.files) for kind in (".png", ".csv"))
        table.add_row(outcome.name, status, f"{minutes}:{seconds:02d}", f"{figures} figures, {tables} tables")
    return table
