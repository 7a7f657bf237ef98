"""``softlms gallery``: the Sphinx site of ``docs/``, with the output of the notebooks.

Pages for notebooks, figures and modules are generated: ``docs/conf.py`` calls `write_pages`, so that plain
``sphinx-build docs site`` builds the same site. It opens from disk, without a server or remote files.
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nbformat

import softlms
from softlms.experiments.profiles import PROFILES, find_profile
from softlms.utils.files import whole_file
from softlms.workbook.plots.drawing import check_drawing
from softlms.workbook.registry import Notebook, project_root, read_registry, variant_name

__all__ = ["build_gallery", "print_gallery", "write_pages"]

NEEDED = ("sphinx", "myst_nb", "numpydoc", "pydata_sphinx_theme")
SLIDERS = ("VBox(", "interactive(")  # widgets as text: useless without a kernel


@dataclass(frozen=True)
class Picture:
    """A figure: its name, and the heading and Markdown before it in its notebook."""

    name: str
    title: str
    text: str


@dataclass(frozen=True)
class Chapter:
    """A notebook: the file it is read from, the profile of its outputs, its heading, and its figures."""

    source: Path
    profile: str
    title: str
    pictures: list[Picture]


def print_gallery(**options: str) -> None:
    """The ``softlms gallery`` command: run `build_gallery` and print the address of the site."""
    print(build_gallery(**options).as_uri())


def build_gallery(profile: str = "laptop", out: str | Path = "site") -> Path:
    """Build the site; Sphinx's warnings are errors.

    Parameters
    ----------
    profile : str
        Its ``figures/`` and ``results/`` are used. Notebooks come from ``executed/<profile>`` if present, else from
        ``notebooks/`` as committed; every page says which.
    out : str or Path
        Folder.

    Returns
    -------
    Path
        The page to open.

    Raises
    ------
    ValueError
        Sphinx is missing or finds an error, `out` contains something other than a site, or as from `write_pages`.
    FileNotFoundError
        No checkout, or no figure of this profile.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"The site needs {', '.join(missing)}: pip install 'softlms[docs]'.")
    from sphinx.cmd.build import main

    docs, out = project_root() / "docs", Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "objects.inv").is_file():
        raise ValueError(f"{out} contains something other than a site: choose an empty or a new folder.")
    write_pages(docs, profile)  # here as well, for a one-line error message
    if main(["-q", "-a", "-W", "--keep-going", "-D", f"softlms_profile={profile}", str(docs), str(out)]):
        raise ValueError("Sphinx reported the errors above.")
    return out / "index.html"


def write_pages(docs: Path, profile: str) -> None:
    """Write the generated pages of `docs`: ``notebooks/``, ``modules/`` and ``figures.md``.

    Raises
    ------
    ValueError
        Unknown profile, or a figure that does not match its note and tables or that no notebook draws.
    FileNotFoundError
        No figure of this profile.
    """
    find_profile(profile, PROFILES)
    root = docs.parent
    chapters = _read_chapters(root, profile)
    pages = {f"notebooks/{chapter.source.name}": _notebook(chapter, root) for chapter in chapters}
    pages |= {f"modules/{room}.md": text for room, text in _module_pages()}
    pages["figures.md"] = "\n\n".join(["# Figures", *_figure_lines(chapters, root, profile)]) + "\n"
    for folder in ("notebooks", "modules"):
        (docs / folder).mkdir(exist_ok=True)
        for path in (docs / folder).iterdir():
            if f"{folder}/{path.name}" not in pages and path.is_file():
                path.unlink()
    for name, text in pages.items():
        path = docs / name
        if not path.is_file() or path.read_text("utf-8") != text:
            with whole_file(path) as partial:
                partial.write_text(text, "utf-8")


