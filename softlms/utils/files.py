"""Files that are written completely or not at all, leftovers of killed processes, and locks."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import BaseFileLock, FileLock

__all__ = ["check_writable", "is_orphaned", "last_checkpoint", "lock", "process_mark", "remove_leftovers", "whole_file"]


def process_mark() -> str:
    """Host and process id, for the names of this process's unfinished files; read by `is_orphaned`."""
    return f"{socket.gethostname()}-{os.getpid()}"


def is_orphaned(path: Path) -> bool:
    """Whether a name contains a `process_mark` of a process on this machine that has ended; others may still run."""
    match = re.fullmatch(rf"\..+-{re.escape(socket.gethostname())}-(\d+)([-.]\w+)?", path.name)
    return match is not None and not psutil.pid_exists(int(match[1]))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to. It replaces `path` if the block succeeds, and is removed if it fails.

    Parameters
    ----------
    path : Path
        Its folder is created if it does not exist.

    Raises
    ------
    OSError
        As raised in the block, with the file name added if missing: a full disk fails in a write, which names no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{process_mark()}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def lock(path: Path) -> BaseFileLock:
    """Lock a file or folder, existing or not, for one process at a time; the lock ends with the process.

    Parameters
    ----------
    path : Path
        The lock is a hidden file beside it, which is kept. Their folder is created if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def check_writable(folders: Iterable[Path]) -> None:
    """Create folders and write a temporary file into each.

    Raises
    ------
    OSError
        A folder cannot be written: it is read-only, full, or not a folder.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
        except (FileExistsError, NotADirectoryError):
            raise OSError(f"{folder} cannot be written: there is a file where the folder should be.") from None
        except OSError as error:
            raise OSError(f"{folder} cannot be written: {error.strerror}.") from None


def remove_leftovers(folders: Iterable[Path]) -> list[Path]:
    """Remove half-written files of ended processes on this machine; see `whole_file`.

    Returns
    -------
    list of Path
        The removed files.
    """
    removed = [file for folder in folders for file in folder.glob(".*.partial-*") if is_orphaned(file)]
    for file in removed:
        file.unlink(missing_ok=True)
    return removed


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a Trainer, or None.

    A kill leaves an incomplete one: its state, which is written last, is missing or truncated.
    """
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json") if _is_json(state)]
    return str(max(whole, key=lambda found: int(found.name.removeprefix("checkpoint-")))) if whole else None


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True
