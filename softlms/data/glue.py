"""GLUE's own files: tab-separated, unquoted, some with a byte-order mark, some without a header."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["find_folder", "read_folder"]


@dataclass(frozen=True)
class Layout:
    """Where a task's fields are in its files.

    Attributes
    ----------
    label : str or int
        Name of the label column, or its index in a file without a header.
    sentences : tuple
        The same for each sentence.
    files : dict
        File of each split. Splits whose file may be missing are in `optional`.
    columns : int
        Fields per line in a file without a header; 0 if there is a header to count.
    """

    label: str | int
    sentences: tuple[str | int, ...]
    files: dict[str, str]
    optional: tuple[str, ...] = ()
    columns: int = 0


_TRAIN_DEV = {"train": "train.tsv", "dev": "dev.tsv"}
LAYOUTS = {
    "mrpc": Layout(
        "Quality", ("#1 String", "#2 String"), {**_TRAIN_DEV, "test": "msr_paraphrase_test.txt"}, optional=("test",)
    ),
    "sst2": Layout("label", ("sentence",), _TRAIN_DEV),
    "rte": Layout("label", ("sentence1", "sentence2"), _TRAIN_DEV),
    "cola": Layout(1, (3,), _TRAIN_DEV, columns=4),
    "stsb": Layout("score", ("sentence1", "sentence2"), _TRAIN_DEV),
}


def find_folder(data: Path, name: str) -> Path:
    """The folder of task `name`: a subfolder of `data` (``MRPC``, ``SST-2``, ...) or `data` itself.

    Raises
    ------
    FileNotFoundError
        Neither exists.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"Data folder {str(data)!r} does not exist. Give a folder in GLUE's layout, or 'hub'.")
    for folder in sorted(data.iterdir()):
        if folder.is_dir() and re.sub(r"\W", "", folder.name).lower() == name:
            return folder
    if (data / "train.tsv").is_file():
        return data
    raise FileNotFoundError(f"No {name!r} in data folder {str(data)!r}: expected {data / name / 'train.tsv'}.")


def read_folder(
    folder: Path, name: str, sentences: tuple[str, ...], labels: tuple[str, ...]
) -> dict[str, list[dict[str, Any]]]:
    """Read the rows of every split: the sentence columns and "label".

    Parameters
    ----------
    folder : Path
        See `find_folder`.
    name : str
        A key of `LAYOUTS`.
    sentences, labels : tuple of str
        Names for the sentence columns, and class names by id (empty for scores); see `softlms.data.tasks.Task`.

    Raises
    ------
    FileNotFoundError
        A file of train or dev is missing.
    ValueError
        A row is broken; file and line are named.
    """
    layout = LAYOUTS[name]
    splits = {}
    for split, file in layout.files.items():
        path = folder / file
        if path.is_file():
            splits[split] = _read(path, layout, sentences, labels)
        elif split not in layout.optional:
            raise FileNotFoundError(f"{path} is missing: the {split} split of {name}.")
    return splits


def _read(path: Path, layout: Layout, columns: tuple[str, ...], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            rows = list(_rows(lines, layout, columns, labels))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}.") from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {lines.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path} contains no rows.")
    return rows


def _rows(
    lines: Iterator[list[str]], layout: Layout, columns: tuple[str, ...], labels: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    wanted = (layout.label, *layout.sentences)
    header: Sequence[Any] = range(layout.columns) if layout.columns else next(lines, [])
    missing = [field for field in wanted if field not in header]
    if missing:
        raise ValueError(f"no column {missing[0]!r} in the header {header}.")
    for fields in lines:
        if len(fields) != len(header):
            raise ValueError(f"{len(fields)} fields where {len(header)} are expected.")
        label, *sentences = (fields[header.index(field)] for field in wanted)
        if not all(sentence.strip() for sentence in sentences):
            raise ValueError("a sentence is empty.")
        yield {**dict(zip(columns, sentences, strict=True)), "label": _label(label, labels)}


def _label(text: str, labels: tuple[str, ...]) -> int | float:
    if not labels:
        score = float(text)
        if not math.isfinite(score):
            raise ValueError(f"score {text!r} is not finite.")
        return score
    if text in labels:
        return labels.index(text)
    if text in map(str, range(len(labels))):
        return int(text)
    raise ValueError(f"label {text!r} is none of {', '.join(labels)}, nor an id of them.")
