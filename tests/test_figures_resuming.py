"""``softlms figures`` that is interrupted, killed and continued, and the time that it says is left."""

import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from batches import GOOD, register, run, slow_notebooks, write_notebook
from kill_figures import (
    ROOT,
    broken_files,
    differences,
    half_files,
    start_figures,
    stop_figures,
    survivors,
    wait_for,
)
from rich.console import Console

from softlms.workbook.progress import Progress
from softlms.workbook.registry import Folders
from softlms.workbook.state import depends_on, reason_to_run

DEAD = 2**22 + 1  # above Linux's largest process number


def test_resume_leaves_out_what_is_finished(checkout):
    assert run()[0] == 0
    figure, stamp = checkout / "figures/quick/01_good.png", checkout / "executed/quick/01_good.json"
    written = figure.stat().st_mtime_ns
    status, output = run(resume=True)
    assert status == 0 and "01_good: skipped, done before" in output and figure.stat().st_mtime_ns == written
    status, output = run()  # without --resume all run
    assert status == 0 and figure.stat().st_mtime_ns > written and "about 0:0" in output  # the time left is known

    folders, notebook = Folders(checkout, "quick"), checkout / "notebooks/01_good.ipynb"
    parameters = {"profile": "quick"}

    def reason(parameters=parameters, environment=(), **changes):
        return reason_to_run(folders, "01_good", depends_on(notebook, parameters, dict(environment)) | changes)

    assert reason() is None
    (checkout / "corpus").mkdir()
    corpus = str(checkout / "corpus")
    changed = f'parameters changed: data (default) to "{corpus}"'
    assert reason(parameters | {"data": corpus}) == changed
    assert "SOFTLMS_DATA" in reason(environment={"SOFTLMS_DATA": corpus}.items())
    assert reason(library="x") == "library changed"
    assert reason(versions="torch 0").startswith("versions changed: torch 2")
    assert reason(folders={"data": "x"}) == "files changed: data"
    figure.rename(checkout / "hidden")
    assert reason() == "missing: figures/quick/01_good.png"
    (checkout / "hidden").rename(figure)
    (checkout / "executed/quick/01_good.ipynb").unlink()
    assert reason() == "missing: executed/quick/01_good.ipynb"
    write_notebook(checkout, "01_good", GOOD + "\n1")
    assert reason() == "notebook changed"
    stamp.write_text(stamp.read_text("utf-8")[:-9], "utf-8")
    assert reason() == "01_good.json cannot be read"
    stamp.unlink()
    assert reason() == "not done before"


@pytest.mark.slow
def test_a_first_run_says_how_long_it_takes(checkout):
    write_notebook(checkout, "02_more", "import time; time.sleep(1)")
    register(checkout, "01_good", seconds="{ quick = 100, laptop = 4000 }")
    register(checkout, "02_more", seconds="{ quick = 200 }")
    status, output = run()
    assert status == 0 and "01_good: started, 1 of 2; about 5:00 left" in output
    (left,) = re.findall("02_more: started, 2 of 2; about 0:(..) left", output)  # this machine is faster
    assert int(left) < 60
    assert "about 1:10:00 left" in run(profile="laptop")[1]  # its own time where there is one


def test_time_left_follows_the_pace(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("softlms.workbook.progress.time.monotonic", lambda: now[0])
    bars = Progress(Console(file=io.StringIO()), {"01": 60.0, "02": 60.0, "03": 30.0}, jobs=1)
    bars.start("01")
    assert bars.time_left() == "about 2:30 left"
    now[0] = 120.0  # late, and no cell is done
    assert bars.time_left() == "about 5:00 left"  # as long again, and the others at half the pace
    bars.cell("01", 5, 5)
    assert bars.time_left() == "about 3:30 left"
    bars.end("01", 120.0, None)
    bars.start("02")
    assert bars.time_left() == "about 3:00 left"
    now[0] = 160.0
    assert bars.time_left() == "about 2:20 left"
    bars.end("02", 40.0, "failed")  # says nothing of the pace
    bars.start("03")
    assert bars.time_left() == "about 1:00 left"


def test_files_in_a_data_folder_count(checkout):
    (checkout / "corpus").mkdir()
    parameters = {"data": str(checkout / "corpus")}
    notebook = checkout / "notebooks/01_good.ipynb"
    before = depends_on(notebook, parameters, {})
    (checkout / "corpus/train.tsv").write_text("x", "utf-8")
    assert depends_on(notebook, parameters, {})["folders"] != before["folders"]


def test_leftovers_of_processes_that_are_no_more_are_removed(checkout):
    results, executed = checkout / "results/quick", checkout / "executed/quick"
    for folder in (results, executed):
        folder.mkdir(parents=True)
    here = socket.gethostname()
    gone = [results / f".a.csv.partial-{here}-{DEAD}", executed / f".a.ipynb.partial-{here}-{DEAD}.ipynb"]
    kept = [
        results / f".a.csv.partial-{here}-{os.getpid()}",
        results / f".a.csv.partial-other-{DEAD}",
        results / ".a.csv",
    ]
    for path in (*gone, *kept):
        path.touch()
    status, output = run()
    assert status == 0 and f"removed results/quick/{gone[0].name}" in output
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)


@pytest.mark.slow
def test_a_batch_that_was_killed_continues(tmp_path):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    for folder in (reference, killed):
        folder.mkdir()
        slow_notebooks(folder)
    undisturbed = start_figures(reference, "--resume", "-j", "2")
    assert wait_for(undisturbed, "started")
    began = time.monotonic()
    assert undisturbed.wait(timeout=600) == 0
    moments, length = random.Random(5), time.monotonic() - began
    for word in ("started", "started", "done after"):  # the last kill leaves something that is finished
        process = start_figures(killed, "--resume", "-j", "2")
        assert wait_for(process, word)
        assert stop_figures(process, moments.uniform(0, length / 3))
        assert survivors(killed) == [] and broken_files(killed) == []
    output, errors = start_figures(killed, "--resume").communicate(timeout=600)
    assert errors == "" and "skipped, done before" in output
    assert differences(killed, reference) == [] and len(list((killed / "results/quick").iterdir())) == 9
    assert half_files(killed) == []


@pytest.mark.slow
def test_processes_that_runs_use_end_with_a_killed_kernel(tmp_path):
    source = """
import time
from types import SimpleNamespace
from softlms.experiments.jobs import Job, run_jobs

class Bench:
    def stored(self, method, recipe, seed):
        return None

    def run(self, method, recipe, seed):
        print("started", flush=True)
        time.sleep(600)

list(run_jobs([[Job(Bench(), "dense", None, seed)] for seed in range(2)], 2))
"""
    (tmp_path / "kernel.py").write_text(source, "utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "kernel.py"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    assert wait_for(process, "started") and len(survivors(tmp_path, patience=0)) >= 3
    process.kill()
    process.wait()
    assert survivors(tmp_path) == []


def test_ctrl_c_stops_all_and_says_how_to_continue(tmp_path):
    slow_notebooks(tmp_path)
    process = start_figures(tmp_path, "-j", "2")
    assert wait_for(process, "started")
    assert stop_figures(process, 3, signal.SIGINT)
    assert process.returncode == 130
    stopped = "stopped; finished notebooks are kept, and the same command with --resume continues."
    told = process.stderr.read()  # before it, IPython has a warning where the home is read-only
    assert told.endswith(f"softlms figures: {stopped}\n") and "Traceback" not in told
    assert survivors(tmp_path, patience=2) == [] and broken_files(tmp_path) == []
    assert not (tmp_path / "executed/quick/01_one.ipynb").exists()
