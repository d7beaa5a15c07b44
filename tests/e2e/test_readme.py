"""The README is true: its Python runs, its set-up is what CI does, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from fedkd.cli.commands import app
from fedkd.cli.places import read
from fedkd.config import load
from fedkd.data.registries import partitions
from fedkd.engine.setup import prepare
from fedkd.engine.simulation import run
from fedkd.strategies.base import strategies

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("docs", "strategies", "clients", "privacy", "experiments")
PAGES = [*ROOT.glob("*.md"), *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


INSTALL_AND_RUN, INSTALL_AND_TEST, *OTHERS = (block.strip() for block in blocks("bash"))
COMMANDS = [shlex.split(line, comments=True)[1:] for block in OTHERS for line in block.splitlines()]
FROM_PYTHON, FLOWER_APP, OWN_STRATEGY = blocks("python")


def run_python(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def fedkd(folder: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedkd", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_ci_sets_up_by_the_commands_of_the_readme_word_for_word():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines.index(INSTALL_AND_RUN) < lines.index(INSTALL_AND_TEST)


def test_the_quickstart_is_what_the_readme_says():
    experiment = load(ROOT / "experiments" / "quickstart.toml")
    assert experiment.data.source.name == "digits"
    assert (experiment.clients.count, experiment.data.partition.options["alpha"]) == (20, 0.1)
    compared = [cell.experiment.strategy.name for cell in experiment.cells()]
    assert compared == ["fedd2s", "local-only", "fedavg", "fedavg-ft"]


def test_every_run_of_the_private_example_can_be_played():
    cells = list(load(ROOT / "experiments" / "private.toml").cells())
    plans = {cell.label: prepare(cell.experiment).plan for cell in cells}
    units = {label: plan.options.unit for label, plan in plans.items()}
    assert set(units.values()) == {"none", "client", "example"}
    assert plans["fedavg, epsilon 1"].noise_multiplier > plans["fedavg, epsilon 8"].noise_multiplier


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_everyday_command_is_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *arguments = words
    commands = typer.main.get_command(app).commands
    given = commands[name].make_context(name, list(arguments)).params
    if "arguments" in given:
        assert read(given["arguments"], Path()).clients.count > 0
    if name == "show":
        assert given["name"] in {*strategies.names(), *partitions.names()}


def test_from_python(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    assert len(FROM_PYTHON.strip().splitlines()) < 10
    run_python(FROM_PYTHON.replace("rounds=5", "rounds=1"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 2)[0] for line in printed] == [
        "fedd2s",
        "local-only",
        "fedavg",
        "fedavg + fine-tuning",
    ]
    assert (tmp_path / "runs" / "from-python" / "fedavg" / "seed-0" / "summary.json").is_file()


def test_any_flower_app(capsys):
    run_python(FLOWER_APP)
    # Half way to the mean of 0..9 in each of three rounds: 4.5 (1 - 1/8).
    assert "3.9375" in capsys.readouterr().out


def test_your_own_strategy(tmp_path):
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "fedroot.py").write_text(OWN_STRATEGY, encoding="utf-8")
    tiny = ["rounds=2", "model=mlp", "clients.count=4", "engine.executor=serial"]
    own = ["strategy=fedroot", "strategy.power=1"]
    fedkd(tmp_path, "run", *own, *tiny, "--out", "own", "--quiet")
    found = json.loads((tmp_path / "own" / "summary.json").read_text(encoding="utf-8"))
    expected = run(load(None, ["strategy=fedavg", *tiny]), tmp_path / "fedavg")
    assert found["strategy"] == "fedroot"
    assert found["readouts"]["composite"] == expected["readouts"]["composite"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tests_and_modules_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for file, _, test in re.findall(r"`(tests/[\w/]+\.py)(::(\w+))?`", text):
        assert (ROOT / file).is_file(), file
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
    for file in re.findall(r"`(fedkd/[\w/]+\w\w\.py)`", text):
        assert (ROOT / file).is_file(), file
