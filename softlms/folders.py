"""The folders that notebooks write to: can they be written, what killed runs left there, what a notebook wrote."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

from softlms.provenance import is_orphaned

__all__ = ["Folders", "check_writable", "folder_state", "remove_leftovers"]


class Folders:
    """A checkout's folders for one profile.

    Attributes
    ----------
    profile : str
    root, figures, results, executed, runs : Path
    """

    def __init__(self, root: Path, profile: str) -> None:
        self.root, self.profile = root, profile
        self.figures, self.results, self.executed = (
            root / kind / profile for kind in ("figures", "results", "executed")
        )
        self.runs = root / "runs"

    def written(self, notebook: str) -> dict[Path, tuple[int, int]]:
        """A notebook's figures and tables as they are now, each with what changes when it is written again."""
        files = [file for folder in (self.figures, self.results) for file in folder.glob(f"{notebook}*")]
        return {file: (stat.st_ino, stat.st_mtime_ns) for file in sorted(files) if (stat := file.stat())}


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
    """Remove what processes of this machine that are no more left half-written; see `softlms.provenance.whole_file`.

    Returns
    -------
    list of Path
        The files removed.
    """
    removed = [file for folder in folders for file in folder.glob(".*.partial-*") if is_orphaned(file)]
    for file in removed:
        file.unlink(missing_ok=True)
    return removed


def folder_state(folder: Path) -> str:
    """Hash of the names, sizes and times of all files in a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    state = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()
