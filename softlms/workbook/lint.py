"""Rules for committed notebooks, so that Jupyter, papermill, nbclient and nbval all treat them alike.

nbval compares nothing in a cell without a count or outputs: a stripped notebook passes it. papermill takes
``sys.exit(0)`` for success, loses a parameter whose line has a second ``=``, and skips cells that nbval runs. All of
these are reported before anything runs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["MIN_COMPARED", "lint"]

MIN_COMPARED = 4  # text outputs of a strict notebook
SKIP_TAGS = {"skip-execution", "nbval-skip"}  # papermill and nbclient read the first, nbval the second
KNOWN_TAGS = {"parameters", *SKIP_TAGS}
KNOWN_OUTPUTS = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png"}
TIMED = ("execution", "papermill")  # cell metadata of one run
EXITS = {"exit", "quit", "SystemExit"}
PATHS = re.compile(r"(?<![\w.:/<~])(?:~?/[A-Za-z_][\w.-]*/[\w.-]|~/\w)|\b[A-Za-z]:\\\w")

Cell = dict[str, Any]


def lint(book: dict[str, Any], check: str) -> list[str]:
    """Everything that is wrong with a notebook, one line each; empty if nothing is.

    Parameters
    ----------
    book : dict
        The notebook's JSON as it is on disk (`nbformat.read` would add missing ids).
    check : str
        "strict" or "lax": how its outputs are checked; see ``notebooks/notebooks.toml``.
    """
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    found = [*_whole(book, code), *_parameters(code), *_vacuity(code, check)]
    for number, cell in enumerate(book["cells"]):
        rules = (_tags, _plain_python, _outputs) if cell["cell_type"] == "code" else (_tags,)
        found += [f"cell {number}: {fault}" for rule in rules for fault in rule(cell)]
    return found


def _whole(book: dict[str, Any], code: list[Cell]) -> Iterator[str]:
    kernel = book["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3":
        yield f"kernelspec is {kernel!r}: python3 exists on every machine"
    ids = [cell.get("id") for cell in book["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        yield "cell ids are missing or not unique"
    counts = [cell["execution_count"] for cell in code if not _skipped(cell)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}: run all cells once, in order"
    if any(name in cell["metadata"] for cell in code for name in TIMED) or "papermill" in book["metadata"]:
        yield "metadata holds the times of one run"
    if "widgets" in book["metadata"]:
        yield "metadata holds the widgets of one run"


def _parameters(code: list[Cell]) -> Iterator[str]:
    tagged = [cell for cell in code if "parameters" in _tags_of(cell)]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells are tagged parameters: one must be"
        return
    source = _text(tagged[0]["source"])
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        if not _is_parameter(line):
            yield f"parameter {line!r}: papermill reads a name, one '=' and a literal on one line, no '|'"
    if not any(re.match(r'profile\s*=\s*"quick"', line) for line in lines):
        yield 'the parameters have no profile = "quick"'


def _is_parameter(line: str) -> bool:
    try:
        (statement,) = ast.parse(line).body
        ast.literal_eval(statement.value)  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, AttributeError):
        return False
    return isinstance(statement, (ast.Assign, ast.AnnAssign)) and line.count("=") == 1 and "|" not in line


def _vacuity(code: list[Cell], check: str) -> Iterator[str]:
    run = [cell for cell in code if not _skipped(cell)]
    if check == "strict":
        compared = sum(_is_text(output) for cell in run if cell["execution_count"] for output in cell["outputs"])
        if compared < MIN_COMPARED:
            yield f"{compared} text outputs to compare: a strict notebook has at least {MIN_COMPARED}"
    elif not any(_asserts(cell) for cell in run):
        yield "nothing is asserted: a lax notebook needs an assert on what it shows, outside branches and functions"


def _asserts(cell: Cell) -> bool:
    statements = _statements(cell) or []
    certain: list[ast.stmt] = []  # an assert in a branch, a function or a try may never run
    while statements:
        statement = statements.pop()
        certain.append(statement)
        if isinstance(statement, (ast.For, ast.With)):
            statements += statement.body
    return any(isinstance(statement, ast.Assert) and _can_fail(statement.test) for statement in certain)


def _can_fail(test: ast.expr) -> bool:
    """Whether a test has a name in it, and is neither a tuple (always true) nor a comparison of a thing with itself."""
    if isinstance(test, ast.Compare) and ast.dump(test.left) == ast.dump(test.comparators[0]):
        return False
    display = isinstance(test, (ast.Tuple, ast.List, ast.Dict, ast.Set))
    return not display and any(isinstance(node, ast.Name) for node in ast.walk(test))


def _tags(cell: Cell) -> Iterator[str]:
    tags = _tags_of(cell)
    if tags - KNOWN_TAGS:
        yield f"unknown tags {', '.join(sorted(tags - KNOWN_TAGS))}; known: {', '.join(sorted(KNOWN_TAGS))}"
    if len(tags & SKIP_TAGS) == 1:
        yield f"only {min(tags & SKIP_TAGS)}: papermill and nbval each read their own tag; give both"


def _plain_python(cell: Cell) -> Iterator[str]:
    if re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", _text(cell["source"])):
        yield "a comment for nbval alone; use the tags"
    if (statements := _statements(cell)) is None:
        yield "not plain Python (a %magic or !shell line?): nbval-lax passes an unknown magic"
    for node in (node for statement in statements or () for node in ast.walk(statement)):
        name = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
        if name in EXITS or name in ("sys.exit", "os._exit"):
            yield f"{name}: papermill takes it for success"
        if name == "get_ipython":
            yield "get_ipython exists only in a kernel"


def _outputs(cell: Cell) -> Iterator[str]:
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            yield f"the output is an error, {output['ename']}"
        if output.get("name") == "stderr":
            yield "stderr (a warning, a progress bar) differs from run to run"
        unknown = set(output.get("data", {})) - KNOWN_OUTPUTS
        if unknown:
            yield f"an output of kind {', '.join(sorted(unknown))}; pictures are PNG, widgets have no state here"
        texts = [output.get("text", "")]
        texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
        for path in filter(None, (PATHS.search(_text(text)) for text in texts)):
            yield f"a path of one machine in an output: {path.string[path.start() : path.start() + 40]!r}"


def _is_text(output: dict[str, Any]) -> bool:
    """Whether nbval compares its text, and not only a picture's size."""
    data = output.get("data", {})
    return output["output_type"] == "stream" or ("text/plain" in data and "image/png" not in data)


def _skipped(cell: Cell) -> bool:
    return bool(_tags_of(cell) & SKIP_TAGS)


def _tags_of(cell: Cell) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def _statements(cell: Cell) -> list[ast.stmt] | None:
    """None if it is not plain Python."""
    try:
        return ast.parse(_text(cell["source"])).body
    except SyntaxError:
        return None


def _text(lines: str | list[str]) -> str:
    """A multiline string of the format, which may be a list of its lines."""
    return lines if isinstance(lines, str) else "".join(lines)
