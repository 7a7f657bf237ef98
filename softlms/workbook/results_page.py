"""``docs/results.md`` and README's headline, made from the committed rows.

The page is made from its template, ``results_page.md``. README holds its table between ``<!-- table: headline -->`` and
``<!-- end -->``, which do not show; nothing outside is touched.
"""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path

import jinja2

from softlms.utils.files import whole_file
from softlms.workbook.results_tables import TABLES

__all__ = ["PAGE", "check_results", "write_results"]

PAGE = "docs/results.md"
TEMPLATE = Path(__file__).with_suffix(".md")
BLOCK = re.compile(r"(<!-- table: headline -->\s*).*?(\s*<!-- end -->)", re.DOTALL)


def check_results(root: Path) -> list[str]:
    """Where `PAGE` or README's table differs from the rows, or rows are missing; empty if all is well.

    Raises
    ------
    ValueError
        README does not have its table's markers once, or rows lack what a table needs.
    """
    try:
        expected = _expected(root)
    except FileNotFoundError as error:
        return [f"{PAGE}: {error.filename} is missing"]
    wrong = []
    for path, due in expected.items():
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        pairs = zip_longest(lines, due.splitlines(), fillvalue="nothing")
        differs = next(((there, said) for there, said in pairs if there != said), None)
        if differs:
            wrong.append(f"{path.relative_to(root)} has {differs[0]!r}, the rows say {differs[1]!r}")
    return wrong


def write_results(root: Path) -> None:
    """Rewrite `PAGE` and README's table, and nothing else; raises ``FileNotFoundError`` where rows are missing."""
    for path, due in _expected(root).items():
        if not path.is_file() or path.read_text("utf-8") != due:
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as partial:
                partial.write_text(due, "utf-8")


def _expected(root: Path) -> dict[Path, str]:
    """What each file should contain."""

    def table(name: str, *options: str) -> str:
        try:
            return TABLES[name](root / "results", *options)
        except KeyError as missing:
            raise ValueError(f"Table {name} needs {missing}, which its rows in {root / 'results'} lack.") from missing

    readme = root / "README.md"
    text, blocks = BLOCK.subn(lambda block: block[1] + table("headline") + block[2], readme.read_text("utf-8"))
    if blocks != 1 or text.count("<!-- table: ") != 1:
        raise ValueError("README.md should have '<!-- table: headline -->' with its '<!-- end -->' once.")
    template = jinja2.Template(TEMPLATE.read_text("utf-8"), keep_trailing_newline=True)
    return {root / PAGE: template.render(table=table), readme: text}
