"""A contender's process from outside: asked by JSON lines, ended with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fedkd
from fedkd.errors import ConfigError, RunError

PATIENCE = 1800.0
"""Seconds that a process has for one answer."""
LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Child:
    """One process of ``fedkd.bench.child``; ``born`` is when it was started.

    Raises:
        ConfigError: (any method) it answered that it was given bad input.
        RunError: it answered with another error, died, or does not answer.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        # What one terminal or CI happens to set must not decide how fast a contender is.
        environment = {k: v for k, v in os.environ.items() if k not in LIMITS}
        root = str(Path(fedkd.__file__).parent.parent)
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([root, *([inherited] if inherited else [])])
        with log.open("ab") as errors:
            self.born = time.perf_counter()
            # A group of its own: then all of it can be ended, and Ctrl-C is ours alone.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedkd.bench.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and return the answer."""
        answer: dict[str, Any] = json.loads(
            self.ask_line(json.dumps({"do": do, **arguments}).encode())
        )
        if "error" in answer:
            kind = ConfigError if answer.get("bad_input") else RunError
            raise kind(without_paths(str(answer["error"])))
        return answer

    def ask_line(self, request: bytes) -> bytes:
        """Send one line and return that which answers it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        line = b""
        # A process that died closes its ends: that is told by what it does not answer.
        with contextlib.suppress(BrokenPipeError):
            stdin.write(request + b"\n")
            stdin.flush()
            ready, _, _ = select.select([stdout], [], [], PATIENCE)
            if not ready:
                self.kill()
                raise RunError(f"no answer in {PATIENCE:.0f} s")
            line = stdout.readline()
        if not line:
            code = self._process.wait()
            raise RunError(f"the process ended with exit code {code}; {self._last_words()}")
        return line

    def close(self) -> float:
        """End it in good order; return the seconds until the process was gone."""
        start = time.perf_counter()
        try:
            self.ask("close")
            self._process.wait(timeout=PATIENCE)
        finally:
            self.kill()
        return time.perf_counter() - start

    def kill(self) -> None:
        """End it, and what it has started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for end in (self._process.stdin, self._process.stdout):
            if end is not None:
                with contextlib.suppress(BrokenPipeError):
                    end.close()

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return without_paths(said[-1][:300]) if said else "it said nothing"


def without_paths(text: str) -> str:
    """Return a message without folders of this machine: results are published.

    >>> without_paths("no file /usr/lib/x.so in 3/4 of 5")
    'no file x.so in 3/4 of 5'
    """
    return re.sub(r"(?<![\w.])(?:/[\w.+~-]+)+/([\w.+~-]+)", r"\1", text)
