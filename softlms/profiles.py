"""Profiles: the same notebooks at three sizes, and where each leaves what it made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from softlms import plotting
from softlms.comparison import SVD_SOFT, Setting
from softlms.drawing import draw
from softlms.experiments import Bench
from softlms.jobs import be_quiet
from softlms.precision import fast_bf16
from softlms.provenance import commit, hardware, versions, whole_file
from softlms.recipe import Recipe
from softlms.report import Report
from softlms.tasks import load_task
from softlms.zoo import find_encoder

__all__ = ["ABLATION", "PROFILES", "Book", "Profile", "make_book", "open_book", "project_root"]

DATA_VARIABLE = "SOFTLMS_DATA"


@dataclass(frozen=True)
class Profile:
    """One size of the workbook.

    Attributes
    ----------
    encoder : str
        See `softlms.zoo.find_encoder`.
    task, data : str
        See `softlms.tasks.load_task`. The environment variable SOFTLMS_DATA replaces `data` where that is "hub".
    seeds : tuple of int
        Every comparison of methods runs at each.
    recipe : Recipe
    max_length, train_rows
        See `softlms.experiments.Bench`.
    loss_seeds : tuple of int
        Where the two compression losses are compared (notebook 02).
    ablation : mapping
        Which rows of `ABLATION` are run, and at which seeds; each is compared with the recipe at the same seeds.
    """

    name: str
    encoder: str
    task: str
    data: str
    seeds: tuple[int, ...]
    recipe: Recipe
    max_length: int = 128
    train_rows: int | None = None
    loss_seeds: tuple[int, ...] = (0, 1)
    ablation: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


# one setting at a time
ABLATION: dict[str, dict[str, Any]] = {
    "raw sigma, alpha rate x 10": {"unit": "raw", "alpha_learning_rate": 2e-2},
    "linear loss": {"compression_loss": "linear"},
    "no distillation": {"distillation": 0.0},
    "from the pretrained encoder": {"start": "pretrained"},
}

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "quick",
            encoder="minilm",
            task="docpairs",
            data="embedded",
            seeds=(0, 1),
            recipe=Recipe(
                dense_epochs=2,
                epochs=1.25,
                static_learning_rate=1e-4,  # 2e-4 does not always hold on so few rows
                distillation=0.9,
                bf16=fast_bf16(),
            ),
            loss_seeds=(0,),
            max_length=40,
            train_rows=768,
        ),
        Profile(
            "laptop",
            encoder="minilm",
            task="mrpc",
            data="hub",
            seeds=(0, 1, 2, 3, 4),
            recipe=Recipe(distillation=0.9, bf16=fast_bf16(), deadline=1.0, **SVD_SOFT | {"alpha_learning_rate": 2e-3}),
            loss_seeds=(1,),
            ablation={"raw sigma, alpha rate x 10": (0,), "linear loss": (1,)},
        ),
        Profile(
            "paper",
            encoder="bert-base-uncased",
            task="mrpc",
            data="hub",
            seeds=(0, 1, 2, 3, 4),
            recipe=Recipe(distillation=0.9),
            ablation=dict.fromkeys(ABLATION, (0, 1, 2, 3, 4)),
        ),
    )
}


class Named(Protocol):
    """A profile of any kind."""

    @property
    def name(self) -> str: ...


@dataclass
class Book:
    """An opened notebook: its profile, its bench, and the folders that it writes to.

    Attributes
    ----------
    name : str
        The notebook's name; figures and tables are named after it.
    profile : Profile
        Or a `softlms.language_profiles.LanguageProfile`.
    bench : Bench, optional
        None where nothing is trained.
    figures, results : Path
        ``figures/<profile>`` and ``results/<profile>``.
    data : str
        Where tasks come from; see `softlms.tasks.load_task`.
    """

    name: str
    profile: Named
    bench: Any
    figures: Path
    results: Path
    data: str
    written: list[Path] = field(default_factory=list)

    def benches(self, tasks: Mapping[str, Setting]) -> dict[str, Bench]:
        """A bench for each task, on the book's encoder and data.

        Raises
        ------
        ValueError, FileNotFoundError
            As from `softlms.load_task`, before any work.
        """
        folder = self.bench.folder
        return {
            name: Bench(self.bench.encoder, load_task(name, self.data), folder, setting.max_length, setting.train_rows)
            for name, setting in tasks.items()
        }

    def draw(self, suffix: str = "") -> None:
        """Draw and show one of the notebook's figures from the tables that it wrote; see `softlms.drawing.draw`."""
        self.written += draw(self.name + suffix, self.figures, self.results)

    def save_table(self, table: pd.DataFrame, suffix: str = "", *, data: Mapping[str, str] | None = None) -> None:
        """Write a tidy table as CSV; every row names profile, task, data, encoder, hardware, versions and commit.

        Rows of stored runs bring the last three along, as they were when the run was made. A table of several tasks
        takes each row's source from `data`, by its task.
        """
        path = self.results / f"{self.name}{suffix}.csv"
        provenance = {"profile": self.profile.name}
        if self.bench is not None:
            provenance |= {
                "task": self.bench.data.task.name,
                "data": self.bench.data.source if data is None else table["task"].map(data),
                "encoder": self.bench.encoder.source,
            }
        provenance |= {"hardware": hardware(), "versions": versions(), "commit": commit()}
        missing = {name: value for name, value in provenance.items() if name not in table}
        with whole_file(path) as partial:
            table.assign(**missing).to_csv(partial, index=False, float_format="%.6g", lineterminator="\n")
        self.written.append(path)

    def save_report(self, report: Report) -> None:
        """Write a grid's rows, ranks, means and verdicts, each row with its task's data, and tables for people."""
        data = {task: bench.data.source for task, bench in report.benches.items()}
        self.save_table(report.rows)
        self.save_table(report.ranks, "_ranks", data=data)
        self.save_table(report.summary, "_summary", data=data)
        self.save_table(report.verdicts(), "_verdicts", data=data)
        for split in ("dev", "test"):
            if (table := report.table(split)) is not None:
                table.columns = pd.Index([" ".join(column) for column in table.columns])
                self.save_text(table.reset_index().to_markdown(index=False), f"_{split}.md")
                self.save_text(table.reset_index().to_latex(index=False, escape=True), f"_{split}.tex")

    def save_text(self, text: str, suffix: str) -> None:
        """Write a table for people, Markdown or LaTeX; `suffix` ends in the file's kind."""
        path = self.results / f"{self.name}{suffix}"
        with whole_file(path) as partial:
            partial.write_text(text if text.endswith("\n") else text + "\n", "utf-8")
        self.written.append(path)

    def check(self) -> None:
        """Say what was written; an error if a file is missing or empty."""
        missing = [path for path in self.written if not path.is_file() or path.stat().st_size == 0]
        if missing or not self.written:
            raise FileNotFoundError(f"The notebook should have written {missing or 'a figure and a table'}.")
        print("written:", ", ".join(sorted({path.name for path in self.written})))


