"""An opened notebook: its profile and bench, and the folders for its figures and tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from transformers import AutoConfig

from softlms.data.encoders import Encoder, find_encoder
from softlms.data.hub import is_hub, pretrained
from softlms.data.tasks import TaskData, load_task
from softlms.experiments.bench import Bench
from softlms.experiments.grid import Setting
from softlms.experiments.jobs import be_quiet
from softlms.experiments.language_models import FAMILIES, LanguageBench
from softlms.experiments.profiles import LANGUAGE_PROFILES, PROFILES, SPEED_PROFILES, find_profile
from softlms.experiments.provenance import commit
from softlms.experiments.report import Report
from softlms.experiments.tokenized import TokenizedText, tokenize_text
from softlms.experiments.variants import Comparison
from softlms.utils.files import whole_file
from softlms.utils.machine import hardware, versions
from softlms.workbook.plots import style as plotting
from softlms.workbook.plots.drawing import draw
from softlms.workbook.registry import project_root, variant_name

__all__ = [
    "DATA_VARIABLE",
    "Book",
    "make_book",
    "open_book",
    "open_companion_book",
    "open_language_book",
    "open_speed_book",
]

DATA_VARIABLE = "SOFTLMS_DATA"
ZERO_SHOT = "sst2 zero-shot"  # in the column of splits


class Named(Protocol):
    """A profile of any kind."""

    @property
    def name(self) -> str: ...


@dataclass
class Book:
    """An opened notebook: its profile, its bench, and its output folders.

    Attributes
    ----------
    name : str
        The notebook's name; figures and tables are named after it.
    profile : Profile
        Or a `softlms.experiments.profiles.LanguageProfile`.
    bench : Bench, optional
        None if nothing is trained.
    figures, results : Path
        ``figures/<profile>`` and ``results/<profile>``.
    data : str
        The source of tasks; see `softlms.data.tasks.load_task`.
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
        """Draw and show one of the notebook's figures from its tables; see `drawing.draw`."""
        self.written += draw(self.name + suffix, self.figures, self.results)

    def save_table(self, table: pd.DataFrame, suffix: str = "", *, data: Mapping[str, str] | None = None) -> None:
        """Write a tidy table as CSV; every row names profile, task, data, encoder, hardware, versions and commit.

        Rows of stored runs already have the last three, from the time of the run, and a table may say in its ``attrs``
        on what hardware it was made. In a table of several tasks `data` is the source of each.
        """
        path = self.results / f"{self.name}{suffix}.csv"
        provenance = {"profile": self.profile.name}
        if self.bench is not None:
            provenance |= {
                "task": self.bench.data.task.name,
                "data": self.bench.data.source if data is None else table["task"].map(data),
                "encoder": self.bench.encoder.source,
            }
        made_on = table.attrs.get("hardware") or hardware(self.bench and self.bench.threads)
        provenance |= {"hardware": made_on, "versions": versions(), "commit": commit()}
        missing = {name: value for name, value in provenance.items() if name not in table}
        with whole_file(path) as partial:
            table.assign(**missing).to_csv(partial, index=False, float_format="%.6g", lineterminator="\n")
        self.written.append(path)

    def save_report(self, report: Report) -> None:
        """Write a grid's rows, ranks, means and verdicts as CSV, and its scores as Markdown and LaTeX."""
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
        """Write a table in Markdown or LaTeX; `suffix` includes the file extension."""
        path = self.results / f"{self.name}{suffix}"
        with whole_file(path) as partial:
            partial.write_text(text if text.endswith("\n") else text + "\n", "utf-8")
        self.written.append(path)

    def check(self) -> None:
        """Print what was written; raises an error if a file is missing or empty."""
        missing = [path for path in self.written if not path.is_file() or path.stat().st_size == 0]
        if missing or not self.written:
            raise FileNotFoundError(f"The notebook should have written {missing or 'a figure and a table'}.")
        print("written:", ", ".join(sorted({path.name for path in self.written})))


