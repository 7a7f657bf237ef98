"""A static site of what the notebooks made: every figure with its tables, every notebook, the public names.

It opens from disk: no server, no script, nothing loaded from elsewhere.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import pandas as pd
import pdoc.doc
import pdoc.render
from markupsafe import Markup
from PIL import Image

import softlms
from softlms.experiments.profiles import PROFILES
from softlms.experiments.provenance import commit
from softlms.files import is_orphaned, process_mark
from softlms.workbook.pages import Section, code_style, markdown, notebook_body, plain, sections
from softlms.workbook.plots.drawing import check_drawing
from softlms.workbook.registry import project_root

__all__ = ["build_gallery", "print_gallery"]

TEMPLATES = Path(__file__).parents[1] / "templates"
GENERATOR = "softlms gallery"  # in every page: the sign that a folder may be replaced
CLAIMS = "10_paper_vs_reproduced"
CLAIM_COLUMNS = ["ground", "text", "claimed", "unit", "measured", "verdict", "why"]  # the file has more
THUMBNAIL = (720, 720)  # pixels at most


@dataclass(frozen=True)
class Picture:
    """A figure: its name, what its notebook says of it, and the tables that it was drawn from, by file and rows."""

    name: str
    section: Section
    tables: list[dict[str, Any]]


@dataclass(frozen=True)
class Chapter:
    """A notebook: heading and introduction, where its outputs come from, and its figures."""

    name: str
    section: Section
    source: Path
    provenance: str
    pictures: list[Picture]


def print_gallery(**options: str) -> None:
    """The ``softlms gallery`` command: `build_gallery`, and where to look."""
    print(build_gallery(**options).as_uri())


def build_gallery(profile: str = "laptop", out: str | Path = "site") -> Path:
    """Build the site.

    Parameters
    ----------
    profile : str
        Its ``figures/`` and ``results/``. Notebooks come from ``executed/<profile>`` where they are there, else from
        ``notebooks/`` as committed; every page says which.
    out : str or Path
        Folder. An older gallery there is replaced when the new one is whole.

    Returns
    -------
    Path
        The page to open.

    Raises
    ------
    ValueError
        Unknown profile, a figure that is not the one its note and tables describe or that no notebook draws, or `out`
        holds something else than a gallery.
    FileNotFoundError
        No checkout, or no figure of this profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; known: {', '.join(PROFILES)}.")
    root, out = project_root(), Path(out).resolve()
    _check_replaceable(out)
    figures, results = root / "figures" / profile, root / "results" / profile
    chapters = _read_chapters(root, profile)
    with _whole_folder(out) as folder:
        for part in ("figures", "thumbnails", "tables", "notebooks"):
            (folder / part).mkdir()
        for picture in (picture for chapter in chapters for picture in chapter.pictures):
            for kind in ("png", "pdf"):
                shutil.copy(figures / f"{picture.name}.{kind}", folder / "figures")
            for table in picture.tables:
                shutil.copy(results / table["file"], folder / "tables")
            with Image.open(figures / f"{picture.name}.png") as image:
                image.thumbnail(THUMBNAIL)
                image.save(folder / "thumbnails" / f"{picture.name}.png", optimize=True)
        claims = _read_claims(results / f"{CLAIMS}.csv")
        if claims:
            shutil.copy(results / claims["file"], folder / "tables")
        pages = _Pages(folder, profile)
        pages.write("index.html", chapters=chapters, claims=claims)
        for chapter in chapters:
            body = Markup(notebook_body(nbformat.read(chapter.source, as_version=4)))
            pages.write("notebook.html", f"notebooks/{chapter.name}.html", chapter=chapter, body=body)
        style = (TEMPLATES / "style.css").read_text("utf-8")
        (folder / "style.css").write_text(style + code_style(), "utf-8")
        (folder / "api.html").write_text(_api_page(), "utf-8")
    return out / "index.html"


