"""Text for language modelling: a folder in WikiText's or PTB's layout, the hub, or the embedded corpus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from softlms.data import corpus
from softlms.data.hub import at, is_hub, split_revision

__all__ = ["SPLITS", "blocks", "find_splits", "load_text", "source_of"]

WORDS = {"train": "train", "validation": "valid", "test": "test"}  # in the name of a split's file
SPLITS = tuple(WORDS)
HUB_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")


def load_text(
    data: str | os.PathLike[str], splits: Sequence[str] = SPLITS, *, libraries: tuple[str, ...] = corpus.LIBRARIES
) -> dict[str, str]:
    """Load the text of each split. There is no fallback to another source.

    Parameters
    ----------
    data : str or path
        A folder with one file per split, whose name contains "train", "valid" or "test" (``train.txt``,
        ``wiki.valid.tokens``, ``ptb.test.txt``), "hub" for WikiText-2 on the hub ("hub@revision": at that commit, tag
        or branch), or "embedded" for the docstrings of installed libraries.
    splits : sequence of str
        Which of "train", "validation" and "test" to load; the others may be missing.
    libraries : tuple of str
        For the embedded corpus.

    Returns
    -------
    dict
        Text of each split, exactly as in the file.

    Raises
    ------
    FileNotFoundError
        The folder or a split's file is missing.
    ValueError
        Unknown split, two files for one split, a file that is not UTF-8, or a file without text.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise ValueError(f"Unknown split {unknown[0]!r}; known: {', '.join(SPLITS)}.")
    if data == "embedded":
        return {split: corpus.text(split, libraries) for split in splits}
    if is_hub(data):
        hub = datasets.load_dataset(*HUB_WIKITEXT, **at(split_revision(str(data))[1]))
        return {split: "".join(hub[split]["text"]) for split in splits}
    folder = Path(data)
    return {split: _read(folder, split) for split in splits}


def find_splits(data: str | os.PathLike[str]) -> tuple[str, ...]:
    """The splits that a source has, in the order of `SPLITS`; see `load_text`."""
    if data == "embedded" or is_hub(data):
        return SPLITS
    return tuple(split for split in SPLITS if _files(Path(data), split))


def source_of(data: str | os.PathLike[str]) -> str:
    """Where a text comes from, for tables and captions."""
    if data == "embedded":
        return "docstrings of installed libraries"
    if is_hub(data):
        _, revision = split_revision(str(data))
        return f"hub: WikiText-2{revision and f'@{revision}'}"
    return f"folder: {Path(data).name}"


def blocks(ids: np.ndarray, length: int) -> datasets.Dataset:
    """Rows of `length` ids each, for a causal language model; the remainder at the end is not used.

    Columns input_ids, attention_mask, labels (the ids, unshifted: transformers shifts them) and length.
    """
    rows = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int64)
    ones = np.ones_like(rows)
    columns = {"input_ids": rows, "attention_mask": ones, "labels": rows, "length": np.full(len(rows), length)}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def _files(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"Text folder {str(folder)!r} does not exist.")
    return [f for f in sorted(folder.iterdir()) if WORDS[split] in f.name and f.suffix in (".txt", ".tokens", ".raw")]


def _read(folder: Path, split: str) -> str:
    files = _files(folder, split)
    if not files:
        raise FileNotFoundError(f"{folder} has no file of the {split} split, such as {WORDS[split]}.txt.")
    if len(files) > 1:
        raise ValueError(f"{folder} has {len(files)} files of the {split} split: {', '.join(f.name for f in files)}.")
    try:
        text = files[0].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{files[0]} is not UTF-8: {error}.") from error
    if not text.strip():
        raise ValueError(f"{files[0]} contains no text.")
    return text
