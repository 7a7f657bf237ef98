"""JupyterLab in a headless Chromium, driven as a reader would."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
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


@contextmanager
def serve_lab(root, **environment):
    """JupyterLab on a checkout's notebooks, with settings of its own: its address."""
    with tempfile.TemporaryDirectory() as place, socket.socket() as free:
        own = Path(place)
        for name, values in SETTINGS.items():
            file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values), "utf-8")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
        command += ["--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password="]
        command += [f"--ServerApp.root_dir={root / 'notebooks'}", "--LabApp.extension_manager=readonly"]
        environment |= {f"JUPYTER_{name}_DIR": str(own / name) for name in ("CONFIG", "RUNTIME")}
        environment |= {f"JUPYTERLAB_{name}_DIR": str(own / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
        with (own / "lab.log").open("w", encoding="utf-8") as log:
            server = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log, cwd=root)
            try:
                yield _wait_for(f"http://127.0.0.1:{port}", server, own / "lab.log")
            finally:
                server.terminate()
                server.wait(30)


def _wait_for(address, server, log):
    for _ in range(120):
        assert server.poll() is None, log.read_text("utf-8")
        try:
            urllib.request.urlopen(f"{address}/api/status")
        except OSError:
            time.sleep(0.5)
        else:
            return address
    raise TimeoutError(log.read_text("utf-8"))


@contextmanager
def open_browser():
    from selenium import webdriver

    # Chromium's last processes may write for a moment after it has quit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in (*FLAGS, f"user-data-dir={place}"):
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


class NotebookPage:
    """A notebook of `serve_lab`, opened and not yet run."""

    def __init__(self, browser, address, notebook):
        self.browser = browser
        book = json.loads(notebook.read_text("utf-8"))
        self.numbered = [f"[{i + 1}]:" for i in range(sum(cell["cell_type"] == "code" for cell in book["cells"]))]
        # a workspace of its own: the default one brings the tabs of earlier notebooks back
        browser.get(f"{address}/lab/workspaces/{notebook.stem}/tree/{notebook.name}")
        self.wait(lambda: len(self.prompts()) == len(self.numbered))
        self.wait(self.idle)

    def find(self, css):
        return self.browser.find_element("css selector", css)

    def find_all(self, css):
        return self.browser.find_elements("css selector", css)

    def wait(self, condition, seconds=120):
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        # elements come and go while JupyterLab lays the page out
        ignored = (NoSuchElementException, StaleElementReferenceException)
        return WebDriverWait(self.browser, seconds, ignored_exceptions=ignored).until(lambda _: condition())

    def idle(self):
        """As the status bar says it; the notebook's own indicator is idle before there is a kernel."""
        return "| Idle" in self.find("#jp-main-statusbar").text

    def prompts(self):
        return [cell.text for cell in self.find_all(".jp-CodeCell .jp-InputPrompt")]

    def errors(self):
        return [output.text for output in self.find_all('[data-mime-type*="error"], [data-mime-type*="stderr"]')]

    def run_all(self, seconds=120):
        """The menu's "Run All Cells", and wait for its end: the last cell's number, or an error."""
        next(item for item in self.find_all(".lm-MenuBar-item") if item.text == "Run").click()
        self.wait(lambda: self.find('.lm-Menu-item[data-command="runmenu:run-all"]')).click()
        self.wait(lambda: self.idle() and (self.errors() or self.prompts() == self.numbered), seconds)
