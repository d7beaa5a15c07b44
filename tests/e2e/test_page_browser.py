"""The report in a real browser: drawn, linked, readable, and silent on the network."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedkd.axes import Sweep
from fedkd.report import measures, page
from fedkd.report.collection import RATIO, collect
from fedkd.report.page.parts import Status
from fedkd.report.sweep_figures import draw
from fedkd.report.sweep_tables import tables
from fedkd.sweep.run import run_sweep

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
)
# The browser reads commands from descriptor 3 and answers on 4.
LAUNCHER = (
    "import os, sys; a, b = map(int, sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)
EVIL = "<script>document.title='taken'</script>\"'&</style>"


class Browser:
    """One page of a headless Chromium, spoken to over a pipe."""

    def __init__(self, profile: Path) -> None:
        (reads, answers), (commands, writes) = os.pipe(), os.pipe()
        # Above 4, so that putting them at 3 and 4 overwrites neither.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands, answers)]
        for fd in (commands, answers):
            os.close(fd)
        self._reads, self._writes, self._rest, self._id = reads, writes, b"", 0
        self.events: list[dict[str, Any]] = []
        words = [sys.executable, "-c", LAUNCHER, *map(str, theirs), str(CHROMIUM), *FLAGS]
        self._process = subprocess.Popen(
            [*words, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in theirs:
            os.close(fd)
        self._session = ""
        targets = self("Target.getTargets")["targetInfos"]
        page_id = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self("Target.attachToTarget", targetId=page_id, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self, seconds: float = 60.0) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reads], [], [], seconds)
            assert ready, "the browser does not answer"
            got = os.read(self._reads, 1 << 20)
            assert got, "the browser is gone"
            self._rest += got
        head, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(head)
        return answer

    def open(self, file: Path | str, width: int, dark: bool = False) -> None:
        """Load a file or an address at a width, and wait until it is there."""
        scheme = "dark" if dark else "light"
        self("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ])  # fmt: skip
        self.resize(width)
        self("Page.navigate", url="about:blank")
        self.events.clear()
        self("Page.navigate", url=file if isinstance(file, str) else file.as_uri())
        for _ in range(200):
            if self.js("document.readyState") == "complete" and self.js("location.protocol") != (
                "about:"
            ):
                return
            time.sleep(0.05)
        raise AssertionError("the page does not finish loading")

    def resize(self, width: int, height: int = 900) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height,
             deviceScaleFactor=1, mobile=False)  # fmt: skip

    def js(self, expression: str) -> Any:
        """Evaluate an expression in the page and return its value."""
        done = self("Runtime.evaluate", expression=expression, returnByValue=True,
                    awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def screenshot(self, file: Path, full: bool = True) -> None:
        shot = self("Page.captureScreenshot", captureBeyondViewport=full)
        file.write_bytes(base64.b64decode(shot["data"]))

    def problems(self) -> list[str]:
        """What the page complained about: exceptions, refused scripts or styles, failed loads."""
        self.js("new Promise(done => setTimeout(done, 50))")
        return [
            json.dumps(e["params"])[:300]
            for e in self.events
            if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
        ]

    def requests(self) -> list[str]:
        """Every address that was asked for, data inside the page apart."""
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [str(e["params"]["request"]["url"]) for e in asked]
        return [url for url in urls if not url.startswith(("data:", "about:"))]

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self._session = ""
            self("Browser.close")
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for fd in (self._reads, self._writes):
            os.close(fd)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> page.PageContent:
    """What the report of a small sweep says, one of whose labels is a script."""
    folder = tmp_path_factory.mktemp("sweep")
    base = tiny("fedavg", {"engine.executor": "auto", "seeds": [0, 1], "name": "small"})
    sweep = Sweep(grid={RATIO: [0.5, 1.0]})
    compare = {EVIL: {"strategy": "fedprox"}}
    assert not run_sweep(replace(base, sweep=sweep, compare=compare), folder / "runs").errors
    collection = collect([folder / "runs"])
    target = measures.default_target(collection)
    drawn = draw(collection, target, folder)
    commands = ["fedkd sweep small.toml", EVIL]
    return page.content(collection, tables(collection, target), drawn, commands, target)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, content: page.PageContent) -> Path:
    return page.write(page.render(content), tmp_path_factory.mktemp("page") / "report.html")


FIGURES = """[...document.querySelectorAll('figure svg, figure img, .chart svg')].map(e => {
  const box = e.getBoundingClientRect();
  const shapes = e.tagName === 'IMG' ? e.naturalWidth : e.querySelectorAll('path,rect,text').length;
  return [e.closest('figure,.chart').id, box.width, box.height, shapes];
})"""
BROKEN = """[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))
  .filter(h => !h.startsWith('#') || !document.getElementById(h.slice(1)))"""
INNER = """[...document.querySelectorAll('svg *')].flatMap(e => [...e.attributes]).flatMap(a =>
  [...a.value.matchAll(/url\\(#([^)]*)\\)/g)].map(m => m[1])
  .concat(a.localName === 'href' && a.value.startsWith('#') ? [a.value.slice(1)] : []))
  .filter(id => !document.getElementById(id))"""
TWICE = """(() => { const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  return ids.filter((id, i) => ids.indexOf(id) !== i); })()"""


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_everything_is_drawn_linked_and_silent(browser, report, width, dark):
    browser.open(report, width, dark)
    drawn = browser.js(FIGURES)
    assert len(drawn) >= 8
    assert [f for f in drawn if f[1] < 120 or f[2] < 60 or f[3] < 3] == []
    assert browser.js(BROKEN) == [] and browser.js(INNER) == [] and browser.js(TWICE) == []
    assert browser.js("document.documentElement.scrollWidth - innerWidth") <= 0
    assert browser.requests() == [report.as_uri()]
    assert browser.problems() == []
    ink, paper = browser.js(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ink, paper)]
    assert (bright[0] > 0.8 and bright[1] < 0.2) if dark else (bright[0] < 0.2 and bright[1] > 0.8)


def test_labels_that_are_scripts_stay_text(browser, report):
    browser.open(report, 1600)
    assert browser.js("document.title") == "small"
    assert browser.js(f"document.body.innerText.includes({json.dumps(EVIL)})")
    assert EVIL not in report.read_text(encoding="utf-8")


def test_the_policy_refuses_what_is_not_the_pages_own(browser, report):
    browser.open(report, 800)
    tried = browser.js("fetch('https://example.org/').then(() => 'let through', () => 'refused')")
    assert tried == "refused"
    browser.js(
        "{const s = document.createElement('script'); s.textContent = 'window.taken = 1';"
        "document.body.append(s)}"
    )
    assert browser.js("window.taken === undefined")


def test_tables_sort_series_stand_out_and_the_theme_turns(browser, report):
    browser.open(report, 1600)
    rows = "[...document.querySelectorAll('#table-headline tbody tr')]"
    column = f"{rows}.map(r => r.cells[2].dataset.key)"
    head = "document.querySelectorAll('#table-headline thead button')[2]"
    browser.js(f"{head}.click()")
    first = [float(v) for v in browser.js(column)]
    browser.js(f"{head}.click()")
    second = [float(v) for v in browser.js(column)]
    assert first == sorted(first, reverse=True) and second == sorted(first)
    assert browser.js(f"{head}.parentElement.getAttribute('aria-sort')") == "ascending"
    faded = browser.js(
        """(async () => { const svg = document.querySelector('#accuracy figure svg');
        svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
        await new Promise(done => setTimeout(done, 300));
        return [...svg.querySelectorAll('[data-series]')].map(e =>
          [e.dataset.series, Number(getComputedStyle(e).opacity)]); })()"""
    )
    assert {o < 0.5 for s, o in faded if s == faded[0][0]} == {False}
    assert {o < 0.5 for s, o in faded if s != faded[0][0]} == {True}
    browser.js("document.getElementById('theme').click()")
    assert browser.js("document.documentElement.dataset.theme") == "dark"


def test_every_client_of_every_run_can_be_looked_at(browser, report):
    browser.open(report, 1600)
    choices = browser.js(
        "['label', 'point', 'seed', 'client'].map(k => document.getElementById('drill-' + k)"
        ".options.length)"
    )
    assert choices == [2, 2, 2, 4]
    browser.js("document.querySelector('#drill-clients tbody tr[data-client=\"3\"]').click()")
    assert browser.js("document.getElementById('drill-title').textContent") == "Client 3"
    before = browser.js("document.querySelector('#drill-chart .one').getAttribute('d')")
    browser.js(
        "{const s = document.getElementById('drill-seed'); s.value = '1';"
        "s.dispatchEvent(new Event('change'))}"
    )
    assert browser.js("document.getElementById('drill-title').textContent") == "Client 3"
    assert browser.js("document.querySelector('#drill-chart .one').getAttribute('d')") != before


class Served(BaseHTTPRequestHandler):
    """A live page whose second version has another subtitle and one more failed run."""

    content: page.PageContent
    version = "1"
    refused: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        news = Status(1, 0, 0, int(self.version), reasons=(EVIL,))
        live = replace(self.content, live=page.Live(token="secret", seconds=0.1), status=news)
        if self.path != "/" and self.headers.get("Authorization") != "Bearer secret":
            self.refused.append(self.path)
        texts = {
            "/": page.render,
            "/main": page.render_main,
            "/state": lambda _: json.dumps({"version": self.version}),
        }
        text = texts[self.path](live).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        return


def test_a_live_page_takes_what_is_new_and_keeps_its_place(browser, content):
    handler = type("Now", (Served,), {"content": content, "refused": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    failed = "document.querySelector('.status .bad').textContent"
    try:
        browser.open(f"http://127.0.0.1:{server.server_port}/", 1600)
        browser.js("document.querySelector('main').first = 1")
        browser.js(
            "page.choose({label: '1', point: '1', seed: '1', client: '2'});"
            "document.querySelector('#table-headline thead button').click();"
            "document.getElementById('failures').open = true; window.scrollTo(0, 700)"
        )
        handler.version = "2"
        for _ in range(100):
            if browser.js(failed) == "2":
                break
            time.sleep(0.1)
        assert browser.js(failed) == "2" and not browser.js("document.querySelector('main').first")
        kept = browser.js(
            "[...['label', 'point', 'seed', 'client'].map(k => "
            "document.getElementById('drill-' + k).value), scrollY,"
            "document.getElementById('failures').open,"
            "document.querySelector('#table-headline table').dataset.sorted]"
        )
        assert kept == ["1", "1", "1", "2", 700, True, "0 ascending"]
        assert handler.refused == [] and browser.problems() == []
        assert {url.split("/")[2] for url in browser.requests()} == {
            f"127.0.0.1:{server.server_port}"
        }
    finally:
        # Nothing asks a server that is gone.
        browser("Page.navigate", url="about:blank")
        server.shutdown()
        server.server_close()