class _Pages:
    """Fills the templates in ``softlms/templates``."""

    def __init__(self, folder: Path, profile: str) -> None:
        self.folder = folder
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.filters |= {"markdown": _block, "inline": _inline, "plain": plain}
        self.environment.globals |= {
            "profile": profile,
            "commit": commit(),
            "version": softlms.__version__,
            "generator": GENERATOR,
        }

    def write(self, template: str, path: str = "", **values: Any) -> None:
        (self.folder / (path or template)).write_text(self.environment.get_template(template).render(**values), "utf-8")


def _block(text: str) -> Markup:
    return Markup(markdown(text))


def _inline(text: str) -> Markup:
    """A heading's text, which Markdown takes for a paragraph."""
    return Markup(markdown(text).strip().removeprefix("<p>").removesuffix("</p>"))


def _read_chapters(root: Path, profile: str) -> list[Chapter]:
    figures, results = root / "figures" / profile, root / "results" / profile
    # by any of its files: one that lacks another is told
    left = sorted({path.stem for path in figures.glob("[0-9]*.*") if path.suffix in (".png", ".pdf", ".json")})
    if not left:
        raise FileNotFoundError(f"{figures} has no figures: run softlms figures --profile {profile}.")
    wrong = [line for name in left for line in check_drawing(name, figures, results)]
    if wrong:
        raise ValueError("; ".join(wrong))
    chapters = []
    for committed in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        executed = root / "executed" / profile / committed.name
        source = executed if executed.is_file() else committed
        book = nbformat.read(committed, as_version=4)
        said = dict(sections(book))
        pictures = [
            Picture(name, said[name.removeprefix(committed.stem)], _tables(figures / f"{name}.json"))
            for name in left
            if name.startswith(committed.stem) and name.removeprefix(committed.stem) in said
        ]
        left = [name for name in left if name not in {picture.name for picture in pictures}]
        heading, _, text = book.cells[0].source.partition("\n")
        section = Section(heading.lstrip("# "), text.strip())
        run_with = profile if source == executed else "quick"  # a test sees to it that the committed ones are
        provenance = f"{source.relative_to(root)}, run with profile {run_with}"
        chapters.append(Chapter(committed.stem, section, source, provenance, pictures))
    if left:
        raise ValueError(f"{figures / left[0]}.png is drawn by no notebook: remove it, or add the notebook.")
    return chapters


def _tables(note: Path) -> list[dict[str, Any]]:
    return json.loads(note.read_text("utf-8"))["tables"]


def _read_claims(path: Path) -> dict[str, Any] | None:
    """What was claimed, what was measured, and the verdict, from notebook 10; None where that has not run."""
    if not path.is_file():
        return None
    table = pd.read_csv(path, dtype=str, keep_default_na=False, usecols=CLAIM_COLUMNS)[CLAIM_COLUMNS]
    return {"file": path.name, "columns": CLAIM_COLUMNS, "rows": table.to_numpy().tolist()}


def _api_page() -> str:
    """Every name in ``softlms.__all__``, from its docstring."""
    pdoc.render.configure(docformat="numpy", search=False, show_source=False, template_directory=TEMPLATES / "api")
    module = pdoc.doc.Module(softlms)
    page = pdoc.render.html_module(module, all_modules={"softlms": module})
    # members inherited from another library are named, but have no place on the page
    return re.sub(r'<a href="#([^"]+)">(.*?)</a>', lambda a: a[0] if f'id="{a[1]}"' in page else a[2], page)


def _check_replaceable(out: Path) -> None:
    index = out / "index.html"
    ours = index.is_file() and f'content="{GENERATOR}"' in index.read_text("utf-8", errors="replace")
    if not ours and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else than a gallery: choose an empty folder or a new one.")


def _recover(out: Path) -> None:
    """Take away what killed builds left beside the site; put back an older one that stood aside when it was killed."""
    for kind in ("old", "partial"):
        for left in out.parent.glob(f".{out.name}.{kind}-*"):
            if is_orphaned(left):
                if kind == "old" and not out.exists():
                    left.rename(out)
                else:
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder to build in; it takes the place of `out` when the block ends well, and is gone when not."""
    _recover(out)
    partial, old = (out.with_name(f".{out.name}.{kind}-{process_mark()}") for kind in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
