"""Text for language modelling: a folder in WikiText's, PTB's or tinyshakespeare's layout, the hub, or docstrings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np

from softlms.data import corpus
from softlms.data.hub import at, is_hub, split_revision

__all__ = ["SPLITS", "blocks", "find_splits", "load_text", "source_of"]

WORDS = {"train": "train", "validation": "valid", "test": "test"}  # in the name of a split's file
SPLITS = tuple(WORDS)
WHOLE = "input.txt"  # a text in one file, and the last tenth at which each of its splits ends
ENDS = {"train": 8, "validation": 9, "test": 10}
HUB_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")


def load_text(
    data: str | os.PathLike[str], splits: Sequence[str] = SPLITS, *, libraries: tuple[str, ...] = corpus.LIBRARIES
) -> dict[str, str]:
    """Load the text of each split. There is no fallback to another source.

    Parameters
    ----------
    data : str or path
        A folder with one file per split, whose name contains "train", "valid" or "test" (``train.txt``,
        ``wiki.valid.tokens``, ``ptb.test.txt``). A folder without any of these and with ``input.txt``, as
        tinyshakespeare has it: the first 80 % of the text are "train", the next 10 % "validation", the last "test", cut
        at ends of lines. "hub" for WikiText-2, raw, on the hub ("hub@revision": at that commit, tag or branch). Or
        "embedded" for the docstrings of installed libraries.
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
        Unknown split, two files for one split, a file that is not UTF-8, or a file or split without text.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise ValueError(f"Unknown split {unknown[0]!r}; known: {', '.join(SPLITS)}.")
    if data == "embedded":
        return {split: corpus.text(split, libraries) for split in splits}
    if is_hub(data):
        hub = datasets.load_dataset(*HUB_WIKITEXT, **at(split_revision(str(data))[1]))
        return {split: "".join(hub[split]["text"]) for split in splits}
    folder = _folder(data)
    if _is_whole(folder):
        parts = _parts(folder / WHOLE)
        return {split: parts[split] for split in splits}
    return {split: _read(_file(folder, split)) for split in splits}


def find_splits(data: str | os.PathLike[str]) -> tuple[str, ...]:
    """The splits that a source has, in the order of `SPLITS`; see `load_text`.

    Raises
    ------
    FileNotFoundError
        The folder is missing.
    """
    if data == "embedded" or is_hub(data) or _is_whole(_folder(data)):
        return SPLITS
    return tuple(split for split in SPLITS if _files(Path(data), split))


def source_of(data: str | os.PathLike[str], texts: Mapping[str, str]) -> str:
    """Where a text comes from, for tables and captions, with what must be known to compare its numbers.

    Parameters
    ----------
    data : str or path
        As for `load_text`.
    texts : mapping
        What that returned. WikiText-2 and PTB exist raw, and tokenised with rare words replaced by ``<unk>``, which
        makes perplexity another number: it is the text itself that says which it is.
    """
    if data == "embedded":
        return "docstrings of installed libraries"
    marked = ", tokenised with <unk>" if any("<unk>" in text for text in texts.values()) else ""
    if is_hub(data):
        _, revision = split_revision(str(data))
        return f"hub: WikiText-2 raw{revision and f'@{revision}'}{marked}"
    shares = f", {WHOLE} split 80/10/10 %" if _is_whole(Path(data)) else ""
    return f"folder: {Path(data).name}{shares}{marked}"


def blocks(ids: np.ndarray, length: int) -> datasets.Dataset:
    """Rows of `length` ids each, for a causal language model; the remainder at the end is not used.

    Columns input_ids, attention_mask, labels (the ids, unshifted: transformers shifts them) and length.
    """
    rows = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int64)
    ones = np.ones_like(rows)
    columns = {"input_ids": rows, "attention_mask": ones, "labels": rows, "length": np.full(len(rows), length)}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def _folder(data: str | os.PathLike[str]) -> Path:
    if not Path(data).is_dir():
        raise FileNotFoundError(f"Text folder {str(data)!r} does not exist.")
    return Path(data)


def _is_whole(folder: Path) -> bool:
    return (folder / WHOLE).is_file() and not any(_files(folder, split) for split in SPLITS)


def _parts(file: Path) -> dict[str, str]:
    """A text cut into its splits at ends of lines."""
    text, parts, begin = _read(file), {}, 0
    for split, tenths in ENDS.items():
        end = (text.find("\n", len(text) * tenths // 10 - 1) + 1) or len(text)
        parts[split], begin = text[begin:end], end
        if not parts[split].strip():
            raise ValueError(f"{file} is too short to be split: its {split} part contains no text.")
    return parts


def _files(folder: Path, split: str) -> list[Path]:
    return [f for f in sorted(folder.iterdir()) if WORDS[split] in f.name and f.suffix in (".txt", ".tokens", ".raw")]


def _file(folder: Path, split: str) -> Path:
    files = _files(folder, split)
    if not files:
        raise FileNotFoundError(f"{folder} has no file of the {split} split, such as {WORDS[split]}.txt.")
    if len(files) > 1:
        raise ValueError(f"{folder} has {len(files)} files of the {split} split: {', '.join(f.name for f in files)}.")
    return files[0]


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}.") from error
    if not text.strip():
        raise ValueError(f"{file} contains no text.")
    return text
