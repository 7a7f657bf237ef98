import copy
import json
import warnings
from pathlib import Path

import pytest

from softlms.workbook.lint import MIN_COMPARED, lint
from softlms.workbook.registry import read_complete_registry
from softlms.workbook.stamp import OWN_PARTS, describe, stale_parts

ROOT = Path(__file__).parent.parent
LISTED = read_complete_registry(ROOT)


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": [text]}


def shown(**data):
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {kind.replace("_", "/"): v for kind, v in data.items()},
    }


def cell(source, count, *outputs, tags=(), **changes):
    metadata = {"tags": list(tags)} if tags else {}
    given = {"cell_type": "code", "id": f"cell-{count}", "metadata": metadata, "source": source.splitlines(True)}
    return given | {"execution_count": count, "outputs": list(outputs)} | changes


def good():
    return {
        "cells": [
            {"cell_type": "markdown", "id": "title", "metadata": {}, "source": ["# 1/2 of a title, ~/home"]},
            cell('profile = "quick"  # or laptop\nsize: int = 3', 1, tags=["parameters"]),
            cell("print(1)", 2, stream("a/b, 12 tokens/s, https://example.org/a/b\n")),
            cell("x = 1\nx", 3, shown(text_plain="1", text_html="<td>1</td>")),
            cell("draw()", 4, stream("drawn"), shown(text_plain="<Figure>", image_png="iVBO")),
            cell("assert x == 1\nprint(x)", 5, stream("1")),
        ],
        "metadata": {"kernelspec": {"name": "python3"}},
    }


def test_a_good_notebook():
    assert lint(good(), "strict") == [] and lint(good(), "lax") == []


def put(place, value):
    """Change one thing in the notebook, by its path of keys."""

    def change(book):
        *way, last = place
        for key in way:
            book = book[key]
        book[last] = value

    return change


def source(number, text):
    return put(("cells", number, "source"), text)


def outputs(*given):
    return put(("cells", 2, "outputs"), list(given))


def tags(number, *names):
    return put(("cells", number, "metadata", "tags"), list(names))


