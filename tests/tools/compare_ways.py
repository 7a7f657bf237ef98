"""Run all notebooks on their own profile under papermill, nbval, nbclient and JupyterLab, and compare their tables.

    python tests/tools/compare_ways.py                          # all notebooks, each way from nothing: about an hour
    python tests/tools/compare_ways.py 01 03 --ways papermill nbclient

Each way has a clone of this checkout's last commit of its own. Compared are all tables that a way wrote, all columns
but those of measured times. Exit status 1 when something differs, is missing, or a notebook failed. JupyterLab needs
what ``make test-browser`` needs. Not part of the test suite.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from kill_figures import differences, tables
from lab import BROWSER, DRIVER, NotebookPage, open_browser, serve_lab

from softlms.workbook.registry import choose_notebooks

ROOT = Path(__file__).parents[2]
MODULE = [sys.executable, "-m"]


def run_papermill(clone, notebooks, environment):
    (clone / "executed").mkdir()
    for path in notebooks:
        command = [*MODULE, "papermill", str(path), f"executed/{path.name}", "--no-progress-bar"]
        subprocess.run(command, cwd=clone, env=environment, check=True, capture_output=True)


def run_nbval(clone, notebooks, environment):
    command = [*MODULE, "pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1800"]
    subprocess.run([*command, *map(str, notebooks)], cwd=clone, env=environment, check=True, capture_output=True)


def run_nbclient(clone, notebooks, environment):
    command = [sys.executable, "-c", "from nbclient.cli import main; main()", "--timeout=1800", *map(str, notebooks)]
    subprocess.run(command, cwd=clone, env=environment, check=True, capture_output=True)


def run_jupyterlab(clone, notebooks, environment):
    for path in notebooks:  # a server each: kernels, some of more than 2 GB, would live as long as it does
        with serve_lab(clone, **environment) as address, open_browser() as browser:
            page = NotebookPage(browser, address, clone / path)
            page.run_all(1800)
            if errors := page.errors():
                raise RuntimeError(f"{path.name}: {errors[0]}")


WAYS = {"papermill": run_papermill, "nbval": run_nbval, "nbclient": run_nbclient, "jupyterlab": run_jupyterlab}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="by the beginning of a name; all when none is given")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    try:
        notebooks = [path.relative_to(ROOT) for path in choose_notebooks(ROOT / "notebooks", options.notebooks)]
    except ValueError as failure:
        parser.error(str(failure))
    if "jupyterlab" in options.ways and not (BROWSER and DRIVER and find_spec("selenium")):
        others = " ".join(way for way in WAYS if way != "jupyterlab")
        parser.error(f"jupyterlab needs chromium, chromedriver and selenium; leave it out with --ways {others}")
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        clones = {way: Path(place) / way for way in options.ways}
        for clone in clones.values():  # all of the same commit
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        for way, clone in clones.items():
            began = time.monotonic()
            try:
                WAYS[way](clone, notebooks, os.environ | {"PYTHONPATH": str(clone)})
            except subprocess.CalledProcessError as failure:
                wrong.append(f"{way}: {(failure.stdout + failure.stderr).decode()[-2000:]}")
            except Exception as failure:  # the other ways are compared all the same
                wrong.append(f"{way}: {failure!r}")
            written = [path for path in tables(clone) if path.parts[1] == "quick"]
            wrong += [] if written else [f"{way} wrote no table"]
            print(f"{way}: {len(written)} tables in {time.monotonic() - began:.0f} s", flush=True)
        first, *others = clones
        for way in others:
            wrong += [f"{way}: {name} is not that of {first}" for name in differences(clones[way], clones[first])]
    print("\n".join(wrong) or f"{len(notebooks)} notebooks: all tables are equal")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