def open_book(name: str, *, profile: str, data: str = "", model: str = "", part: str = "") -> Book:
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
        Replaces the profile's encoder; see `softlms.data.encoders.find_encoder`.
    part : str
        A part of the notebook's grid, after which its files are named.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown profile, or as from `load_task` and `find_encoder`: before any work.

    Notes
    -----
    It changes settings of the whole kernel; see `make_book`.
    """
    chosen = find_profile(profile, PROFILES)
    source = data or (os.environ.get(DATA_VARIABLE, "") if chosen.data == "hub" else "") or chosen.data
    runs = project_root() / "runs"
    task = load_task(chosen.task, source)
    bench = Bench(find_encoder(model or chosen.encoder), task, runs, chosen.max_length, chosen.train_rows)
    return make_book(variant_name(name, part), chosen, bench, source)


def open_companion_book(
    name: str,
    comparisons: Mapping[str, Comparison],
    *,
    profile: str,
    data: str = "",
    model: str = "",
    kind: type[Bench] = Bench,
) -> tuple[Book, dict[str, Bench]]:
    """Open a companion notebook for a profile; return its book, and a bench for each task of its comparison.

    Parameters
    ----------
    name : str
        The notebook's name without ending.
    comparisons : mapping
        Profile to comparison; see `softlms.experiments.companions`.
    profile : str
        A key of `comparisons`.
    data, model : str
        As for `open_book`.
    kind : type
        Of the benches.

    Raises
    ------
    ValueError, FileNotFoundError
        As from `open_book`.

    Notes
    -----
    It changes settings of the whole kernel; see `make_book`.
    """
    chosen = find_profile(profile, comparisons)
    source = data or (os.environ.get(DATA_VARIABLE, "") if chosen.data == "hub" else "") or chosen.data
    encoder, runs = find_encoder(model or chosen.encoder), project_root() / "runs"
    benches = {
        task: kind(encoder, load_task(task, source), runs, setting.max_length, setting.train_rows)
        for task, setting in chosen.tasks.items()
    }
    return make_book(name, chosen, next(iter(benches.values())), source), benches


def make_book(name: str, profile: Named, bench: Bench | None, data: str) -> Book:
    """Set up this process for a notebook and open its book; see `Book`.

    Notes
    -----
    For the rest of the process torch has one thread (the last digits of results depend on it), matplotlib has the
    workbook's style, and transformers and datasets show only errors and no progress bars. To undo this use
    ``torch.set_num_threads``, ``transformers.utils.logging`` and ``datasets.enable_progress_bars``.
    """
    plotting.use_style()
    be_quiet()
    torch.set_num_threads(1)  # whatever the number of cores; a run has those of its bench
    root = project_root()
    return Book(name, profile, bench, root / "figures" / profile.name, root / "results" / profile.name, data)


def open_language_book(
    name: str,
    family: str,
    *,
    profile: str,
    text: str = "",
    checkpoint: str = "",
    beside: str = "",
    other_text: str = "",
    data: str = "",
    part: str = "",
    split: bool = False,
) -> Book:
    """Open a language-model notebook for a profile; its bench is a `LanguageBench`.

    Parameters
    ----------
    name : str
        The notebook's name without ending.
    family : {"gpt2", "llama", "mamba"}
    profile : str
        A key of `LANGUAGE_PROFILES`.
    text : str
        Replaces the profile's text: a folder, "hub" or "embedded"; see `softlms.data.text.load_text`.
    checkpoint : str
        Replaces the profile's model by another causal language model of this family; see `find_encoder`.
    beside : str
        A real model that the profile has beside its own, such as "smollm2". It brings its own text, grid and window,
        and tables show its name instead of the family's; files are named after it too.
    other_text : str
        A text of another domain, on which the model beside is scored too; a source like `text`.
    data : str
        GLUE's source, as for `open_book`: the model beside is asked about SST-2's sentences zero-shot.
    part : str
        A part of the notebook's grid, after which its files are named.
    split : bool
        See `LanguageBench`.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown profile, family or model, a model of another family, or as from `tokenize_text`, `find_encoder` and
        `LanguageBench`; before any work.

    Notes
    -----
    It changes settings of the whole kernel; see `make_book`.
    """
    chosen = find_profile(profile, LANGUAGE_PROFILES)
    if family not in FAMILIES:
        raise ValueError(f"Unknown family {family!r}; known: {', '.join(FAMILIES)}.")
    if beside and (beside not in chosen.beside or family not in chosen.beside[beside].models):
        known = ", ".join(name for name, other in chosen.beside.items() if family in other.models) or "none"
        raise ValueError(f"Profile {profile} has no {family} model {beside!r} beside its own; it has: {known}.")
    if other_text and not beside:
        raise ValueError(f"other_text {other_text!r} is for a model beside: set beside too, or leave it out.")
    chosen = chosen.beside[beside] if beside else chosen
    asked = checkpoint or chosen.models[family]
    found = find_encoder(asked) if isinstance(asked, str) else asked
    if isinstance(found, Encoder):
        kind = pretrained(AutoConfig, found.location).model_type
        if kind != family:
            raise ValueError(f"{asked} is a {kind} model; this notebook is about {family}.")
    runs = project_root() / "runs"
    tokenizer = found.location if isinstance(found, Encoder) else found.vocabulary

    def tokenized(source: str) -> TokenizedText:
        place = source if source == "embedded" or is_hub(source) else str(Path(source).expanduser())
        return tokenize_text(place, tokenizer, runs, libraries=chosen.libraries)

    beyond: dict[str, TokenizedText | TaskData] = {}
    if beside and other_text:
        beyond[Path(other_text).name] = tokenized(other_text)
    if beside and (glue := data or os.environ.get(DATA_VARIABLE, "")):
        beyond[ZERO_SHOT] = load_task("sst2", glue)
    source = text or chosen.text
    bench = LanguageBench(
        found,
        beside or family,
        tokenized(source),
        runs,
        window=chosen.window,
        train_tokens=chosen.train_tokens,
        test_tokens=chosen.test_tokens,
        protocol=chosen.protocol,
        beyond=beyond,
        split=split,
        threads=chosen.threads,
    )
    return make_book(variant_name(name, beside, part), chosen, bench, source)


def open_speed_book(name: str, *, profile: str) -> Book:
    """Open a notebook that trains nothing; see `open_book`.

    Raises
    ------
    ValueError
        Unknown profile.
    """
    return make_book(name, find_profile(profile, SPEED_PROFILES), None, "")
