"""Notebooks and their prose as HTML that needs no server, no script and no font from elsewhere: formulas are MathML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import nbformat
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

__all__ = ["Section", "code_style", "markdown", "notebook_body", "plain", "sections"]

WIDGET = "application/vnd.jupyter.widget-view+json"  # shows nothing without a kernel behind it


class _WithMathML(IPythonRenderer):
    """Where nbconvert leaves TeX to MathJax, which it would load from the net."""

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return _mathml(body, "block")

    def table(self, text: str) -> str:
        return f'<div class="scroll"><table>\n{text}</table></div>\n'


def _mathml(tex: str, display: str) -> str:
    mathml = convert(tex, display=display)
    # of a norm's two bars only the first would grow, and the name of a function stands against its argument: tanhu
    mathml = mathml.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')
    return re.sub(r"(<mi>[a-z]{2,}</mi>)(?=<mi)", r'\1<mspace width="0.167em" />', mathml)


def markdown(text: str) -> str:
    """A Markdown cell as HTML, its formulas as MathML."""
    return MarkdownWithMath(renderer=_WithMathML(escape=False, exclude_anchor_links=True)).render(text)


def plain(text: str) -> str:
    """A line of Markdown without marks, for where no HTML can be: ``$\\alpha$`` becomes α."""
    return Markup(markdown(text)).striptags()


@dataclass(frozen=True)
class Section:
    """What a notebook says before it draws a figure.

    Attributes
    ----------
    title, text : str
        The last heading before the drawing, and the last Markdown cell before it without its heading; Markdown.
    """

    title: str
    text: str


def sections(book: nbformat.NotebookNode) -> Iterator[tuple[str, Section]]:
    """The suffix of each ``book.draw(suffix)``, with what the notebook says before it."""
    title = text = ""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            heading, _, rest = cell.source.partition("\n")
            if heading.startswith("#"):
                title, text = heading.lstrip("# "), rest.strip()
            else:
                text = cell.source
        for suffix in re.findall(r'book\.draw\((?:"(\w*)")?\)', cell.source):
            yield suffix, Section(title, text)


def notebook_body(book: nbformat.NotebookNode) -> str:
    """Cells and outputs as HTML, to be put into a page that has `code_style`; images are part of it."""
    heading = ""
    for cell in book.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.partition("\n")[0].lstrip("# ")
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.metadata.setdefault("image/png", {})["alt"] = f"Figure: {plain(heading)}"
    exporter = HTMLExporter(template_name="basic", embed_images=True, filters={"markdown2html": markdown})
    return exporter.from_notebook_node(book)[0]


def code_style() -> str:
    """CSS of highlighted code, for light and for dark."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
