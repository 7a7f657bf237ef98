"""The checks are checked: each broken copy of a small notebook fails, and the whole one passes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from softlms import cli
from softlms.workbook.check import check_notebooks
from softlms.workbook.durations import keep_seconds, read_seconds
from softlms.workbook.lanes import read_lanes
from softlms.workbook.reads import READS
from softlms.workbook.stamp import make_stamp, stamp_notebooks

ROOT = Path(__file__).parent.parent
PARAMETERS = 'profile = "quick"\nsteps = 4'
SOURCES = (
    "from pathlib import Path\n\nfigure = Path('small.txt')\nprint(profile)",
    "figure.write_text('*' * steps)",
    "total = sum(range(steps))\nprint('sum', total)",
    "{'steps': steps, 'total': total}",
    "assert total == 6\nassert figure.stat().st_size == steps\nprint('checked')",
)


@pytest.fixture(scope="module")
def stamped(tmp_path_factory):
    """A checkout with one small notebook, executed by ``softlms stamp``."""
    root = tmp_path_factory.mktemp("stamped")
    (root / "notebooks").mkdir()
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, root)  # what pytest and the stamp read
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    book.cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *SOURCES)]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, root / "notebooks" / "01_small.ipynb")
    (root / "notebooks" / "lanes.toml").write_text('[small]\n01_small = "strict"\n', "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert stamp_notebooks() == 0
    return root


@pytest.fixture
def checkout(stamped, tmp_path, monkeypatch):
    root = shutil.copytree(stamped, tmp_path / "checkout")
    monkeypatch.chdir(root)
    return root


def change(root, edit, *, lane="strict", restamp=True):
    """Edit the notebook; by default its stamp goes with it, so that something else has to find the fault."""
    path = root / "notebooks" / "01_small.ipynb"
    (root / "notebooks" / "lanes.toml").write_text(f'[small]\n01_small = "{lane}"\n', "utf-8")
    book = nbformat.read(path, as_version=4)
    edit(book)
    if restamp:
        book.metadata["softlms"] = {"stamp": make_stamp(path.stem, book, root)}
    nbformat.write(book, path)


def wrong_number(book):
    assert book.cells[3].outputs[0].text == "sum 6\n"
    book.cells[3].outputs[0].text = "sum 7\n"


def wrong_table(book):
    assert book.cells[4].outputs[0].data["text/plain"] == "{'steps': 4, 'total': 6}"
    book.cells[4].outputs[0].data["text/plain"] = "{'steps': 4, 'total': 7}"


def one_output_more(book):
    book.cells[3].source += "\nprint('and more')"


def stripped(book):
    for cell in book.cells:
        cell.outputs, cell.execution_count = [], None


def stripped_of_outputs(book):
    for cell in book.cells:
        cell.outputs = []


def reordered(book):
    book.cells[2].execution_count, book.cells[3].execution_count = 4, 3


def a_cell_not_run(book):
    book.cells[2].execution_count = None


def an_exception(book):
    book.cells[2].source += "\nraise RuntimeError('on purpose')"


def no_figure(book):
    book.cells[2].source = "figure.unlink(missing_ok=True)"


def nothing_asserted(book):
    book.cells[5].source = "print('checked')"


@pytest.mark.parametrize("lane", ["strict", "lax"])
def test_the_whole_notebook_passes(checkout, capfd, lane):
    change(checkout, lambda book: None, lane=lane)
    assert check_notebooks() == 0
    assert "6 passed" in capfd.readouterr().out


BROKEN = [
    ("strict", wrong_number, "sum 7"),
    ("strict", wrong_table, "'total': 7"),
    ("strict", one_output_more, "and more"),
    ("strict", an_exception, "on purpose"),
    ("strict", no_figure, "FileNotFoundError"),
    ("lax", an_exception, "on purpose"),
    ("lax", no_figure, "FileNotFoundError"),
]


@pytest.mark.parametrize(("lane", "edit", "said"), BROKEN, ids=lambda x: getattr(x, "__name__", x))
def test_nbval_finds(checkout, capfd, lane, edit, said):
    change(checkout, edit, lane=lane)
    assert check_notebooks() == 1
    out = capfd.readouterr().out
    assert said in out and " failed" in out  # pytest ran


VACUOUS = [
    ("strict", stripped, "counts are [None, None, None, None, None, None]"),
    ("strict", stripped_of_outputs, "0 text outputs to compare"),
    ("strict", reordered, "counts are [1, 2, 4, 3, 5, 6]"),
    ("lax", a_cell_not_run, "counts are [1, 2, None, 4, 5, 6]"),
    ("lax", nothing_asserted, "nothing is asserted"),
]


@pytest.mark.parametrize(("lane", "edit", "said"), VACUOUS, ids=lambda x: getattr(x, "__name__", x))
def test_the_guard_finds_before_anything_runs(checkout, capfd, lane, edit, said):
    change(checkout, edit, lane=lane)
    assert check_notebooks() == 1
    out = capfd.readouterr().out
    assert "01_small: " in out and said in out and "passed" not in out


def test_nbval_alone_passes_a_stripped_notebook(checkout):
    """Why there is a guard."""
    change(checkout, stripped)
    nbval = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "notebooks/01_small.ipynb"]
    done = subprocess.run(nbval, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "6 passed" in done.stdout


def test_lax_does_not_compare(checkout):
    change(checkout, wrong_number, lane="lax")
    assert check_notebooks() == 0


def test_changed_sources_fail_and_a_changed_library_warns(checkout, capfd):
    assert cli.main(["stamp", "--check"]) == 0
    assert "01_small: fresh" in capfd.readouterr().out

    def other_library(book):
        book.metadata.softlms.workbook.stamp.library = book.metadata.softlms.workbook.stamp.environment = "of last week"

    change(checkout, other_library, restamp=False)
    assert cli.main(["stamp", "--check"]) == 1
    assert "01_small: stale, library and environment changed since it was stamped" in capfd.readouterr().out
    assert check_notebooks() == 0
    assert "warning: 01_small is stale, library and environment changed" in capfd.readouterr().out

    def other_source(book):
        book.cells[4].source += "  # looks the same"

    change(checkout, other_source, restamp=False)
    assert check_notebooks() == 1
    out = capfd.readouterr().out
    assert "01_small: stale, source and library and environment changed" in out and "passed" not in out


def test_changed_tables_that_a_notebook_reads_fail(checkout, capfd, monkeypatch):
    monkeypatch.setitem(READS, "01_small", ("claims.toml",))
    change(checkout, lambda book: None)
    assert cli.main(["stamp", "--check"]) == 0
    (checkout / "results").mkdir()
    (checkout / "results" / "claims.toml").write_text("other = true", "utf-8")
    assert check_notebooks() == 1
    assert "01_small: stale, tables changed" in capfd.readouterr().out


def test_a_kernel_that_does_not_start_is_one_line(checkout, tmp_path):
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    kernel = {"argv": ["false"], "display_name": "none", "language": "python"}
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel), "utf-8")
    before = (checkout / "notebooks" / "01_small.ipynb").read_bytes()
    command = [sys.executable, "-c", "import sys; from softlms.cli import main; sys.exit(main(['stamp']))"]
    environment = os.environ | {"JUPYTER_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 1
    assert run.stdout.startswith("01_small: failed, and left as it was: RuntimeError: Kernel died")
    assert "Traceback" not in run.stderr  # at exit, of a kernel that was never there
    assert (checkout / "notebooks" / "01_small.ipynb").read_bytes() == before


def test_what_is_edited_while_it_runs_is_kept(checkout, capsys):
    path = checkout / "notebooks" / "01_small.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[5].source += f"\nwith open({str(path)!r}, 'a', encoding='utf-8') as file:\n    file.write(' ')"
    nbformat.write(book, path)
    before = path.read_bytes()
    assert cli.main(["stamp"]) == 1
    assert "01_small: left as it was: it was edited while it ran" in capsys.readouterr().out
    assert path.read_bytes() == before + b" "


def test_prose_may_change(checkout):
    change(checkout, lambda book: book.cells.append(nbformat.v4.new_markdown_cell("The end.")), restamp=False)
    assert cli.main(["stamp", "--check"]) == 0


def test_environment_is_the_pinned_one(checkout, capsys):
    with (checkout / "requirements.txt").open("a", encoding="utf-8") as file:
        file.write("another==1.0\n")
    assert cli.main(["stamp", "--check"]) == 1
    assert "stale, environment changed" in capsys.readouterr().out


def test_stamping_keeps_ids_and_is_the_same_twice(checkout):
    path = checkout / "notebooks" / "01_small.ipynb"
    before = path.read_text("utf-8")
    assert cli.main(["stamp", "01"]) == 0
    assert path.read_text("utf-8") == before


def test_a_stamp_keeps_how_long_it_took(checkout):
    """`softlms figures` says what a first run takes; times that are nearly those change no file."""
    folder = checkout / "notebooks"
    assert read_seconds(folder).keys() == {"01_small"}
    keep_seconds(folder, "00_other", 10.2)
    keep_seconds(folder, "00_other", 17)
    assert read_seconds(folder)["00_other"] == 10
    keep_seconds(folder, "00_other", 21)
    assert read_seconds(folder) == {"00_other": 21, "01_small": read_seconds(folder)["01_small"]}


def test_what_fails_or_is_not_clean_stays_as_it_was(checkout, capsys):
    path = checkout / "notebooks" / "01_small.ipynb"
    for edit, said in (
        (an_exception, "failed, and left as it was: RuntimeError: on purpose"),
        (lambda book: book.cells[2].update(source="print(figure.resolve())"), "left as it was: cell 2: a path of one"),
    ):
        change(checkout, edit)
        before = path.read_text("utf-8")
        assert cli.main(["stamp"]) == 1
        assert said in capsys.readouterr().out
        assert path.read_text("utf-8") == before
        assert not list(path.parent.glob(".*.partial*"))


def test_the_manifest_is_complete(checkout, capsys):
    manifest = checkout / "notebooks" / "lanes.toml"
    for text, said in (
        ("[small]\n", "Notebooks are not listed in"),
        ('[small]\n01_small = "lax"\n02_gone = "lax"\n', "not there: 02_gone"),
        ('[small]\n01_small = "lax"\n[large]\n01_small = "lax"\n', "more than once: 01_small"),
        ('[small]\n01_small = "loose"\n', "01_small has the unknown lane 'loose'; known: strict, lax"),
    ):
        manifest.write_text(text, "utf-8")
        for command in (["check-notebooks"], ["stamp"]):
            assert cli.main(command) == 2
            assert said in capsys.readouterr().err
    manifest.write_text('[small]\n01_small = "lax"\n', "utf-8")
    assert cli.main(["check-notebooks", "tiny"]) == 2
    assert "Unknown job 'tiny'; known: small" in capsys.readouterr().err
    assert cli.main(["stamp", "07"]) == 2
    manifest.unlink()
    assert cli.main(["check-notebooks"]) == 2
    assert "lanes.toml" in capsys.readouterr().err


def test_makefile_runs_every_job():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    jobs = " ".join(f"test-{job}" for job in read_lanes(ROOT / "notebooks"))
    assert f"{jobs}: test-%: $(READY)\n\t$(BIN)/softlms check-notebooks $*\n" in makefile
    assert f"{jobs} test-units\n" in makefile
