"""Kill a run with SIGKILL after each of several rounds, resume it, and compare the final states.

    python experiments/resume/kill.py --after 1 3 5 8 11 strategy=fedd2s

Prints for each kill the SHA-256 over the server's and all clients' final checkpoint files beside
that of a run that was never killed; ends with exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = ("rounds=12", "data.source=digits", "clients.count=20", "clients.training.lr=0.2")


def command(folder: Path, overrides: list[str], *more: str) -> list[str]:
    """Return the command line of a run."""
    start = [sys.executable, "-m", "fedkd", "run", *CONFIG, *overrides]
    return [*start, "--out", str(folder), "--quiet", *more]


def rounds_done(folder: Path) -> int:
    """Return the last round that is written down."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return max((json.loads(x)["round"] for x in lines if x.endswith("}")), default=0)


def state(folder: Path) -> str:
    """Return one hash over the names and bytes of all state files of the last checkpoint."""
    digest = hashlib.sha256()
    for file in sorted((folder / "checkpoint").glob("*.safetensors")):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def records(folder: Path) -> list[str]:
    """Return all records but the seconds."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line)["metric"] != "seconds"]


def main() -> None:
    """Read the command line and run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--after", type=int, nargs="+", default=[1, 3, 5, 8, 11])
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    same = True
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        subprocess.run(command(whole, given.overrides), check=True, stdout=subprocess.DEVNULL)
        files = len(list((whole / "checkpoint").glob("*.safetensors")))
        print(f"never killed: {state(whole)} ({files} state files)")
        for after in given.after:
            folder = Path(temporary) / f"killed-{after}"
            running = subprocess.Popen(command(folder, given.overrides), stdout=subprocess.DEVNULL)
            while running.poll() is None and rounds_done(folder) < after:
                time.sleep(0.01)
            running.send_signal(signal.SIGKILL)
            code, done = running.wait(), rounds_done(folder)
            subprocess.run(
                command(folder, given.overrides, "--resume"), check=True, stdout=subprocess.DEVNULL
            )
            equal = state(folder) == state(whole) and records(folder) == records(whole)
            same = same and equal and code == -signal.SIGKILL
            verdict = "same" if equal else "DIFFERENT"
            print(f"killed in round {done + 1} (exit {code}): {state(folder)} {verdict}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
