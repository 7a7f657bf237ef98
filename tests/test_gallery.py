"""The site: what is generated for Sphinx, and, among the slow tests, all of it."""

import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from test_project import PYPROJECT, ROOT

import softlms
from softlms import cli
from softlms.workbook import gallery
from softlms.workbook.gallery import write_pages
from softlms.workbook.plots.drawing import draw

BOOKS = ("01_threshold_functions", "03_block_sensitivity")  # formulas, a widget; figures with and without tables


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The committed tree with two of its notebooks."""
    for folder in ("docs", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").touch()
    shutil.copy(ROOT / "notebooks/notebooks.toml", tmp_path / "notebooks")
    for book in BOOKS:
        shutil.copy(ROOT / "notebooks" / f"{book}.ipynb", tmp_path / "notebooks")
        for kind in ("figures", "results"):
            (tmp_path / kind / "laptop").mkdir(parents=True, exist_ok=True)
            for file in (ROOT / kind / "laptop").glob(f"{book}*"):
                shutil.copy(file, tmp_path / kind / "laptop")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_figure_has_its_text_files_and_tables(checkout):
    write_pages(checkout / "docs", "laptop")
    page = (checkout / "docs/figures.md").read_text("utf-8")
    for title in ("# 01 Threshold functions", "# Three ways to cut", "# Their gradients", "# One block at a time"):
        assert f"{title}\n" in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len([link for link in links if link.endswith(".png")]) == 4 == page.count("[PDF]")
    assert all((checkout / "docs" / link).is_file() for link in links)
    assert "03_block_sensitivity.csv) (60 rows)" in page and page.count("without a table") == 2


def test_a_notebook_draws_each_committed_figure(checkout):
    """What the site needs, without building it."""
    for folder in ("notebooks", "figures", "results"):
        shutil.rmtree(checkout / folder)
        shutil.copytree(ROOT / folder, checkout / folder)
    write_pages(checkout / "docs", "laptop")
    page = (checkout / "docs/figures.md").read_text("utf-8")
    assert page.count(".png)") == len(list((ROOT / "figures/laptop").glob("*.png")))


def test_the_figures_of_a_variant_are_beside_the_plain_ones(checkout):
    toml = checkout / "notebooks/notebooks.toml"
    text = toml.read_text("utf-8")
    toml.write_text(text.replace(f"[{BOOKS[1]}]\n", f'[{BOOKS[1]}]\nvariants = ["beside", "never_run"]\n'), "utf-8")
    figures, results = checkout / "figures/laptop", checkout / "results/laptop"
    shutil.copy(results / f"{BOOKS[1]}.csv", results / f"{BOOKS[1]}_beside.csv")
    draw(f"{BOOKS[1]}_beside", figures, results)
    write_pages(checkout / "docs", "laptop")
    page = (checkout / "docs/figures.md").read_text("utf-8")
    assert "### One block at a time\n" in page and "### One block at a time: beside\n" in page
    assert page.count(".png)") == 5 and "never_run" not in page


def test_notebooks_say_where_their_outputs_come_from(checkout):
    (checkout / "executed/laptop").mkdir(parents=True)
    shutil.copy(checkout / "notebooks" / f"{BOOKS[1]}.ipynb", checkout / "executed/laptop")
    (checkout / "docs/notebooks").mkdir()
    (checkout / "docs/notebooks/gone.ipynb").touch()
    write_pages(checkout / "docs", "laptop")
    first, second = sorted((checkout / "docs/notebooks").iterdir())
    assert (first.stem, second.stem) == BOOKS
    assert f"notebooks/{BOOKS[0]}.ipynb`, run with profile `quick`" in first.read_text("utf-8")
    assert f"executed/laptop/{BOOKS[1]}.ipynb`, run with profile `laptop`" in second.read_text("utf-8")
    before = json.loads((checkout / "notebooks" / first.name).read_text("utf-8"))
    assert "VBox(children" in json.dumps(before) and "VBox(children" not in first.read_text("utf-8")


def test_each_module_is_in_its_room(checkout):
    write_pages(checkout / "docs", "laptop")
    for path in (ROOT / "softlms").rglob("*.py"):
        if path.stem != "__init__":
            room, module = (".".join(part.relative_to(ROOT).parts) for part in (path.parent, path.with_suffix("")))
            assert f".. automodule:: {module}\n" in (checkout / f"docs/modules/{room}.md").read_text("utf-8")


def test_bad_input_is_told_in_a_line(checkout, monkeypatch, capsys):
    def fails(message, *arguments):
        assert cli.main(["gallery", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    (checkout / "thesis").mkdir()
    (checkout / "thesis/index.html").touch()
    fails("thesis contains something other than a site", "--out", "thesis")
    fails("pyproject.toml contains something other than a site", "--out", "pyproject.toml")
    fails("Unknown profile 'huge'; known: quick, laptop, paper", "--profile", "huge")
    fails("has no figures: run softlms figures --profile paper", "--profile", "paper")
    figure, table = (
        checkout / "figures/laptop/03_block_sensitivity.png",
        checkout / "results/laptop/03_block_sensitivity.csv",
    )
    figure.rename(checkout / "away")
    fails("03_block_sensitivity.png is missing")
    (checkout / "away").rename(figure)
    table.write_text(table.read_text("utf-8").replace("0.8", "0.9", 1), "utf-8")
    fails("is not the file that the note names")
    shutil.copy(ROOT / "results/laptop" / table.name, table)
    (checkout / "notebooks" / f"{BOOKS[1]}.ipynb").unlink()
    fails("03_block_sensitivity.png is drawn by no notebook")
    monkeypatch.setattr(gallery, "NEEDED", ("sphinx", "no_such_theme"))
    fails("The site needs no_such_theme: pip install 'softlms[docs]'.")
    assert not (checkout / "site").exists()


def test_an_installed_package_has_all_its_files():
    package = ROOT / "softlms"
    packed = {
        path for glob in PYPROJECT["tool"]["setuptools"]["package-data"]["softlms"] for path in package.glob(glob)
    }
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path.suffix != ".py"} == packed


class Page(HTMLParser):
    """What a page loads when it is opened, what it links to, and what can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.names, self.alts, self.text = [], [], set(), [], path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.names |= {values.get("id"), values.get("name")}
        if tag == "a":
            self.links += [values["href"]] if "href" in values else []
        else:
            self.loads += [values[name] for name in ("src", "href", "srcset", "data", "poster") if values.get(name)]
        if tag == "img":
            self.alts.append(values.get("alt"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site; a warning of Sphinx's fails the build."""
    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert cli.main(["gallery", "--out", str(out)]) == 0
    return {
        path.relative_to(out).as_posix(): (path, Page(path))
        for path in out.rglob("*.html")
        if "_static" not in path.parts
    }


@pytest.mark.slow
def test_every_notebook_and_every_public_name_is_on_it(site):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        page = site[f"notebooks/{path.stem}.html"][1]
        assert all(page.alts) and "widget-view" not in page.text
    assert {f"softlms.{name}" for name in softlms.__all__} <= site["api.html"][1].names


@pytest.mark.slow
def test_it_needs_no_network_and_no_link_is_dead(site):
    for path, page in site.values():
        for address in page.loads + page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                assert address in page.links or parts.scheme == "data", (path.name, address)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), (path.name, address)
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", page.text, flags=re.DOTALL)
        assert not any("://" in script for script in scripts), path.name
    (index, _) = site["index.html"]
    for style in index.parent.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text("utf-8")), style


@pytest.mark.slow
def test_formulas_are_mathml(site):
    page = site["notebooks/01_threshold_functions.html"][1].text
    assert page.count("<math") > 20 and 'display="block"' in page
    prose = re.sub(r"<(pre|code|script|style).*?</\1>", "", page, flags=re.DOTALL)
    assert "$" not in prose and "\\" not in prose  # no TeX is left
