"""Files that are there whole or not at all, what a killed process left of them, and one process at a time."""

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
    """Host and process, for the name of what this process has not finished; `is_orphaned` reads it."""
    return f"{socket.gethostname()}-{os.getpid()}"


def is_orphaned(path: Path) -> bool:
    """Whether a name holds a `process_mark` of this machine whose process is no more; others may still be at work."""
    match = re.fullmatch(rf"\..+-{re.escape(socket.gethostname())}-(\d+)([-.]\w+)?", path.name)
    return match is not None and not psutil.pid_exists(int(match[1]))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes its place when the block ends well, and leaves nothing behind when not.

    Parameters
    ----------
    path : Path
        Its folder is made where there is none.

    Raises
    ------
    OSError
        As the block raises it, with the file's name where it has none: a full disk is met in a write, which has none.
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
    """For what one process at a time may do with a file or folder, be it there or not; it ends with the process.

    Parameters
    ----------
    path : Path
        The lock is a hidden file beside it, which stays; the folder of both is made where there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def check_writable(folders: Iterable[Path]) -> None:
    """Make folders and write a nameless file into each.

    Raises
    ------
    OSError
        One cannot be written: read-only, full, or no folder.
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
    """Remove what processes of this machine that are no more left half-written; see `whole_file`.

    Returns
    -------
    list of Path
        The files removed.
    """
    removed = [file for folder in folders for file in folder.glob(".*.partial-*") if is_orphaned(file)]
    for file in removed:
        file.unlink(missing_ok=True)
    return removed


def last_checkpoint(folder: Path) -> str | None:
    """A Trainer's newest checkpoint that is whole; None where there is none.

    A kill leaves a half one: its state, which is written last, is missing or broken off.
    """
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json") if _is_json(state)]
    return str(max(whole, key=lambda found: int(found.name.removeprefix("checkpoint-")))) if whole else None


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True
