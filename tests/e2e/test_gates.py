"""The gates as tests: format, lint, types and layers hold for the whole checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PYTHON = (sys.executable, "-m")
GATES = {
    "ruff check": (*PYTHON, "ruff", "check", "--no-cache", "--output-format=concise", "."),
    "ruff format": (*PYTHON, "ruff", "format", "--no-cache", "--check", "."),
    "mypy": (*PYTHON, "mypy"),
    "import-linter": (str(Path(sysconfig.get_path("scripts"), "lint-imports")), "--no-cache"),
}


@pytest.mark.parametrize("gate", GATES)
def test_gate(gate):
    done = subprocess.run(GATES[gate], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
