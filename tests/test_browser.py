"""JupyterLab as a reader has it, in a real browser. Not part of plain pytest: ``make test-browser``."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from lab import BROWSER, DRIVER, NotebookPage, open_browser, serve_lab
from PIL import Image

ROOT = Path(__file__).parent.parent
SLIDER, TEXT, PICTURE = ".widget-slider .noUi-handle", ".widget-html-content", ".widget-image"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with chromedriver on this machine"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the checkout, so that nothing is written into the real one: its address, the copy."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", root)
    for part in ("notebooks", "results"):
        shutil.copytree(ROOT / part, root / part)
    with serve_lab(root) as address:
        yield address, root


@pytest.fixture
def open_page(lab, tmp_path):
    address, root = lab
    with open_browser() as browser:
        yield lambda notebook: NotebookPage(browser, address, root / "notebooks" / notebook)
        browser.save_screenshot(str(tmp_path / "last.png"))  # for a failure: what was to be seen


def show_explorer(page, tmp_path):
    """Run the notebook to its end and bring its explorer into view: what its picture looks like."""
    assert not page.find_all(".jupyter-widgets")  # none is left from an earlier run
    page.run_all(900)
    assert not page.errors()
    picture = page.wait(lambda: page.find(PICTURE))
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    page.wait(lambda: picture.size["width"] > 300 and page.idle())
    screenshot(page, tmp_path / "before.png")
    return pixels(picture)


def wait_for_change(page, before, tmp_path):
    """An area of the picture, not a label."""
    page.wait(lambda: (pixels(page.find(PICTURE)) != before).mean() > 0.01 and page.idle())
    screenshot(page, tmp_path / "after.png")


def drag_slider(page, pixels_right):
    from selenium.webdriver import ActionChains

    handle = page.find(SLIDER)
    ActionChains(page.browser).click_and_hold(handle).move_by_offset(pixels_right, 0).release().perform()


def screenshot(page, place):
    page.browser.save_screenshot(str(place))
    print(place)


def pixels(element):
    """What is seen, shape (height, width): grey values."""
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("L"))


def test_threshold_slider_moves_text_and_picture(lab, open_page, tmp_path):
    page = open_page("01_threshold_functions.ipynb")
    drawn = lab[1] / "figures/quick/01_threshold_functions_spectrum.png"
    assert not drawn.exists()
    before = show_explorer(page, tmp_path)
    assert drawn.is_file()  # it ran, and shows no older run
    assert page.find(".widget-readout").text == "1.00" and page.find(TEXT).text.startswith("rank 199 of 384")
    drag_slider(page, 60)
    wait_for_change(page, before, tmp_path)
    assert float(page.find(".widget-readout").text) > 1.2
    assert int(page.find(TEXT).text.split()[1]) < 199


def test_budget_slider_shows_which_ranks_fall(open_page, tmp_path):
    page = open_page("05_bert_table.ipynb")
    before = show_explorer(page, tmp_path)
    assert page.find(".widget-readout").text == "75%" and page.find(TEXT).text.startswith("trained for 75%")
    drag_slider(page, -300)  # to the smallest
    wait_for_change(page, before, tmp_path)
    assert page.find(".widget-readout").text == "35%" and page.find(TEXT).text.startswith("trained for 35%")


def test_speed_choices_show_another_model(open_page, tmp_path):
    from selenium.webdriver.support.ui import Select

    page = open_page("09_speedup.ipynb")
    before = show_explorer(page, tmp_path)
    assert page.find(TEXT).text.startswith("bert-base")
    Select(page.find(".widget-dropdown select")).select_by_visible_text("gpt2")
    wait_for_change(page, before, tmp_path)
    assert page.find(TEXT).text.startswith("gpt2")
