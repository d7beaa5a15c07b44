"""The wheel stands alone: commands, presets, cards and the quickstart work outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def call(*command: str | Path, cwd: Path, site: Path | None = None) -> str:
    """Run a command that sees the wheel's contents before anything else, and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(site)} if site else None
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel, built from the checkout and installed without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    python = (sys.executable, "-m")
    call(*python, "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("fedkd-*.whl")
    installed = folder / "site"
    install = ("pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel)
    call(*python, *install, cwd=folder)
    return installed


@pytest.fixture
def fedkd(site, tmp_path):
    """The installed command, in an empty folder."""
    return lambda *words: call(site / "bin" / "fedkd", *words, cwd=tmp_path, site=site)


def test_nothing_generic_is_installed(site):
    found = {path.name for path in site.iterdir()}
    assert {name for name in found if not name.startswith("fedkd")} == {"bin"}


def test_it_is_the_wheel_that_answers(site, tmp_path):
    found = call(
        sys.executable, "-c", "import fedkd; print(fedkd.__file__)", cwd=tmp_path, site=site
    )
    assert Path(found.strip()) == site / "fedkd" / "__init__.py"


def test_help_list_and_show(fedkd):
    assert "run" in fedkd("--help")
    listed = fedkd("list")
    assert "fedd2s" in listed and "cross-device" in listed and "local-only-ls" in listed
    shown = fedkd("show", "fedd2s")
    assert "temperature" in shown and "reconstruction" in shown and "What travels" in shown


def test_a_preset_runs(fedkd, tmp_path):
    tiny = ("rounds=1", "clients=few", "model=mlp", "strategy=fedd2s-output", "privacy=none")
    printed = fedkd("run", *tiny, "--out", "results")
    assert "results" in printed
    assert (tmp_path / "results" / "summary.json").is_file()
    assert (tmp_path / "results" / "plots").is_dir()
