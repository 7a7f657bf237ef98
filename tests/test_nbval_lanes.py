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
from softlms.workbook.registry import keep_seconds, read_registry
from softlms.workbook.stamp import check_notebooks, make_stamp, stamp_notebooks

ROOT = Path(__file__).parent.parent
PARAMETERS = 'profile = "quick"\nsteps = 4'
SOURCES = (
    "from pathlib import Path\n\nfigure = Path('small.txt')\nprint(profile)",
    "figure.write_text('*' * steps)",
    "total = sum(range(steps))\nprint('sum', total)",
    "{'steps': steps, 'total': total}",
    "assert total == 6\nassert figure.stat().st_size == steps\nprint('checked')",
)


def register(root, lane="strict", reads=()):
    text = f'[01_small]\nlane = "{lane}"\nreads = {list(reads)}\n'
    (root / "notebooks/notebooks.toml").write_text(text, "utf-8")


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
    register(root)
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
    register(root, lane)
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


@pytest.mark.slow
@pytest.mark.parametrize(("lane", "edit", "said"), BROKEN, ids=lambda x: getattr(x, "__name__", x))
def test_nbval_finds(checkout, capfd, lane, edit, said):
    change(checkout, edit, lane=lane)
    assert check_notebooks() == 1
    out = capfd.readouterr().out
    assert said in out and " failed" in out  # pytest ran


@pytest.mark.parametrize(
    ("lane", "edit", "said"),
    [("strict", stripped, "0 text outputs to compare"), ("lax", nothing_asserted, "nothing is asserted")],
)
def test_the_guard_finds_before_anything_runs(checkout, capfd, lane, edit, said):
    """Each of its rules: test_notebook_lint."""
    change(checkout, edit, lane=lane)
    assert check_notebooks() == 1
    out = capfd.readouterr().out
    assert "01_small: " in out and said in out and "passed" not in out


@pytest.mark.slow
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
        stamp = book.metadata.softlms.stamp
        stamp.library = stamp.environment = "of last week"

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


def test_changed_tables_that_a_notebook_reads_fail(checkout, capfd):
    register(checkout, reads=["claims.toml"])
    assert stamp_notebooks() == 0
    assert cli.main(["stamp", "--check"]) == 0
    (checkout / "results").mkdir()
    (checkout / "results" / "claims.toml").write_text("other = true", "utf-8")
    assert check_notebooks() == 1
    assert "01_small: stale, tables changed" in capfd.readouterr().out


@pytest.mark.slow
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
    """`softlms figures` says how long a first run takes; times that are nearly the known ones change no file."""
    assert read_registry(checkout)["01_small"].seconds.keys() == {"quick"}
    register(checkout, reads=["a.csv"])
    with (checkout / "notebooks/notebooks.toml").open("a", encoding="utf-8") as file:
        file.write('# the other\n\n[00_other]\nlane = "lax"\nseconds.laptop = 3\nseconds.quick = 9\n')
    for seconds, kept in ((10.2, 10), (17, 10), (21, 21)):
        keep_seconds(checkout, "01_small", seconds)
        assert read_registry(checkout)["01_small"].seconds == {"quick": kept}
    keep_seconds(checkout, "00_other", 90)
    registry = read_registry(checkout)
    assert registry["00_other"].seconds == {"quick": 90, "laptop": 3} and registry["01_small"].reads == ["a.csv"]
    assert registry["01_small"].seconds == {"quick": 21}
    assert "# the other" in (checkout / "notebooks/notebooks.toml").read_text("utf-8")


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


def test_the_registry_is_complete(checkout, capsys):
    place, entry = checkout / "notebooks/notebooks.toml", '[{}]\nlane = "lax"\n'.format
    for text, said in (
        ("", "Notebooks not listed in"),
        (entry("01_small") + entry("02_gone"), "but missing: 02_gone"),
        (entry("01_small") * 2, "notebooks.toml: Cannot declare"),
        (entry("01_small").replace("lax", "loose"), "01_small has the unknown lane 'loose'; known: strict, lax"),
        (entry("01_small") + "colour = 1", "notebooks.toml: "),
        (entry("01_small") + "figures.a = {}", "notebooks.toml: 'plot'"),
    ):
        place.write_text(text, "utf-8")
        for command in (["check-notebooks"], ["stamp"]):
            assert cli.main(command) == 2
            assert said in capsys.readouterr().err
    place.write_text(entry("01_small"), "utf-8")
    for command in ("check-notebooks", "stamp"):
        assert cli.main([command, "07"]) == 2
        assert "07" in capsys.readouterr().err
    place.unlink()
    assert cli.main(["check-notebooks"]) == 2
    assert "notebooks.toml" in capsys.readouterr().err