BROKEN = {
    "another kernel": (put(("metadata", "kernelspec", "name"), "my-venv"), "kernelspec is 'my-venv'"),
    "no id": (put(("cells", 2, "id"), None), "ids are missing or not unique"),
    "an id twice": (put(("cells", 2, "id"), "title"), "ids are missing or not unique"),
    "a cell not run": (put(("cells", 3, "execution_count"), None), "counts are [1, 2, None, 4, 5]"),
    "run out of order": (put(("cells", 3, "execution_count"), 7), "counts are [1, 2, 7, 4, 5]"),
    "timing": (put(("cells", 2, "metadata", "execution"), {"iopub.status.busy": "2026"}), "the times of one run"),
    "papermill's timing": (put(("metadata", "papermill"), {"duration": 3}), "the times of one run"),
    "widget state": (put(("metadata", "widgets"), {}), "the widgets of one run"),
    "no parameters": (tags(1), "0 cells are tagged parameters"),
    "two cells of parameters": (tags(2, "parameters"), "2 cells are tagged parameters"),
    "a second =": (source(1, 'profile = "quick"\na = 1  # a = 2 is more'), "parameter 'a = 1  # a = 2 is more'"),
    "| in an annotation": (source(1, 'profile = "quick"\na: int | None = 1'), "parameter 'a: int | None = 1'"),
    "no literal": (source(1, 'profile = "quick"\na = len("x")'), "parameter 'a = len"),
    "two on a line": (source(1, 'profile = "quick"; a: int'), "parameter 'profile"),
    "a literal over two lines": (source(1, 'profile = "quick"\na = [\n1]'), "parameter 'a = ['"),
    "another profile": (source(1, 'profile = "laptop"'), 'no profile = "quick"'),
    "a magic": (source(3, "%matplotlib inline\nx = 1"), "cell 3: not plain Python"),
    "a cell magic": (source(3, "%%time\nx = 1"), "cell 3: not plain Python"),
    "a shell line": (source(3, "!ls"), "cell 3: not plain Python"),
    "a magic called": (source(3, "get_ipython().run_line_magic('time', '')"), "get_ipython"),
    "sys.exit": (source(3, "import sys\nsys.exit(0)"), "sys.exit: papermill takes it for success"),
    "exit": (source(3, "if True:\n    exit()"), "exit: papermill"),
    "quit": (source(3, "quit"), "quit: papermill"),
    "SystemExit": (source(3, "raise SystemExit"), "SystemExit: papermill"),
    "skipped by papermill alone": (tags(3, "skip-execution"), "only skip-execution"),
    "skipped by nbval alone": (tags(3, "nbval-skip"), "only nbval-skip"),
    "an excused cell": (tags(3, "raises-exception"), "unknown tags raises-exception"),
    "a comment for nbval": (source(3, "# NBVAL_IGNORE_OUTPUT\nx = 1"), "a comment for nbval alone"),
    "an error": (outputs({"output_type": "error", "ename": "KeyError"}), "an error, KeyError"),
    "stderr": (outputs(stream("100%|####", "stderr")), "cell 2: stderr"),
    "a home folder": (outputs(stream("read /home/me/glue")), "a path of one machine in an output: '/home/me/glue'"),
    "a home folder, short": (outputs(shown(text_plain="'~/glue'")), "a path of one machine"),
    "a folder of Windows": (outputs(shown(text_html="<b>C:\\data</b>")), "a path of one machine"),
    "SVG": (outputs(shown(text_plain="", image_svg="<svg/>")), "kind image/svg; pictures are PNG"),
    "JPEG": (outputs(shown(text_plain="", image_jpeg="x")), "kind image/jpeg; pictures are PNG"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_on_a_broken_copy(name):
    change, message = BROKEN[name]
    book = good()
    change(book)
    assert any(message in fault for fault in lint(book, "lax")), lint(book, "lax")


def test_a_cell_that_both_skip_is_not_counted():
    book = good()
    book["cells"].insert(3, cell("explore()", None, tags=["skip-execution", "nbval-skip"], id="explore"))
    assert lint(book, "strict") == []


def test_too_little_to_compare():
    """Pictures are not compared, nor what is skipped, nor a cell without a count."""
    for change in (
        put(("cells", 2, "outputs"), []),
        put(("cells", 2, "outputs"), [shown(text_plain="<Figure>", image_png="iVBO")]),
        tags(2, "skip-execution", "nbval-skip"),
        put(("cells", 2, "execution_count"), None),
    ):
        book = good()
        change(book)
        assert f"{MIN_COMPARED - 1} text outputs to compare" in " ".join(lint(book, "strict"))


def test_a_lax_notebook_asserts_something():
    book = good()
    for text in (
        "print(x)",
        "# assert x",
        "assert True",
        "print('assert x')",
        "book.check()",  # says that files are there, not what is in them
        "assert (x == 2, 'must be')",
        "assert x == x",
        "assert not False",
        "assert [x]",
        "if x:\n    assert x",
        "def look():\n    assert x",
        "try:\n    assert x\nexcept AssertionError:\n    pass",
    ):
        book["cells"][5]["source"] = text
        assert lint(copy.deepcopy(book), "lax") == [
            "nothing is asserted: a lax notebook needs an assert on what it shows, outside branches and functions"
        ]
        assert lint(book, "strict") == []  # its outputs are compared
    for text in ("assert x", "assert not f(x)", "with f(x):\n    for y in x:\n        assert y == 2, 'so'"):
        book["cells"][5]["source"] = text
        assert lint(book, "lax") == []
    book["cells"][5]["metadata"]["tags"] = ["skip-execution", "nbval-skip"]
    assert lint(book, "lax")


@pytest.mark.parametrize("name", LISTED)
def test_committed_notebooks(name):
    """Each can fail, and shows what its own sources gave; a changed library is told as a warning."""
    book = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text("utf-8"))
    assert lint(book, LISTED[name].lane) == []
    stale = stale_parts(name, book, ROOT)
    assert not OWN_PARTS & set(stale), f"{name} is stale, {describe(stale)}: run softlms stamp {name}"
    if stale:
        warnings.warn(f"{name} is stale, {describe(stale)}", stacklevel=1)
