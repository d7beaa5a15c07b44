"""What a result was made with: versions, machine, git commit; for every summary and ``doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("fedkd", "flwr", "torch", "opacus", "numpy", "scipy", "scikit-learn", "safetensors")


def versions() -> dict[str, str]:
    """Return the installed version of each package that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """Return the git commit of our checkout, with ``+`` if it has changes; empty outside of it."""
    place = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(place), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # Installed into some project's virtual environment, that project's commit is not ours.
        if Path(git("rev-parse", "--show-toplevel") or "/") != place.parent:
            return ""
        head = git("rev-parse", "HEAD")
        return head + ("+" if head and git("status", "--porcelain") else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def provenance() -> dict[str, Any]:
    """Return versions, commit and the machine's kind (not its name)."""
    return {
        "versions": versions(),
        "commit": commit(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
    }
