"""Names on the hub, with the revision that is meant (``name@revision``), and what a location holds."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

__all__ = ["at", "commit_of", "is_hub", "pretrained", "split_revision", "weights_hash"]

WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model")  # and what belongs to them


def split_revision(text: str) -> tuple[str, str]:
    """A name and its revision (a commit, tag or branch), "" where none is given and the newest is meant.

    Raises
    ------
    ValueError
        One of the two is empty.

    Examples
    --------
    >>> split_revision("bert-base-uncased@86b5e093")
    ('bert-base-uncased', '86b5e093')
    """
    name, mark, revision = text.partition("@")
    if mark and not (name and revision):
        raise ValueError(f"{text!r} is no name@revision: give a commit, tag or branch after the name, or no '@'.")
    return name, revision


def at(revision: str) -> dict[str, str]:
    """The option of what loads from the hub."""
    return {"revision": revision} if revision else {}


def is_hub(data: str | os.PathLike[str]) -> bool:
    """Whether data are those of the hub: "hub", or "hub@revision"."""
    return isinstance(data, str) and data.partition("@")[0] == "hub"


def pretrained(kind: Any, location: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained`` of a folder, or of a hub name at its revision.

    Parameters
    ----------
    kind : type
        A class of transformers, such as ``AutoModel`` or ``AutoTokenizer``.
    location : str or Path
        A folder, or ``name@revision``.
    """
    if Path(location).is_dir():
        return kind.from_pretrained(location, **options)
    name, revision = split_revision(str(location))
    return kind.from_pretrained(name, **at(revision), **options)


def commit_of(location: str) -> str:
    """The commit of a hub name when it was first asked for; "unknown" where neither the hub nor the cache can say."""
    try:
        return _found_commit(*split_revision(location))
    except EntryNotFoundError:  # what loads the model next says why
        return "unknown"


@cache  # one process does not mix two states of the hub; an error is asked about again
def _found_commit(name: str, revision: str) -> str:
    return Path(hf_hub_download(name, "config.json", revision=revision or None)).parent.name


def weights_hash(location: str) -> str:
    """Hash of a folder's weights, configuration and tokenizer; of a hub name, itself and the commit that it is at."""
    if not Path(location).is_dir():
        return f"{location}, commit {commit_of(location)}"
    paths = [path for path in sorted(Path(location).iterdir()) if path.suffix in WEIGHTS]
    return _content_hash(*((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@cache
def _content_hash(*files: tuple[Path, int, int]) -> str:
    """Of files that are known to have changed by their size and time."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
