"""The code behind a run's key: what counts of it, and what does not."""

import ast

import pytest

from softlms.experiments.closure import PACKAGE, code_of, library_hash

FILES = {
    "__init__.py": "from toy.maths import double\n",
    "maths.py": '''"""Sums."""
import math

FACTOR = 2
TABLE = {}


def double(x):
    """Twice."""
    return FACTOR * x  # exact


def unused(x):
    return math.sqrt(x)


def register(name):
    TABLE[name] = double


register("double")
''',
    "steps.py": """from toy import maths
from toy.closure import not_in_keys
from toy.data import Rows


def train(rows: Rows):
    return maths.double(rows.total())


class Bench:
    def scores(self):
        return 1

    @not_in_keys
    def report(self):
        return print("done")
""",
    "data.py": """from __future__ import annotations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toy.steps import Bench


class Rows:
    bench: Bench

    def total(self):
        return 3
""",
    "closure.py": "def not_in_keys(thing):\n    return thing\n",
}


@pytest.fixture
def package(tmp_path):
    """A maker of packages: the toy one, with changes."""

    def make(number, changes=(), moved=()):
        place = tmp_path / str(number) / "toy"
        for name, text in (FILES | dict(moved)).items():
            for before, after in changes:
                text = text.replace(before, after)
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text, "utf-8")
        return place

    return make


def test_what_a_step_reaches(package):
    names = code_of("toy.steps:train", package=package(0))
    assert sorted(names) == ["Bench", "FACTOR", "Rows", "TABLE", "double", "on import", "register", "train"]
    assert sorted(code_of("toy:double", package=package(1))) == ["FACTOR", "TABLE", "double", "on import", "register"]


@pytest.mark.parametrize(
    "before, after",
    [
        ('"""Twice."""', '"""Two times."""'),
        ("  # exact", ""),
        ("import math\n", "import math as m\n"),
        ("math.sqrt(x)", "math.log(x)"),
        ('"done"', '"finished"'),
    ],
)
def test_what_changes_no_key(package, before, after):
    first, second = package(0), package(1, [(before, after)])
    assert code_of("toy.steps:train", package=first) == code_of("toy.steps:train", package=second)


@pytest.mark.parametrize(
    "before, after, changed",
    [
        ("FACTOR = 2", "FACTOR = 3", "FACTOR"),
        ("FACTOR * x", "x * FACTOR", "double"),
        ("return 3", "return 4", "Rows"),
        ("return 1", "return 2", "Bench"),
        ('register("double")', 'register("twice")', "on import"),
    ],
)
def test_what_changes_a_key_is_named(package, before, after, changed):
    first = code_of("toy.steps:train", package=package(0))
    second = code_of("toy.steps:train", package=package(1, [(before, after)]))
    assert [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)] == [changed]


def test_a_move_changes_nothing(package):
    """A file into a folder, and a constant from one file to another."""
    before = package(0)
    moved = {
        "__init__.py": "from toy.rooms.maths import double\n",
        "maths.py": "",
        "rooms/__init__.py": "",
        "rooms/maths.py": FILES["maths.py"].replace("FACTOR = 2\n", "from toy.rooms.factors import FACTOR\n"),
        "rooms/factors.py": "FACTOR = 2\n",
        "steps.py": FILES["steps.py"].replace("from toy import maths", "from toy.rooms import maths"),
    }
    after = package(1, moved=moved)
    assert code_of("toy.steps:train", package=before) == code_of("toy.steps:train", package=after)
    assert library_hash(before) == library_hash(after)
    other = package(2, [("FACTOR = 2", "FACTOR = 5")], moved)  # in a folder
    assert library_hash(before) != library_hash(other)


def test_what_cannot_be_followed_is_refused(package):
    for number, (line, message) in enumerate((
        ("from toy import nothing as maths", "toy does not define 'nothing'"),
        ("from toy.nowhere import double as maths", "toy.nowhere is no module"),
        ("from . import maths", "line 1: write the relative import in full"),
    )):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            code_of("toy.steps:train", package=package(number, [("from toy import maths", line)]))
    with pytest.raises(ValueError, match="toy.steps does not define 'nothing'"):
        code_of("toy.steps:nothing", package=package(9))


def test_the_compiled_scan_is_in_the_code_of_mambas_steps():
    steps, bench = "softlms.experiments.steps:apply_chain", "softlms.experiments.language_models:LanguageBench"
    assert {"forward", "backward", "run_units", "_exp", "CHUNK", "_COMPILED"} <= code_of(steps, bench).keys()


def test_modules_are_named_with_what_is_taken_of_them():
    """A module that is handed on as a whole could not be followed: its code would be in no key."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        whole = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == PACKAGE.name
            for alias in node.names
            if (PACKAGE.parent / str(node.module).replace(".", "/") / f"{alias.name}.py").is_file()
        }
        taken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in whole]
        assert [f"{path.name}: {node.id}" for node in names if id(node) not in taken] == []
