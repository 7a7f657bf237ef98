"""The commit at which a number was made, and rows that name it."""

from __future__ import annotations

import io
import subprocess
from functools import cache
from pathlib import Path

import pandas as pd

from softlms.utils.files import lock, whole_file

__all__ = ["append_rows", "commit"]


@cache
def commit() -> str:
    """The library's commit, with a plus if its files differ from it; "none" outside a git checkout."""
    package = Path(__file__).parents[1]
    git = ["git", "-C", str(package)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, encoding="utf-8")
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True)
    except FileNotFoundError:  # no git
        return "none"
    return "none" if head.returncode else head.stdout.strip() + ("+" if changed.returncode else "")


def append_rows(path: str | Path, rows: pd.DataFrame, *, anew: bool = False) -> None:
    """Add rows to a CSV file, created if missing or written `anew`; each row names the commit it was made at."""
    path = Path(path)
    added = io.StringIO(rows.assign(commit=commit()).to_csv(index=False, float_format="%.6g"))
    with lock(path), whole_file(path) as partial:  # else one of two writers at the same time would lose its rows
        # as text: existing rows stay as they were written
        texts = [path, added] if path.is_file() and not anew else [added]
        parts = [pd.read_csv(text, dtype=str, keep_default_na=False) for text in texts]
        pd.concat(parts).fillna("").to_csv(partial, index=False, lineterminator="\n")
