"""Notebooks under test: nbval runs each as the manifest says, after a look that it can fail at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from softlms.workbook.folders import project_root
from softlms.workbook.lanes import LANES, read_lanes
from softlms.workbook.lint import lint
from softlms.workbook.stamp import CELL_TIMEOUT_S, OWN_PARTS, describe, stale_parts

__all__ = ["check_notebooks"]


def check_notebooks(jobs: Sequence[str] = ()) -> int:
    """Run the notebooks of some jobs under nbval; those that could pass without a check fail before anything runs.

    Parameters
    ----------
    jobs : sequence of str
        Sections of ``lanes.toml``; all when empty.

    Returns
    -------
    int
        Exit status: 0, or 1 if a notebook failed.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown job, no checkout, or as from `read_lanes`.
    """
    root = project_root()
    lanes = read_lanes(root / "notebooks")
    unknown = [job for job in jobs if job not in lanes]
    if unknown:
        raise ValueError(f"Unknown job {unknown[0]!r}; known: {', '.join(lanes)}.")
    chosen = {path: lane for job in jobs or lanes for path, lane in lanes[job].items()}
    faults = []
    for path, lane in chosen.items():
        book = json.loads(path.read_text("utf-8"))
        found, stale = lint(book, lane), stale_parts(path.stem, book, root)
        if OWN_PARTS & set(stale):
            found.append(f"stale, {describe(stale)}: run softlms stamp {path.stem}")
        elif stale:
            print(f"warning: {path.stem} is stale, {describe(stale)}", flush=True)
        faults += [f"{path.stem}: {fault}" for fault in found]
    if faults:
        print("\n".join(faults))
        return 1
    environment = os.environ | {"PYTHONUTF8": "1"}  # nbval opens notebooks in the locale's encoding
    status = 0
    for lane, option in LANES.items():
        paths = [str(path) for path in chosen if chosen[path] == lane]
        if paths:
            settings = [option, "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT_S}"]
            command = [sys.executable, "-m", "pytest", *settings, *paths]
            status |= bool(subprocess.run(command, cwd=root, env=environment).returncode)
    return status
