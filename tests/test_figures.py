"""The command ``softlms figures`` on notebooks that take no time, through the real papermill."""

import json
import shutil

import pytest
from batches import GOOD, PARAMETERS, SAVE, register, run, write_notebook
from kill_figures import (
    ROOT,
    survivors,
)

from softlms.workbook.run import replot_figures


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
        "07_tinyllama_table_smollm2-1024: skipped, results/laptop has no table of smollm2-1024",
        "07_tinyllama_table_smollm2-1024_ranks: skipped, results/laptop has no table of smollm2-1024",
        "07_tinyllama_table_smollm2-2048: skipped, results/laptop has no table of smollm2-2048",
        "07_tinyllama_table_smollm2-2048_ranks: skipped, results/laptop has no table of smollm2-2048",
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
