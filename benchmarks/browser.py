"""The demo in a process of its own and a headless Chromium in front of it, for tests and for `make screenshots`."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit


if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page


APP = Path(__file__).resolve().parents[1] / "demo" / "app.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START_SECONDS = 120  # two busy cores need 20 to import everything


def missing() -> str | None:
    """What a browser test lacks on this machine, and the remedy; None: nothing."""
    if CHROMIUM is None:
        return "Chromium is not installed (`make browser`)"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (`make browser`)"
    return None


@dataclass(frozen=True)
class RunningDemo:
    """A demo that answers at `url`, the process behind it, and the file that has what it printed."""

    url: str
    process: subprocess.Popen
    log: Path

    def memory(self) -> int:
        """Bytes of main memory that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])


@contextmanager
def running_demo(log: Path, *options: str, **environment: str) -> Iterator[RunningDemo]:
    """Starts `demo/app.py` with `options` on a free port, waits until it answers, and ends it afterwards.

    Raises:
        RuntimeError: when it ends, or has not answered after `START_SECONDS`; with what it printed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, str(APP), "--server-name", "127.0.0.1", "--server-port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                end = "does not answer" if process.poll() is None else f"ended with {process.returncode}"
                raise RuntimeError(f"{' '.join(command)} {end}:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        yield RunningDemo(url, process, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    """Whether a web server answers at `url`."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status == 200
    except OSError:
        return False


@contextmanager
def chromium() -> "Iterator[Browser]":
    """Headless Chromium of the system, without its own calls home."""
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield browser
        finally:
            browser.close()


def watch(page: "Page") -> list[str]:
    """A list that grows by every error that a visitor could see in the browser's tools.

    These are errors on the console, uncaught exceptions, answers of 400 and above, requests that fail, and requests to
    any other machine. A request that the page itself gives up, as a stream of events when a run is stopped, is none.
    """
    host = None
    problems: list[str] = []

    def check_address(request):
        nonlocal host
        address = urlsplit(request.url)
        if address.scheme in ("http", "https", "ws", "wss"):
            host = host or address.netloc
            if address.netloc != host:
                problems.append(f"request to another machine: {request.url}")

    def check_failure(request):
        if request.failure != "net::ERR_ABORTED":
            problems.append(f"{request.failure}: {request.url}")

    page.on("request", check_address)
    page.on("requestfailed", check_failure)
    page.on("response", lambda it: problems.append(f"{it.status}: {it.url}") if it.status >= 400 else None)
    page.on("console", lambda it: problems.append(f"console: {it.text}") if it.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
    return problems


# What a new run has not drawn over yet is marked, lest the end of the run before it be taken for its own.
MARK = "() => document.querySelectorAll('.result').forEach(result => result.dataset.old = '')"
SETTLED = """columns => !document.querySelector('#draw').disabled && [...columns].every(column => [
    'done', 'stopped', 'failed'
].includes(document.querySelector(`#pictures-${column} .result:not([data-old])`)?.dataset.status))"""


class Visitor:
    """What a person does with the page, and what there is to see. Columns are "a" to "d"."""

    def __init__(self, page: "Page", url: str):
        self.page = page
        page.goto(url)
        page.locator("body[data-ready]").wait_for()

    def click(self, button: str) -> None:
        """Clicks the button of this name."""
        self.page.get_by_role("button", name=button, exact=True).click()

    def start(self, button: str = "Draw") -> None:
        """Clicks a button that draws."""
        self.page.evaluate(MARK)
        self.click(button)

    def field(self, label: str, column: str | None = None) -> "Locator":
        """The field of this label, in a column or in the bar that all columns share."""
        place = self.page.locator(f"#column-{column}" if column else "#bar")
        return place.get_by_label(label, exact=True).first

    def value(self, label: str, column: str | None = None) -> str:
        """What stands in a field."""
        return self.field(label, column).input_value()

    def fill(self, label: str, value: object, column: str | None = None) -> None:
        """Writes into a field and leaves it. A dropdown takes what is written, whether its list has it or not."""
        field = self.field(label, column)
        field.fill(str(value))
        field.press("Enter")
        field.press("Tab")

    def open_tab(self, name: str) -> None:
        """Shows a tab below the columns."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.page.get_by_role("tab", name=name, exact=True, selected=True).wait_for()

    def draw(self, columns: str = "ab") -> None:
        """Clicks Draw and waits until these columns have ended."""
        self.start()
        self.wait_until_settled(columns)

    def wait_for_pictures(self, column: str = "a") -> None:
        """Waits for the first previews of a run that has been asked for."""
        bar = "[role=progressbar]:not([aria-valuenow='0'])"  # before its first step a column shows its noise
        self.page.locator(f"#pictures-{column} [data-status=drawing]:not([data-old]) {bar}").wait_for()

    def wait_until_settled(self, columns: str = "ab", seconds: float = 60) -> None:
        """Waits until these columns are done, stopped or failed, and the page takes the next run."""
        self.page.wait_for_function(SETTLED, arg=columns, timeout=1000 * seconds)

    def status(self, column: str) -> str:
        """The state of a column, as of comparison.ColumnState."""
        return self.page.locator(f"#pictures-{column} .result").get_attribute("data-status")

    def pictures(self, column: str) -> list[str]:
        """The images of a column as data URIs."""
        return self.page.locator(f"#pictures-{column} img").evaluate_all("images => images.map(image => image.src)")
