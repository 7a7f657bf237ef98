"""Figures drawn again from the tables that are there; no notebook runs."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
from rich.console import Console

from softlms.workbook.folders import Folders
from softlms.workbook.plots.drawing import DRAWINGS, draw
from softlms.workbook.plots.style import use_style
from softlms.workbook.progress import say

__all__ = ["replot"]


def replot(notebooks: Sequence[str], folders: Folders, console: Console, *, named: bool) -> list[str]:
    """Draw all figures of some notebooks.

    Parameters
    ----------
    notebooks : sequence of str
        Names without ending.
    folders : Folders
    console : Console
        A line for each figure, and for each notebook that is left out.
    named : bool
        The user chose the notebooks: then none is left out because it has not run yet in this profile.

    Returns
    -------
    list of str
        What could not be drawn, and why.
    """
    mpl.use("agg")
    use_style()
    wrong, drawn = [], 0
    for notebook in notebooks:
        figures = [name for name in DRAWINGS if name.startswith(notebook)]
        tables = {table for name in figures for table in DRAWINGS[name].tables}
        if not named and tables and not any((folders.results / f"{table}.csv").is_file() for table in tables):
            say(console, f"{notebook}: left out, {folders.results.relative_to(folders.root)} holds no table of it")
            continue
        for name in figures:
            try:
                draw(name, folders.figures, folders.results)
                say(console, f"{name}: drawn")
                drawn += 1
            except Exception as error:  # one figure that fails does not stop the others
                wrong.append(f"{name}: {error if isinstance(error, OSError) else f'{type(error).__name__}: {error}'}")
                say(console, f"{name}: not drawn")
            finally:
                plt.close("all")
    if not drawn and not wrong:
        wrong.append(f"nothing to draw: {folders.results.relative_to(folders.root)} holds no tables yet.")
    return wrong
