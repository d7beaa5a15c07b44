"""``fedkd watch`` as a process of its own beside a run that is under way."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import fedkd
from fedkd.config import Experiment
from fedkd.engine.simulation import run

Tiny = Callable[..., Experiment]
PROGRAM = """
import sys
from pathlib import Path
from fedkd.cli.watch import watch
sys.exit(watch([Path(sys.argv[1])], 0, Path()))
"""


class Browser:
    """Keeps the cookie that the printed address gives."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.cookie = parts.netloc, ""
        status, headers, _ = self.ask(f"/?{parts.query}")
        assert status == 303
        self.cookie = headers["Set-Cookie"].split(";")[0]

    def ask(self, path: str) -> tuple[int, http.client.HTTPMessage, str]:
        line = http.client.HTTPConnection(self.host, timeout=10)
        line.request("GET", path, headers={"Cookie": self.cookie} if self.cookie else {})
        answer = line.getresponse()
        found = answer.status, answer.headers, answer.read().decode()
        line.close()
        return found

    def until(self, held: Callable[[str], bool], seconds: float = 240) -> str:
        """Return the page's main once ``held`` is true of it."""
        end = time.monotonic() + seconds
        while True:
            main = self.ask("/main")[2]
            if held(main):
                return main
            assert time.monotonic() < end, main[:2000]
            time.sleep(0.2)


@contextmanager
def watching(folder: Path, aside: Path) -> Iterator[tuple[Browser, "subprocess.Popen[str]"]]:
    aside.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(aside),
            "PYTHONPATH": str(Path(fedkd.__file__).parents[1]),
        },
    )
    assert process.stdout
    try:
        yield Browser(process.stdout.readline().strip()), process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


class StopAfter:
    def __init__(self, round_: int) -> None:
        self.round = round_

    def started(self, experiment: object, first_round: int) -> None:
        pass

    def finished_round(self, round_: int, log: object, failures: object) -> None:
        if round_ == self.round:
            raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def counts(browser: Browser) -> dict[str, int]:
    found: dict[str, int] = json.loads(browser.ask("/state")[2])["runs"]
    return found


def test_a_page_follows_its_run(tiny: Tiny, tmp_path: Path) -> None:
    experiment = tiny("fedavg", {"rounds": 3, "engine.checkpoint_every": 1})
    folder, aside = tmp_path / "run", tmp_path / "aside"
    with pytest.raises(KeyboardInterrupt):
        run(experiment, folder, watcher=StopAfter(2))
    with watching(folder, aside) as (browser, process):
        browser.until(lambda main: "round 2 of 3" in main)
        assert counts(browser)["finished"] == 0
        before = json.loads(browser.ask("/state")[2])["version"]

        # Half a line in the middle of the values: the page stays and says so.
        metrics = folder / "metrics.jsonl"
        whole = metrics.read_bytes()
        metrics.write_bytes(whole[: len(whole) // 2] + b"\n" + whole[len(whole) // 2 :])
        damaged = browser.until(lambda main: "could not be brought up to date" in main)
        assert "is damaged" in damaged
        assert "round 2 of 3" in damaged
        metrics.write_bytes(whole)

        run(experiment, folder, resume=True)
        written = contents(folder)
        last = browser.until(lambda main: "<strong>1</strong> finished" in main)
        assert "<svg" in last
        assert counts(browser) == {"finished": 1, "running": 0, "waiting": 0, "failed": 0}
        assert json.loads(browser.ask("/state")[2])["version"] != before
        assert last in browser.ask("/")[2]
        assert contents(folder) == written, "watching has changed the folder"
        ended(process, signal.SIGTERM, aside)


def test_a_folder_in_which_nothing_has_begun(tmp_path: Path) -> None:
    folder, aside = tmp_path / "run", tmp_path / "aside"
    folder.mkdir()
    with watching(folder, aside) as (browser, process):
        browser.until(lambda main: "There is nothing to show yet" in main)
        assert browser.ask("/nothing")[0] == 404
        assert list(folder.iterdir()) == []
        ended(process, signal.SIGINT, aside)


def ended(process: "subprocess.Popen[str]", sign: signal.Signals, aside: Path) -> None:
    process.send_signal(sign)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == ""
    assert err.splitlines()[-1] == "stopped watching; runs under way go on"
    assert "Traceback" not in err
    assert list(aside.iterdir()) == [], "something that was drawn is still there"
