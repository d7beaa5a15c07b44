"""``fedkd simulate``: somebody's Flower app as it is, in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from fedkd.cli.places import next_free
from fedkd.engine.flower_project import FlowerProject, read_project
from fedkd.engine.flower_run import APP, Exchange, run_app
from fedkd.errors import ConfigError

NODES = 10
"""Nodes where nobody says how many."""
SHOWN = 3
"""Metrics in a line of progress."""


def simulate(
    path: Path,
    *,
    nodes: int | None,
    run_config: Sequence[str],
    executor: str,
    workers: int | None,
    seed: int,
    out: Path | None,
    quiet: bool,
    verbose: bool,
    workspace: Path,
) -> int:
    """Run the app in a folder and return the exit code.

    Raises:
        ConfigError: there is no app, it cannot be imported, or an option is wrong.
        RunError: the app failed.
    """
    project = read_project(path)
    config = project.configured(run_config)
    folder = out or next_free(workspace, project.name)
    if (folder / APP).exists():
        raise ConfigError(f"{folder} has the records of another run: give another --out")
    count, why = size(project, nodes)

    def note(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)
            sys.stderr.flush()

    note(f"{project.name}: {count} nodes ({why}), executor {executor}; records go to {folder}")
    result = run_app(
        project,
        folder,
        nodes=count,
        config=config,
        executor=executor,
        workers=workers,
        seed=seed,
        verbose=verbose,
        say=lambda exchange: note(line(exchange)),
    )
    down, up = (result.ledger.totals(direction=way) for way in ("down", "up"))
    lost = len(result.failures)
    click.echo(
        f"{project.name}: {down.messages} messages to {count} nodes in {result.seconds:.2f} s, "
        f"{f'{lost} without an answer, see failures.jsonl' if lost else 'all answered'}; "
        f"{amount(down.wire)} down, {amount(up.wire)} up; records: {folder}"
    )
    return 1 if lost and not up.messages else 0


def size(project: FlowerProject, asked: int | None) -> tuple[int, str]:
    """Return how many nodes there are, and who says so."""
    if asked is not None:
        return asked, "--nodes"
    if project.nodes is not None:
        return project.nodes, "its pyproject.toml"
    return NODES, "by default; --nodes N for another number"


def line(exchange: Exchange) -> str:
    """Return an exchange as a line of progress."""
    shown = [f"{k} {v:.4g}" for k, v in sorted(exchange.means.items()) if v is not None][:SHOWN]
    parts = [
        f"round {exchange.round}" if exchange.round else "no round",
        exchange.phase,
        f"{exchange.answered} of {exchange.sent} answered",
        f"{exchange.seconds:.2f} s",
        f"{amount(exchange.down)} down, {amount(exchange.up)} up",
        *shown,
    ]
    return "  ".join(parts)


def amount(size: float) -> str:
    """Return bytes for people.

    >>> amount(999), amount(2_500_000)
    ('999 B', '2.5 MB')
    """
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
