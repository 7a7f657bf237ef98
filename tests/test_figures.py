"""The command ``softlms figures`` on notebooks that take no time, through the real papermill."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import nbformat
import pytest
from disks import make_read_only, mounted
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

from softlms import cli
from softlms.workbook import process
from softlms.workbook.progress import Progress
from softlms.workbook.registry import Folders
from softlms.workbook.run import make_figures, replot_figures
from softlms.workbook.state import depends_on, reason_to_run

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
PARAMETERS = 'profile = "quick"\ndata = ""\nmodel = ""'
SAVE = """
from pathlib import Path
folder = Path("../figures") / profile
folder.mkdir(parents=True, exist_ok=True)
"""
GOOD = SAVE + '(folder / "01_good.png").write_text(data)'
DEAD = 2**22 + 1  # above Linux's largest process number


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


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    write_notebook(tmp_path, "01_good", GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOFTLMS_DATA", raising=False)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A checkout on a disk of its own, of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as place:
        (place / "pyproject.toml").touch()
        (place / "notebooks").mkdir()
        monkeypatch.chdir(place)
        yield place
        os.chdir(tmp_path)


def run(*names, command=make_figures, **options):
    output = io.StringIO()
    status = command(names, console=Console(file=output, width=200), **options)
    return status, output.getvalue()


@pytest.mark.slow
def test_failures_of_every_kind_are_told_and_do_not_stop_the_others(checkout, capsys):
    for name, source in {
        "02_bad": "raise RuntimeError('on purpose\\nsecond line')",
        "03_exit": "import sys; sys.exit(0)",
        "04_kernel": "import os; os._exit(3)",
        "05_process": "import os, time; os.kill(os.getppid(), 9); time.sleep(60)",
        "06_good": GOOD,
    }.items():
        write_notebook(checkout, name, source)
    status, output = run(jobs=2)
    assert status == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    for name, error in (
        ("02_bad", "RuntimeError: on purpose"),
        ("03_exit", "the notebook ended itself before its last cell"),
    ):
        copy = f"(executed copy: executed/quick/{name}.failed.ipynb)"
        assert f"softlms figures: {name} failed in cell 3: {error} {copy}" in errors
    assert any(line.startswith("softlms figures: 04_kernel failed in cell 3: DeadKernelError") for line in errors)
    assert any("05_process failed in cell 0: its process ended with status -9" in line for line in errors)
    executed = checkout / "executed" / "quick"
    assert sorted(path.name for path in executed.glob("[0-9]*.ipynb")) == [
        "01_good.ipynb",
        "02_bad.failed.ipynb",
        "03_exit.failed.ipynb",
        "04_kernel.failed.ipynb",
        "06_good.ipynb",
    ]
    assert "An Exception was encountered" in (executed / "02_bad.failed.ipynb").read_text("utf-8")
    good = json.loads((executed / "01_good.ipynb").read_text("utf-8"))
    assert good["metadata"]["papermill"]["output_path"] == str(executed / "01_good.ipynb")
    assert output.count(": started") == 6 and output.count(": done after") == 2  # a plain line each
    assert "1 figures, 0 tables" in output and not survivors(checkout)


def test_two_at_a_time(checkout):
    """Each of two notebooks waits for the other."""
    meet = SAVE + "import time\n(folder / {!r}).touch()\nwhile not (folder / {!r}).exists(): time.sleep(0.05)"
    write_notebook(checkout, "01_good", meet.format("01", "02"))
    write_notebook(checkout, "02_good", meet.format("02", "01"))
    assert run(jobs=2)[0] == 0


def test_parameters_reach_the_notebooks_that_have_them(checkout):
    (checkout / "corpus").mkdir()
    shown = "import json\n(folder / '02_more.png').write_text(json.dumps([rate, few, seeds, where]))"
    write_notebook(
        checkout, "02_more", SAVE + shown, PARAMETERS + "\nrate = 0.1\nfew = False\nseeds = (1,)\nwhere = ''"
    )
    given = ["rate=1e-3", "few=true", "seeds=(2, 3)", "where=./corpus"]
    status, output = run("01", "02", profile="laptop", data="corpus", parameters=given)
    assert status == 0 and "figures/laptop" in output
    assert (checkout / "figures/laptop/01_good.png").read_text("utf-8") == str(checkout / "corpus")
    values = json.loads((checkout / "figures/laptop/02_more.png").read_text("utf-8"))
    assert values == [0.001, True, [2, 3], str(checkout / "corpus")]
    assert not (checkout / "figures/quick").exists()


def test_bad_input_stops_before_anything_runs(checkout, capsys):
    write_notebook(checkout, "02_more", "", PARAMETERS + "\nrate = 0.1")
    for arguments, message in (
        (["--profile", "huge"], "Unknown profile 'huge'; known: quick, laptop, paper"),
        (["99"], "Unknown notebook '99'; known: 01_good, 02_more"),
        (
            ["01", "--text", "embedded"],
            "Unknown parameter 'text': none of 01_good has it; known: data, model, profile.",
        ),
        (
            ["-p", "rat=1"],
            "Unknown parameter 'rat': none of 01_good, 02_more has it; known: data, model, profile, rate.",
        ),
        (["-p", "rate=fast"], "Parameter 'rate' is 'fast'; expected: number, such as 0.1."),
        (["-p", "rate"], "-p 'rate' is not a parameter: write -p name=value."),
        (["-p", "data=x"], "-p 'data=x': write --data instead."),
        (["--data", "nowhere"], "--data is 'nowhere'; there is no such folder"),
        (["--model", "./nowhere"], "--model is './nowhere'; there is no such folder"),
        (["-j", "0"], "-j is 0; it must be at least 1."),
        (["--replot", "--resume", "-j", "2"], "--replot runs no notebook: jobs, resume would have no effect."),
    ):
        assert cli.main(["figures", *arguments]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    assert {path.name for path in checkout.iterdir()} == {"notebooks", "pyproject.toml"}
    with pytest.raises(SystemExit):
        cli.main(["figures", "--nonsense"])


def test_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["figures"]) == 2
    assert "is not in a softlms checkout" in capsys.readouterr().err


def test_missing_kernel(checkout, monkeypatch, capsys):
    monkeypatch.setattr(process, "KERNEL", "elsewhere")
    assert cli.main(["figures"]) == 2
    assert f"'elsewhere' is missing; run: {sys.executable} -m pip install ipykernel" in capsys.readouterr().err
    assert not (checkout / "executed").exists()


@pytest.mark.parametrize("folder", ["figures", "results/quick", "executed", "runs"])
def test_a_file_where_a_folder_should_be(checkout, capsys, folder):
    (checkout / folder).parent.mkdir(exist_ok=True)
    (checkout / folder).write_text("mine", "utf-8")
    assert cli.main(["figures"]) == 2
    assert "cannot be written: there is a file where the folder should be" in capsys.readouterr().err
    assert (checkout / folder).read_text("utf-8") == "mine" and not (checkout / "figures/quick/01_good.png").exists()


def test_read_only_disk(small_disk, capsys):
    write_notebook(small_disk, "01_good", GOOD)
    make_read_only(small_disk)
    assert cli.main(["figures"]) == 2
    assert "cannot be written: Read-only file system" in capsys.readouterr().err


@pytest.mark.slow
def test_full_disk(small_disk, capsys):
    """A table, then a notebook's own output, then the driver's first file does not fit."""
    table = "from softlms.utils.files import whole_file\nwith whole_file(folder / '01_table.csv') as partial:\n"
    write_notebook(small_disk, "01_table", SAVE + table + "    partial.write_bytes(bytes(2**22))")
    write_notebook(small_disk, "02_output", "print('x' * 2**22)")
    status, _ = run()
    one, two = capsys.readouterr().err.splitlines()
    assert status == 1
    full = "OSError: [Errno 28] No space left on device: "
    assert f"01_table failed in cell 3: {full}'" in one and "/figures/quick/01_table.csv'" in one
    assert "02_output failed in cell" in two and f"{full}'" in two and "/executed/quick/" in two
    assert not half_files(small_disk) and not broken_files(small_disk)
    assert not (small_disk / "executed/quick/02_output.failed.ipynb").exists()
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(2**21))
    assert cli.main(["figures"]) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err


def test_a_failed_run_does_not_replace_a_good_one(checkout, capsys):
    source = GOOD + "\nassert not broken, 'on purpose'"
    write_notebook(checkout, "01_good", source, PARAMETERS + "\nbroken = False")
    good, failed = (checkout / "executed/quick" / name for name in ("01_good.ipynb", "01_good.failed.ipynb"))
    assert run()[0] == 0
    before = good.read_bytes()
    assert run(parameters=["broken=true"])[0] == 1
    assert good.read_bytes() == before and failed.is_file()
    status, output = run(resume=True)  # what the failed run wrote may be of other parameters
    assert status == 0 and "01_good: will run, not done before" in output and not failed.exists()


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


def test_replot(checkout, capsys):
    results = checkout / "results/laptop"
    results.mkdir(parents=True)
    shutil.copy(ROOT / "notebooks/notebooks.toml", checkout / "notebooks")
    for name in ("03_block_sensitivity", "07_tinyllama_table", "09_speedup", "10_more"):
        write_notebook(checkout, name, "raise RuntimeError")  # none of them runs
    for name in ("03_block_sensitivity", "07_tinyllama_table", "07_tinyllama_table_ranks", "09_speedup"):
        shutil.copy(ROOT / f"results/laptop/{name}.csv", results)
    status, output = run(profile="laptop", command=replot_figures)
    assert status == 0 and capsys.readouterr().err == ""
    assert output.splitlines() == [
        "03_block_sensitivity: drawn",
        "07_tinyllama_table: drawn",
        "07_tinyllama_table_ranks: drawn",
        "07_tinyllama_table_smollm2: skipped, results/laptop has no table of smollm2",
        "07_tinyllama_table_smollm2_ranks: skipped, results/laptop has no table of smollm2",
        "07_tinyllama_table_smollm2_recommended: skipped, results/laptop has no table of smollm2_recommended",
        "07_tinyllama_table_smollm2_recommended_ranks: skipped, results/laptop has no table of smollm2_recommended",
        "07_tinyllama_table_recommended: skipped, results/laptop has no table of recommended",
        "07_tinyllama_table_recommended_ranks: skipped, results/laptop has no table of recommended",
        "09_speedup: drawn",
    ]
    assert (checkout / "figures/laptop/09_speedup.pdf").is_file() and not (checkout / "executed").exists()

    (results / "09_speedup.csv").unlink()
    status, output = run(profile="laptop", command=replot_figures)
    assert status == 0 and "09_speedup: skipped, results/laptop has no table of it" in output
    (results / "03_block_sensitivity.csv").write_text("seed\n1\n", "utf-8")
    status, output = run("03", "09", profile="laptop", command=replot_figures)
    broken, missing = capsys.readouterr().err.splitlines()
    assert status == 1 and "03_block_sensitivity: " in broken and "Error: " in broken
    assert "09_speedup.csv is missing: 09_speedup is drawn from it" in missing
    assert run(profile="paper", command=replot_figures)[0] == 1
    assert "nothing to draw: results/paper has no tables yet" in capsys.readouterr().err


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


@pytest.mark.slow
def test_a_notebook_that_reads_what_others_write_follows_them(checkout):
    register(checkout, "02_reads", reads=["claims.toml", "{profile}/0*.csv"])
    place = 'from pathlib import Path\nresults = Path("../results")\n'
    place += "(results / profile).mkdir(parents=True, exist_ok=True)\n"
    write_notebook(
        checkout, "01_good", place + 'import time\ntime.sleep(1)\n(results / profile / "01.csv").write_text("a")'
    )
    read = "[path.name for path in sorted((results / profile).glob('0*.csv'))]"
    write_notebook(checkout, "02_reads", place + f'(results / profile / "02_reads.csv").write_text(str({read}))')
    assert run(jobs=2)[0] == 0
    assert (checkout / "results/quick/02_reads.csv").read_text("utf-8") == "['01.csv']"
    assert "02_reads: skipped, done before" in run(resume=True)[1]  # its own table is not one that it reads
    (checkout / "results/claims.toml").touch()
    output = run(resume=True)[1]
    assert "01_good: skipped" in output and "02_reads: will run, tables changed: claims.toml" in output
    (checkout / "executed/quick/01_good.json").unlink()
    assert "02_reads: will run, it reads the outputs of others" in run(resume=True, jobs=2)[1]
