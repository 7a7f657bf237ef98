"""Text is UTF-8, whatever the machine's locale says."""

import ast
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from test_project import ROOT

from softlms.workbook.stamp import describe, stale_parts

TEXT_FILES = {"open", "fdopen", "TemporaryFile", "NamedTemporaryFile"}
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # what a locale without UTF-8 is on any machine
COMMANDS = """
import locale, sys
from softlms.cli import main
assert "utf" not in locale.getpreferredencoding().lower() + sys.stdout.encoding.lower()
assert main(["verify", "--write"]) == 0
print("checked")
main(["stamp", "--check"])
"""


def reads_the_locale(call):
    """Whether a call opens text, and names no encoding."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return False
    if any(getattr(given.get(name), "value", None) is True for name in ("text", "universal_newlines")):
        return True
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("read_text", "write_text"):
        return len(call.args) == (name == "write_text")
    method = isinstance(call.func, ast.Attribute) and name == "open"
    mode = given.get("mode", next(iter(call.args if method or "Temporary" in name else call.args[1:]), None))
    binary = "Temporary" in name if mode is None else "b" in str(getattr(mode, "value", "b"))
    return name in TEXT_FILES and not binary


def code(path):
    if path.suffix == ".py":
        return path.read_text("utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('rb')", False),
        ("Image.open(path)", False),
        ("open(path, 'a')", True),
        ("TemporaryFile('w')", True),
        ("TemporaryFile()", False),
        ("run(command, text=True)", True),
        ("run(command)", False),
    ],
)
def test_a_call_that_reads_the_locale_is_seen(source, wrong):
    assert reads_the_locale(ast.parse(source).body[0].value) == wrong


def test_every_text_file_is_opened_as_utf8():
    """Ruff's PLW1514 is on as well; it sees only what is called on Path(...) itself."""
    paths = [path for place in ("softlms/*.py", "tests/*.py", "notebooks/*.ipynb") for path in ROOT.glob(place)]
    wrong = [
        f"{path.name}: {ast.unparse(node)}"
        for path in paths
        for node in ast.walk(ast.parse(code(path)))
        if isinstance(node, ast.Call) and reads_the_locale(node)
    ]
    assert paths and wrong == []


@pytest.mark.slow
def test_commands_in_a_locale_without_utf8(tmp_path):
    for name in ("notebooks", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | ASCII | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMANDS]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="ascii", errors="strict")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    for path in ROOT.glob("notebooks/*.ipynb"):
        stale = stale_parts(path.stem, nbformat.read(path, as_version=4), ROOT)
        said = f"stale, {describe(stale)}" if stale else "fresh"
        assert f"{path.stem}: {said}" in run.stdout.partition("checked")[2]
