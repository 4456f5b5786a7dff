"""notebooks/00_start.ipynb in a real browser: type a sentence, move both sliders, see a change.

    python tests/slow/browser.py --shots /tmp/shots

Starts JupyterLab on a free port and headless Chromium (selenium), and opens a copy of the notebook.
Outputs below a prediction must be folded. After all cells were run it types a sentence, moves the
slider of the Bridger's strength and that of the stages, and asserts each time that the picture is
another one. Prints the seconds until each new picture. Screenshots go to --shots, to be looked at.
Ends with a reason and status 0 where there is no selenium or no Chromium.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "notebooks/browser_test.ipynb"
PICTURE = ".jp-OutputArea-output img.widget-image, .jp-OutputArea-output .widget-image img"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def find_browser() -> tuple[str, str] | str:
    """(browser, driver), or why there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        return "no Chromium with chromedriver: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "no selenium: pip install -r requirements-test.txt"
    return browser, driver


def start_lab(port, room):
    """JupyterLab in the project's folder, without a token, for this machine only."""
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        f"--port={port}",
        "--ip=127.0.0.1",
    ]
    command += ["--ServerApp.token=", "--ServerApp.password=", f"--ServerApp.root_dir={ROOT}"]
    command += ["--LabApp.news_url=", f"--LabApp.workspaces_dir={room}/workspaces"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": f"{room}/config"}
    log = open(f"{room}/lab.log", "w")  # noqa: SIM115
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def start_browser(browser, driver, room):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--window-size=1500,1400",
        f"--user-data-dir={room}/profile",
    ):
        options.add_argument(option)
    return webdriver.Chrome(options=options, service=Service(driver))


def wait_for(what, seconds, reason):
    """The first true value of what(); fails after `seconds`."""
    end = time.time() + seconds
    while time.time() < end:
        value = what()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s: {reason}")


class Page:
    """The notebook in the browser."""

    def __init__(self, web, shots):
        self.web = web
        self.shots = shots

    def find(self, css):
        from selenium.common.exceptions import StaleElementReferenceException

        try:
            return [
                one for one in self.web.find_elements("css selector", css) if one.is_displayed()
            ]
        except StaleElementReferenceException:
            return []

    def picture(self) -> str | None:
        """All bytes of the picture that is shown, read back from the page."""
        script = """
            const image = document.querySelector(arguments[0]);
            if (!image || !image.complete || !image.naturalWidth) return null;
            const canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth;
            canvas.height = image.naturalHeight;
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL();
        """
        return self.web.execute_script(script, PICTURE)

    def shot(self, name):
        self.web.save_screenshot(str(self.shots / f"{name}.png"))

    def changed(self, name, before) -> str:
        """Wait for another picture than `before`; the seconds are printed."""
        start = time.time()

        def another():
            now = self.picture()
            return now if now != before else None

        now = wait_for(another, 60, f"{name}: the picture did not change")
        print(f"{name}: another picture after {time.time() - start:.2f} s")
        return now

    def settle(self) -> str:
        """The picture once it has stayed the same for two seconds."""
        last = self.picture()
        since = time.time()
        while time.time() - since < 2:
            now = self.picture()
            if now != last:
                last = now
                since = time.time()
            time.sleep(0.1)
        return last


def visit(web, port, shots):
    from selenium.webdriver.common.keys import Keys

    page = Page(web, shots)
    web.get(f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?reset")
    wait_for(lambda: page.find(".jp-Notebook .jp-Cell"), 120, "no notebook on the page")
    wait_for(lambda: scroll_to_folded(page), 60, "no output is folded")
    page.shot("1_folded")
    web.execute_script("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
    wait_for(lambda: page.find(".jp-Notebook .jp-Cell"), 20, "no cell")[0].click()
    run_all(page)
    wait_for(page.picture, 300, "no picture after all cells were run")
    status = web.find_element("css selector", "#jp-main-statusbar")
    wait_for(lambda: "Idle" in status.text, 300, "the cells do not end")
    box = web.find_element("css selector", ".jp-OutputArea-output .widget-dropdown")
    web.execute_script("arguments[0].scrollIntoView({block: 'start'})", box)
    first = page.settle()
    page.shot("2_first_picture")

    box = page.find(".widget-text input")[0]
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("the heart")
    page.changed("sentence", first)
    second = page.settle()
    page.shot("3_sentence")

    strength, stage = page.find(".widget-slider .noUi-handle")[:2]
    strength.send_keys(Keys.HOME)
    page.changed("strength of the Bridger", second)
    third = page.settle()
    page.shot("4_strength_0")

    stage.send_keys(Keys.END)
    page.changed("stage", third)
    page.settle()
    page.shot("5_decoder")


def scroll_to_folded(page) -> bool:
    """Scroll on, as cells out of sight are not on the page; true at a folded one."""
    found = page.find(".jp-OutputPlaceholder")
    if found:
        page.web.execute_script("arguments[0].scrollIntoView({block: 'center'})", found[0])
        time.sleep(1)
        return True
    script = "document.querySelector('.jp-WindowedPanel-outer').scrollTop += 600"
    page.web.execute_script(script)
    time.sleep(0.5)
    return False


def run_all(page):
    """Run > Run All Cells, through the menu."""
    menus = page.web.find_elements("css selector", ".lm-MenuBar-item")
    next(one for one in menus if one.text.strip() == "Run").click()
    entry = '.lm-Menu-item[data-command="runmenu:run-all"]'
    wait_for(lambda: page.find(entry), 20, "no entry Run All Cells")[0].click()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shots", type=Path, default=Path("shots"), metavar="DIR", help="screenshots (shots)"
    )
    args = parser.parse_args()
    found = find_browser()
    if isinstance(found, str):
        print(f"skipped: {found}")
        return
    args.shots.mkdir(parents=True, exist_ok=True)
    port = free_port()
    copy = ROOT / NOTEBOOK
    with tempfile.TemporaryDirectory() as room:
        lab = None
        web = None
        try:
            shutil.copy(ROOT / "notebooks" / "00_start.ipynb", copy)
            lab = start_lab(port, room)
            web = start_browser(*found, room)
            wait_for(lambda: answers(port), 120, "JupyterLab does not answer")
            visit(web, port, args.shots)
        except Exception:
            if web is not None:
                web.save_screenshot(str(args.shots / "failed.png"))
            print(Path(room, "lab.log").read_text()[-2000:])
            raise
        finally:
            copy.unlink(missing_ok=True)
            if web is not None:
                web.quit()
            if lab is not None:
                lab.terminate()
                lab.wait(20)
    print("the picture follows the sentence and both sliders")


def answers(port) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main()
