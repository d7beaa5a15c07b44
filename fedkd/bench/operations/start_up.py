"""How long one waits: for the help, and for the first round of the quick start."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fedkd
from fedkd.bench.operations.base import Operations
from fedkd.bench.registries import operations
from fedkd.errors import RunError

PATIENCE = 300.0


@operations.register("start-up")
class StartUp(Operations):
    """Seconds from a command to what is asked for: the help; round 1 of the quick start."""

    title = "from the command to what is asked for"
    unit = "command"
    reference = "python -c pass"

    def start(self, source: str, seed: int) -> None:
        package = Path(fedkd.__file__).parent
        places = (package / "_share", package.parent)
        files = [place / "experiments" / "quickstart.toml" for place in places]
        found = [file for file in files if file.is_file()]
        if not found:
            raise RunError("the quick start's file experiments/quickstart.toml is not here")
        self.file = found[0]

    def steps(self) -> dict[str, Callable[[], None]]:
        return {
            "python -c pass": partial(self._wait, "-c", "pass"),
            "fedkd --help": partial(self._wait, "-m", "fedkd", "--help"),
            "quick start, round 1": self._first_round,
        }

    def facts(self) -> dict[str, Any]:
        return {"file": self.file.name}

    def _wait(self, *words: str) -> None:
        subprocess.run([sys.executable, *words], check=True, capture_output=True, timeout=PATIENCE)

    def _first_round(self) -> None:
        """Start the quick start and return when its first round is written down."""
        with tempfile.TemporaryDirectory(prefix="fedkd-bench-") as folder:
            out = Path(folder) / "out"
            words = ("-m", "fedkd", "run", str(self.file), "--quiet", "--out", str(out))
            process = subprocess.Popen(
                [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                end = time.perf_counter() + PATIENCE
                while not _written(out):
                    if process.poll() is not None or time.perf_counter() > end:
                        raise RunError("the quick start did not come to its first round")
                    time.sleep(0.01)
            finally:
                process.kill()
                process.wait()


def _written(out: Path) -> bool:
    """Return whether a round is in some run's records."""
    return any('"round": 1' in f.read_text(encoding="utf-8") for f in out.rglob("metrics.jsonl"))
