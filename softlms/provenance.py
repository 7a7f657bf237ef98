"""What a number depends on: machine, library versions, weights; and files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pandas as pd
import psutil
import torch
import transformers
from filelock import BaseFileLock, FileLock

from softlms.hub import commit_of
from softlms.precision import fast_bf16

__all__ = [
    "append_rows", "commit", "hardware", "is_orphaned", "lock", "process_mark", "versions", "weights_hash",
    "whole_file",
]  # fmt: skip

WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model")  # and what belongs to them


def hardware(threads: int | None = None) -> str:
    """Processor, threads and accelerator: numbers of two machines are never mixed in one comparison.

    Parameters
    ----------
    threads : int, optional
        Those that the work uses; torch's number at the moment when not given.
    """
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {threads or torch.get_num_threads()} threads{gpu}"


@cache
def _processor() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text("utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    # one name may stand for processors with other instructions, whose numbers differ
    return f"{model} {torch.backends.cpu.get_cpu_capability()}{'-BF16' if fast_bf16() else ''}"


@cache
def versions() -> str:
    """Versions of the libraries that numbers depend on."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


@cache
def commit() -> str:
    """The library's commit, with a plus where its files differ from it; "none" outside a git checkout."""
    package = Path(__file__).parent
    git = ["git", "-C", str(package)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, encoding="utf-8")
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True)
    except FileNotFoundError:  # no git
        return "none"
    return "none" if head.returncode else head.stdout.strip() + ("+" if changed.returncode else "")


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


def append_rows(path: str | Path, rows: pd.DataFrame) -> None:
    """Add rows to a CSV file, which a command makes where there is none; each names the commit it was made at."""
    path = Path(path)
    added = io.StringIO(rows.assign(commit=commit()).to_csv(index=False, float_format="%.6g"))
    with lock(path), whole_file(path) as partial:  # else of two that read the same file one loses its rows
        # as text: rows that are there stay as they were written
        texts = [path, added] if path.is_file() else [added]
        parts = [pd.read_csv(text, dtype=str, keep_default_na=False) for text in texts]
        pd.concat(parts).fillna("").to_csv(partial, index=False, lineterminator="\n")
