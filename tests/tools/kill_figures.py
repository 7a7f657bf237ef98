"""Kill ``softlms figures`` at random moments, resume it, and compare its tables with those of a run nobody killed.

    python tests/tools/kill_figures.py --kills 20                       # all notebooks, profile quick: about an hour
    python tests/tools/kill_figures.py --kills 1 01 --profile quick     # some minutes

It clones this checkout's last commit twice into a temporary folder. In one clone all notebooks run undisturbed. In the
other the command and all that is in its process group get SIGKILL, and it is started again with ``--resume``. The
moments are random ones of the undisturbed run, each met at the same place of its notebook: by the clock, kills that
come faster than a notebook's longest cell would never let it reach the next. After each kill nothing may live on, and
every file must be whole. In the end its tables are compared, all columns but those of measured times. Exit status 1
when something differs. Not part of the test suite; `test_figures` does the same with notebooks that take seconds.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "import sys; from softlms.cli import main; sys.exit(main())", "figures"]
FOLDERS = ("figures", "results", "executed")
MEASURED = re.compile(r"seconds|ms|.*_ms|.*_s|.*_us|peak_gb|.*speed_?up|times_faster|roofline_limit|gain")  # times
# notebook 09 keeps layers dense by their measured time, so that ranks and what is counted on them follow it
RANKED_BY_TIME = re.compile(r"parameters|.*flop_limit|file_mb|kept_linear|kept_flops|output_error")


def start_figures(folder, *arguments, code=ROOT):
    """The command in a checkout, the library from `code`, in a process group of its own.

    A shell lets what it starts in the background ignore Ctrl-C, tests too; here it counts.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "start_new_session": True}
    options |= {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(code)}}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([*COMMAND, *arguments], **options)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(process, word):
    """Read what the command says until a line holds a word; False where none does."""
    return any(word in line for line in process.stdout)


def stop_figures(process, delay, how=signal.SIGKILL):
    """Send a signal to the whole process group after so many seconds; False where it ended before."""
    try:
        process.wait(timeout=delay)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, how)
        process.wait(timeout=60)
        return True


def survivors(folder, patience=10):
    """Processes that still work in a checkout after so many seconds."""
    end = time.monotonic() + patience
    while (alive := [p for p in psutil.process_iter() if _is_in(p, folder)]) and time.monotonic() < end:
        time.sleep(0.2)
    return alive


def _is_in(process, folder):
    try:
        place = Path(process.cwd())
    except (psutil.Error, OSError):
        return False
    return process.pid != os.getpid() and place.is_relative_to(folder)


def broken_files(folder):
    """Files under their final names that are not whole."""
    broken = []
    for path in (path for kind in FOLDERS for path in (folder / kind).rglob("[!.]*") if path.is_file()):
        try:
            if path.suffix in (".json", ".ipynb"):
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".csv":
                pd.read_csv(path)
            elif not path.stat().st_size:
                broken.append(path)
        except ValueError:
            broken.append(path)
    return broken


def half_files(folder):
    return [path for kind in FOLDERS for path in (folder / kind).rglob(".*.partial-*")]


def tables(folder):
    """Every CSV below results, without the columns of measured times."""
    found = {path.relative_to(folder): pd.read_csv(path) for path in sorted((folder / "results").rglob("*.csv"))}
    return {path: _without_times(path.name, table) for path, table in found.items()}


def _without_times(name, table):
    if name.startswith("09"):
        table = table.drop(columns=[column for column in table if RANKED_BY_TIME.fullmatch(column)])
    if name.startswith("10"):  # claims on speed
        table = table[table.unit != "times"]
    return table.drop(columns=[column for column in table if MEASURED.fullmatch(column)])


def differences(folder, reference):
    """Names of tables that are in one only, or differ."""
    ours, theirs = tables(folder), tables(reference)
    return [str(path) for path in ours | theirs if path not in ours or not ours[path].equals(theirs.get(path))]


def draw_moments(executed, kills, seed):
    """When to kill, in the order of the run: notebooks, and seconds after the start of each."""
    starts, end = {}, 0.0
    for path in sorted(executed.glob("[!.]*.ipynb")):
        starts[path.stem] = end
        end += json.loads(path.read_text("utf-8"))["metadata"]["papermill"]["duration"]
    generator = random.Random(seed)
    moments = sorted(generator.uniform(0, end) for _ in range(kills))
    struck = [max(name for name in starts if starts[name] <= moment) for moment in moments]
    return [(name, moment - starts[name]) for name, moment in zip(struck, moments, strict=True)]


def reach(process, notebook):
    """Read what the command says until a notebook, or a later one, has started; its name, or None where none does."""
    started = (line.split(":")[0].strip() for line in process.stdout if ": started" in line)
    return next((name for name in started if name >= notebook), None)


def disturb(killed, arguments, moments):
    """Kill at these moments, then let it end; what is wrong."""
    wrong = []
    for i, (notebook, delay) in enumerate(moments):
        process = start_figures(killed, *arguments, code=killed)
        struck = reach(process, notebook)
        if struck is None or not stop_figures(process, delay):
            return [*wrong, f"ended before kill {i + 1}"]
        print(f"kill {i + 1}: {struck} after {delay:.1f} s; half-written: {len(half_files(killed))}", flush=True)
        wrong += [f"lives on: {process}" for process in survivors(killed)]
        wrong += [f"not whole: {path}" for path in broken_files(killed)]
    process = start_figures(killed, *arguments, code=killed)
    wrong += finish(process)
    return [*wrong, *(f"left over: {path}" for path in half_files(killed))]


def finish(process):
    """Let the command end and print what it says; what is wrong where it fails: two runs that fail alike are equal."""
    print(*process.communicate(), flush=True)
    return [f"a run ended with status {process.returncode}"] if process.returncode else []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    arguments = [*options.notebooks, "--profile", options.profile, "--resume"]
    with tempfile.TemporaryDirectory() as place:
        reference, killed = Path(place) / "reference", Path(place) / "killed"
        for clone in (reference, killed):
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        wrong = finish(start_figures(reference, *arguments, code=reference))
        moments = draw_moments(reference / "executed" / options.profile, options.kills, options.seed)
        wrong += disturb(killed, arguments, moments)
        wrong += [f"differs: {name}" for name in differences(killed, reference)]
    print("\n".join(wrong) or f"{options.kills} kills: nothing lived on or was half-written, all tables are equal")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
