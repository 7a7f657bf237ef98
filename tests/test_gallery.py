import os
import re
import shutil
import socket
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from PIL import Image
from test_project import PYPROJECT, ROOT

import softlms
from softlms import cli
from softlms.workbook import gallery
from softlms.workbook.gallery import build_gallery
from softlms.workbook.pages import markdown

BOOKS = ("01_threshold_functions", "03_block_sensitivity")  # formulas, a widget; figures with and without tables


def copy_checkout(place):
    """The committed tree with two of its notebooks."""
    (place / "notebooks").mkdir(parents=True)
    (place / "pyproject.toml").touch()
    shutil.copy(ROOT / "notebooks/notebooks.toml", place / "notebooks")
    for book in BOOKS:
        shutil.copy(ROOT / "notebooks" / f"{book}.ipynb", place / "notebooks")
        for kind in ("figures", "results"):
            (place / kind / "laptop").mkdir(parents=True, exist_ok=True)
            for file in (ROOT / kind / "laptop").glob(f"{book}*"):
                shutil.copy(file, place / kind / "laptop")
    claim = {"claim": "order", "ground": "PAPER", "text": "2 < 3", "claimed": "2", "unit": "%", "measured": "1.9"}
    claims = pd.DataFrame([claim | {"verdict": "HOLDS", "why": "", "hardware": "AMD EPYC"}])
    claims.to_csv(place / "results/laptop/10_paper_vs_reproduced.csv", index=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkout")
    copy_checkout(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert cli.main(["gallery"]) == 0
    return place / "site"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    copy_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Page(HTMLParser):
    """What a page loads when it is opened, what it links to, what can be linked to, and its metadata."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.names, self.tags, self.alts = [], [], set(), [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        self.names.add(values.get("id"))
        if tag == "a":
            self.links += [values["href"]] if "href" in values else []
        else:
            self.loads += [values[name] for name in ("src", "href", "srcset", "data", "poster") if values.get(name)]
        if tag == "img":
            self.alts.append(values.get("alt"))


def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_link_and_image_is_there(site):
    read = pages(site)
    assert len(read) == 2 + len(BOOKS)
    for path, page in read.items():
        for address in page.loads + page.links:
            parts = urlsplit(address)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), (path.name, address)
            if parts.fragment and target in read:
                assert parts.fragment in read[target].names, (path.name, address)


def test_nothing_is_loaded_from_elsewhere(site):
    for path, page in pages(site).items():
        assert all(urlsplit(address).scheme in ("", "data") for address in page.loads), path
        assert not any(tag in ("script", "iframe") for tag, _ in page.tags), path
        style = path.read_text("utf-8") + (site / "style.css").read_text("utf-8")
        assert not re.search(r"@import|url\(\s*['\"]?https?:", style), path


def test_pages_are_for_phones_and_dark_screens_too(site):
    for path, page in pages(site).items():
        viewports = [values["content"] for tag, values in page.tags if values.get("name") == "viewport"]
        assert viewports == ["width=device-width, initial-scale=1"], path
    for style in (site / "style.css", site / "api.html"):
        assert re.search(r"prefers-color-scheme: ?dark", style.read_text("utf-8")), style


def test_each_figure_has_title_thumbnail_files_and_tables(site):
    index = (site / "index.html").read_text("utf-8")
    figures = sorted(path.stem for path in (ROOT / "figures/laptop").glob("*.png") if path.stem.startswith(BOOKS))
    assert len(figures) == 4 and index.count("<figure>") == 4
    titles = ("Three ways to cut", "Their gradients", "cuts a real layer (Fig. 3)", "One block at a time")
    for title in ("01 Threshold functions", "03 Block sensitivity", *titles):
        assert re.search(rf"<h[23]>[^\n]*{re.escape(title)}</h[23]>", index), title
    for name in figures:
        assert f'href="figures/{name}.png"' in index and f'href="figures/{name}.pdf"' in index
        with Image.open(site / "thumbnails" / f"{name}.png") as image:
            assert max(image.size) == 720
    for table in ("01_threshold_functions_spectra.csv", "03_block_sensitivity.csv"):
        rows = len(pd.read_csv(site / "tables" / table))
        assert f'href="tables/{table}">{table}</a> <span>{rows} rows' in index
    assert index.count("without a table") == 2
    assert all(alt for page in pages(site).values() for alt in page.alts)


def test_formulas_are_mathml(site):
    page = (site / "notebooks" / "01_threshold_functions.html").read_text("utf-8")
    assert page.count("<math") > 20 and 'display="block"' in page
    prose = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", page, flags=re.DOTALL)
    assert "$" not in prose and "\\" not in prose  # no TeX is left
    assert "<mi>tanh</mi><mspace" in markdown(r"$\tanh u$")
    assert markdown(r"$\lVert W \rVert_F$").count('<mo stretchy="false">') == 2
    assert 'alt="Figure: α cuts a real layer (Fig. 3)"' in page
    assert "widget-view" not in page and "interactive(" not in page


def test_where_outputs_come_from_is_said(checkout):
    executed = checkout / "executed" / "laptop"
    executed.mkdir(parents=True)
    shutil.copy(checkout / "notebooks" / f"{BOOKS[1]}.ipynb", executed)
    index = build_gallery().read_text("utf-8")
    assert f"notebooks/{BOOKS[0]}.ipynb, run with profile quick" in index
    assert f"executed/laptop/{BOOKS[1]}.ipynb, run with profile laptop" in index


def test_claims_are_shown_where_they_were_judged(site, checkout):
    index = (site / "index.html").read_text("utf-8")
    row = ("PAPER", "2 &lt; 3", "2", "%", "1.9", "HOLDS", "")
    assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" in index
    (checkout / "results/laptop/10_paper_vs_reproduced.csv").unlink()
    assert "Paper against reproduced" not in build_gallery().read_text("utf-8")


def test_every_public_name_is_in_the_api(site):
    page = (site / "api.html").read_text("utf-8")
    names = Page(site / "api.html").names
    assert set(softlms.__all__) <= names
    for words in ("Parameters", "Returns", "Raises", "Weight of the compression loss, positive"):
        assert words in page


def test_a_failed_build_leaves_the_old_site(checkout, monkeypatch):
    build_gallery()
    (checkout / "site" / "mine.txt").touch()
    before = sorted(checkout.rglob("*"))

    def fail():
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "_api_page", fail)  # the last page
        assert cli.main(["gallery"]) == 2
    assert sorted(checkout.rglob("*")) == before
    build_gallery()
    assert not (checkout / "site" / "mine.txt").exists() and not list(checkout.glob(".site*"))


def test_what_killed_builds_left_is_put_right(checkout):
    build_gallery()
    here, dead = socket.gethostname(), 2**22 + 1  # above Linux's largest process number
    (checkout / "site").rename(checkout / f".site.old-{here}-{dead}")  # killed between the two
    (checkout / f".site.partial-{here}-{dead}").mkdir()
    others = {f".site.partial-{here}-{os.getppid()}", f".site.partial-elsewhere-{dead}"}
    for name in others:
        (checkout / name).mkdir()
    gallery._recover(checkout / "site")
    assert (checkout / "site" / "index.html").is_file()
    assert {path.name for path in checkout.glob(".site*")} == others


def test_a_figure_that_lacks_a_file_is_not_left_out(checkout, capsys):
    figure = checkout / "figures/laptop/03_block_sensitivity.png"
    figure.rename(checkout / "away")
    assert cli.main(["gallery"]) == 2
    assert "03_block_sensitivity.png is missing" in capsys.readouterr().err


def test_bad_input_stops_before_anything_is_built(checkout, capsys):
    (checkout / "thesis").mkdir()
    (checkout / "thesis" / "index.html").write_text("<h1>années de travail</h1>", "latin-1")
    table = checkout / "results/laptop/03_block_sensitivity.csv"
    for arguments, message in (
        (["--profile", "huge"], "Unknown profile 'huge'; known: quick, laptop, paper"),
        (["--profile", "paper"], "has no figures: run softlms figures --profile paper"),
        (["--out", "thesis"], "thesis holds something else than a gallery"),
        (["--out", "pyproject.toml"], "pyproject.toml holds something else than a gallery"),
    ):
        assert cli.main(["gallery", *arguments]) == 2
        assert message in capsys.readouterr().err
    table.write_text(table.read_text("utf-8").replace("0.8", "0.9", 1), "utf-8")
    assert cli.main(["gallery"]) == 2
    assert "is not the file that the note names" in capsys.readouterr().err
    shutil.copy(ROOT / "results/laptop/03_block_sensitivity.csv", table)
    (checkout / "notebooks" / f"{BOOKS[1]}.ipynb").unlink()
    assert cli.main(["gallery"]) == 2
    assert "03_block_sensitivity.png is drawn by no notebook" in capsys.readouterr().err
    assert not (checkout / "site").exists() and not list(checkout.glob(".*"))
    assert (checkout / "thesis" / "index.html").read_text("latin-1") == "<h1>années de travail</h1>"


def test_an_installed_package_has_the_templates():
    package = ROOT / "softlms"
    packed = {
        path for glob in PYPROJECT["tool"]["setuptools"]["package-data"]["softlms"] for path in package.glob(glob)
    }
    files = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert len(files) > 5 and files <= packed