def _read_chapters(root: Path, profile: str) -> list[Chapter]:
    figures = root / "figures" / profile
    # by any of its files, so that a missing one is reported
    left = {path.stem for path in figures.glob("[0-9]*.*") if path.suffix in (".png", ".pdf", ".json")}
    if not left:
        raise FileNotFoundError(f"{figures} has no figures: run softlms figures --profile {profile}.")
    if wrong := [line for name in sorted(left) for line in check_drawing(name, figures, root / "results" / profile)]:
        raise ValueError("; ".join(wrong))
    chapters, registry = [], read_registry(root)
    for committed in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        executed = root / "executed" / profile / committed.name
        book = nbformat.read(committed, as_version=4)
        variants = registry.get(committed.stem, Notebook()).variants
        pictures = [picture for picture in _pictures(committed.stem, book, variants) if picture.name in left]
        left -= {picture.name for picture in pictures}
        source, made = (executed, profile) if executed.is_file() else (committed, "quick")
        chapters.append(Chapter(source, made, book.cells[0].source.partition("\n")[0].lstrip("# "), pictures))
    if left:
        raise ValueError(f"{figures / min(left)}.png is drawn by no notebook: remove it, or add the notebook.")
    return chapters


def _pictures(name: str, book: nbformat.NotebookNode, variants: Sequence[str]) -> Iterator[Picture]:
    """Each ``book.draw(suffix)``, with the last heading and the last Markdown before it; then those of the variants."""
    drawn, title, text = [], "", ""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            heading, _, rest = cell.source.partition("\n")
            if heading.startswith("#"):
                title, text = heading.lstrip("# "), rest.strip()
            else:
                text = cell.source
        drawn += [(suffix, title, text) for suffix in re.findall(r'book\.draw\((?:"(\w*)")?\)', cell.source)]
    for variant in ("", *variants):
        for suffix, title, text in drawn:
            yield Picture(variant_name(name, variant) + suffix, f"{title}: {variant}" if variant else title, text)


def _notebook(chapter: Chapter, root: Path) -> str:
    """A notebook with a line on the source of its outputs, a text for each picture, and no sliders."""
    book = nbformat.read(chapter.source, as_version=4)
    heading = chapter.title
    for cell in book.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.partition("\n")[0].lstrip("# ")
        if cell.cell_type == "code":
            cell.metadata["mystnb"] = {"image": {"alt": f"Figure: {_plain(heading)}"}}
            cell.outputs = [
                output
                for output in cell.outputs
                if not output.get("data", {}).get("text/plain", "").startswith(SLIDERS)
            ]
    said = f"> Outputs of `{chapter.source.relative_to(root).as_posix()}`, run with profile `{chapter.profile}`."
    book.cells.insert(1, nbformat.v4.new_markdown_cell(said, id="outputs"))
    return nbformat.writes(book)


def _plain(title: str) -> str:
    """A heading without formulas: ``$\\alpha$`` becomes alpha."""
    return re.sub(r"[$\\`*]", "", title)


def _figure_lines(chapters: list[Chapter], root: Path, profile: str) -> Iterator[str]:
    yield f"All of profile `{profile}`, each with the tables that it was drawn from."
    for chapter in chapters:
        if chapter.pictures:
            yield f"## {chapter.title}\n\n[The notebook](notebooks/{chapter.source.name})"
        for picture in chapter.pictures:
            path = f"../figures/{profile}/{picture.name}"
            tables = json.loads((root / "docs" / f"{path}.json").read_text("utf-8"))["tables"]
            links = [f"[PDF]({path}.pdf)"]
            links += [
                f"[{table['file']}](../results/{profile}/{table['file']}) ({table['rows']} rows)" for table in tables
            ]
            links += [] if tables else ["drawn from formulas, without a table"]
            image = f"![{_plain(picture.title)}]({path}.png)"
            yield "\n\n".join([f"### {picture.title}", picture.text, image, ", ".join(links)])


def _module_pages() -> Iterator[tuple[str, str]]:
    """A page for each room: its modules and their definitions."""
    rooms: dict[str, list[str]] = {"softlms": []}
    for module in pkgutil.walk_packages(softlms.__path__, "softlms."):
        if module.ispkg:
            rooms[module.name] = []
        else:
            rooms[module.name.rpartition(".")[0]].append(module.name)
    for room, modules in rooms.items():
        intro = f"```{{eval-rst}}\n.. automodule:: {room}\n   :no-members:\n   :no-index:\n```"
        parts = [
            # re-exported names are documented in the module that defines them
            f"## {name.rpartition('.')[2]}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :ignore-module-all:\n```"
            for name in modules
        ]
        yield room, "\n\n".join([f"# {room}", intro, *parts]) + "\n"
