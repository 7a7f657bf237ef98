"""JupyterLab as a reader has it: notebook 01 in a real browser. Not part of plain pytest: ``make test-browser``."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
NOTEBOOK = "01_threshold_functions.ipynb"
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
LAST_PROMPT = 8
FLAGS = (
    "headless=new",
    "no-sandbox",  # Chromium has none for root, as which containers run
    "disable-gpu",
    "disable-dev-shm-usage",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1400,1000",
)
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, whatever is in view
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with chromedriver on this machine"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the checkout, so that nothing is written into the real one: its address, the copy."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "notebooks").mkdir()
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, root / "notebooks")
    for name, values in SETTINGS.items():
        file = root / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password="]
    command += [f"--ServerApp.root_dir={root / 'notebooks'}", "--LabApp.extension_manager=readonly"]
    own = {f"JUPYTER_{name}_DIR": str(root / name) for name in ("CONFIG", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(root / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces")}
    with (root / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, cwd=root)
        try:
            yield wait_for(f"http://127.0.0.1:{port}", server, root / "lab.log"), root
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address, server, log):
    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/api/status")
        except OSError:
            time.sleep(0.5)
        else:
            return address
    raise TimeoutError(log.read_text())


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'browser'}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
        driver.save_screenshot(str(tmp_path / "last.png"))  # for a failure: what was to be seen
    finally:
        driver.quit()


def test_notebook_runs_and_its_slider_moves_text_and_picture(lab, browser, tmp_path):
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(css):
        return browser.find_element(By.CSS_SELECTOR, css)

    def wait(condition, seconds=120):
        # elements come and go while JupyterLab lays the page out
        ignored = (NoSuchElementException, StaleElementReferenceException)
        return WebDriverWait(browser, seconds, ignored_exceptions=ignored).until(lambda _: condition())

    def idle():
        """As the status bar says it; the notebook's own indicator is idle before there is a kernel."""
        return "| Idle" in find("#jp-main-statusbar").text

    def prompts():
        cells = browser.find_elements(By.CSS_SELECTOR, ".jp-CodeCell .jp-InputPrompt")
        return [cell.text for cell in cells]

    def screenshot(name):
        browser.save_screenshot(str(tmp_path / f"{name}.png"))
        print(tmp_path / f"{name}.png")

    address, root = lab
    browser.get(f"{address}/lab/tree/{NOTEBOOK}")
    wait(lambda: len(prompts()) == LAST_PROMPT)
    wait(idle)
    screenshot("opened")
    assert not browser.find_elements(By.CSS_SELECTOR, ".jupyter-widgets")  # none is left from an earlier run

    next(item for item in browser.find_elements(By.CSS_SELECTOR, ".lm-MenuBar-item") if item.text == "Run").click()
    wait(lambda: find('.lm-Menu-item[data-command="runmenu:run-all"]')).click()
    wait(lambda: browser.find_elements(By.CSS_SELECTOR, ".widget-image"))
    wait(lambda: prompts() == [f"[{number}]:" for number in range(1, LAST_PROMPT + 1)])
    assert not browser.find_elements(By.CSS_SELECTOR, '[data-mime-type*="error"], [data-mime-type*="stderr"]')
    assert (root / "figures/quick/01_threshold_functions_spectrum.png").is_file()  # it ran, and shows no older run

    handle, text, picture = map(find, (".widget-slider .noUi-handle", ".widget-html-content", ".widget-image"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    wait(lambda: picture.size["width"] > 300 and idle())
    screenshot("before")
    before = pixels(picture)
    assert find(".widget-readout").text == "1.00" and text.text.startswith("rank 199 of 384")

    ActionChains(browser).click_and_hold(handle).move_by_offset(60, 0).release().perform()
    wait(lambda: (pixels(picture) != before).mean() > 0.05 and idle())  # an area of it, not a label
    screenshot("after")
    assert float(find(".widget-readout").text) > 1.2
    assert int(text.text.split()[1]) < 199


def pixels(element):
    """What is seen, shape (height, width): grey values."""
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("L"))