def open_book(name: str, *, profile: str, data: str = "", model: str = "") -> Book:
    """Open a notebook for a profile.

    Parameters
    ----------
    name : str
        The notebook's name without ending.
    profile : str
        A key of `PROFILES`.
    data : str
        Replaces the profile's data: a folder in GLUE's layout, "hub" or "embedded".
    model : str
        Replaces the profile's encoder; see `softlms.zoo.find_encoder`.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown profile, or as from `load_task` and `find_encoder`: before any work.

    Notes
    -----
    It sets up the whole kernel, as `make_book` says.
    """
    if profile not in PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; known: {', '.join(PROFILES)}.")
    chosen = PROFILES[profile]
    source = data or (os.environ.get(DATA_VARIABLE, "") if chosen.data == "hub" else "") or chosen.data
    runs = project_root() / "runs"
    task = load_task(chosen.task, source)
    bench = Bench(find_encoder(model or chosen.encoder), task, runs, chosen.max_length, chosen.train_rows)
    return make_book(name, chosen, bench, source)


def make_book(name: str, profile: Named, bench: Bench | None, data: str) -> Book:
    """Set this process up for a notebook, and open its book; see `Book`.

    Notes
    -----
    For the rest of the process torch has one thread (runs have it anyway; cells that call the library themselves have
    numbers too, whose last digits depend on it), matplotlib has the workbook's style, and transformers and datasets
    show no bars and tell nothing but errors. ``torch.set_num_threads``, ``transformers.utils.logging`` and
    ``datasets.enable_progress_bars`` undo it.
    """
    plotting.use_style()
    be_quiet()
    torch.set_num_threads(1)  # as in the processes of softlms.jobs: a number depends on nothing that is free by chance
    root = project_root()
    return Book(name, profile, bench, root / "figures" / profile.name, root / "results" / profile.name, data)


def project_root() -> Path:
    """The checkout that holds ``notebooks/``, found from the working folder upwards.

    papermill runs a notebook in the caller's folder, nbval and Jupyter in the notebook's: both find it.

    Raises
    ------
    FileNotFoundError
        The working folder is in no checkout.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError(f"{here} is in no softlms checkout (a folder with notebooks/ and pyproject.toml).")
