"""What stops ``softlms figures`` before or while it works: bad input, folders and disks."""

import contextlib
import os
import sys

import pytest
from batches import GOOD, PARAMETERS, SAVE, run, write_notebook
from disks import make_read_only, mounted
from kill_figures import (
    broken_files,
    half_files,
)

from softlms import cli
from softlms.workbook import process


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A checkout on a disk of its own, of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as place:
        (place / "pyproject.toml").touch()
        (place / "notebooks").mkdir()
        monkeypatch.chdir(place)
        yield place
        os.chdir(tmp_path)


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
