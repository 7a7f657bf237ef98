"""Notebooks that take no time, and the command that runs them."""

import io

import nbformat
from rich.console import Console

from softlms.workbook.run import make_figures

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
PARAMETERS = 'profile = "quick"\ndata = ""\nmodel = ""'
SAVE = """
from pathlib import Path
folder = Path("../figures") / profile
folder.mkdir(parents=True, exist_ok=True)
"""
GOOD = SAVE + '(folder / "01_good.png").write_text(data)'


def write_notebook(folder, name, source, parameters=PARAMETERS):
    first = nbformat.v4.new_code_cell(parameters)
    first.metadata["tags"] = ["parameters"]
    cells = [first, nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("'the end'")]
    book = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL}, cells=cells)
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(book, folder / "notebooks" / f"{name}.ipynb")


def register(folder, name, **entry):
    lines = [f"{key} = {value}\n" for key, value in ({"lane": "'lax'"} | entry).items()]
    with (folder / "notebooks/notebooks.toml").open("a", encoding="utf-8") as file:
        file.write("".join([f"[{name}]\n", *lines]))


def run(*names, command=make_figures, **options):
    output = io.StringIO()
    status = command(names, console=Console(file=output, width=200), **options)
    return status, output.getvalue()


def slow_notebooks(folder):
    """Three notebooks that write a table each, slowly, half by half."""
    source = """
import time
from softlms.utils.files import whole_file
from pathlib import Path
for part in range(3):
    with whole_file(Path("../results") / profile / f"{name}_{part}.csv") as partial, partial.open("w") as file:
        for row in range(8):
            file.write(f"row,value\\n" if row == 0 else f"{row},{part * row}\\n")
            file.flush()
            time.sleep(0.1)
"""
    (folder / "pyproject.toml").touch()
    for name in ("01_one", "02_two", "03_three"):
        write_notebook(folder, name, source, PARAMETERS + f"\nname = {name!r}")
