"""The folders that notebooks write to, and what a notebook wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["Folders", "folder_state", "project_root"]


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


def folder_state(folder: Path) -> str:
    """Hash of the names, sizes and times of all files in a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    state = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def project_root() -> Path:
    """The checkout that holds ``notebooks/``, found from the working folder upwards.

    papermill runs a notebook in the caller's folder, nbval and Jupyter in the notebook's: both find it.

    Raises
    ------
    FileNotFoundError
        The working folder is in no checkout.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError(f"{here} is in no softlms checkout (a folder with notebooks/ and pyproject.toml).")
