"""Tables that one notebook reads and another wrote, or that are committed: what it shows changes with them."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["READS", "follows_others", "read_tables"]

# patterns in results/, by notebook; {profile}: of the profile that runs
READS: dict[str, tuple[str, ...]] = {
    "05_bert_table": ("laptop/05_bert_table.csv", "laptop/05_bert_table_ranks.csv"),
    "09_speedup": ("laptop/0[5-8]_*_ranks.csv", "laptop/09_speedup.csv"),
    "10_paper_vs_reproduced": ("claims.toml", "*.csv", "laptop/0*.csv", "{profile}/0*.csv"),
}


def follows_others(notebook: str) -> bool:
    """Whether a notebook reads what the others write in the same profile, so that it runs after them."""
    return any("{profile}" in pattern for pattern in READS.get(notebook, ()))


def read_tables(results: Path, notebook: str, profile: str | None = None) -> dict[str, str]:
    """What a notebook reads and does not write itself: file in ``results`` to hash of its content.

    Parameters
    ----------
    results : Path
        The folder ``results``.
    notebook : str
        Its name without ending.
    profile : str, optional
        That runs; None: only what is read in every profile.
    """
    patterns = [pattern for pattern in READS.get(notebook, ()) if profile or "{profile}" not in pattern]
    files = {file for pattern in patterns for file in results.glob(pattern.format(profile=profile))}
    return {
        file.relative_to(results).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if not (file.parent.name == profile and file.name.startswith(notebook))
    }
