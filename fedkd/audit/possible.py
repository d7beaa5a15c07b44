"""What of an audit cannot be done, found before hours of training and not after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fedkd.audit.finished import Finished
from fedkd.audit.students import student_parts
from fedkd.config import Experiment
from fedkd.engine.setup import Prepared, prepare
from fedkd.errors import ConfigError, DataError
from fedkd.privacy.auditing.options import Audit
from fedkd.privacy.exposure import FEWEST
from fedkd.rng import stream


def check(experiment: Experiment) -> None:
    """Build the parts of a run and of its audit.

    Raises:
        ConfigError: all that is impossible with them.
    """
    problems = list(impossible(prepare(experiment), experiment.audit))
    if problems:
        raise ConfigError("\n".join(problems))


def impossible(prepared: Prepared, audit: Audit) -> Iterator[str]:
    """Give why an audit of a run of these parts would be refused."""
    experiment = prepared.experiment
    canaries, clients = experiment.canaries, experiment.canaries.random_clients
    if clients == 1:
        yield "canaries.random_clients = 1: a spread needs at least 2 canary clients; set it to 100"
    if clients and audit.delta == 0:
        yield "audit.delta = 0 has no one-shot audit: set audit.delta = 1e-5, or random_clients = 0"
    if canaries.kind == "none":
        return
    if canaries.references < FEWEST:
        yield (
            f"canaries.references = {canaries.references} are too few to rank canaries among; set "
            f"at least {FEWEST}, such as 1000"
        )
    setting = prepared.setting
    state = prepared.strategy.init(setting, stream(setting.seed, "server", "init"))
    begun = Finished(Path(), prepared, 0, state, {}, {})
    if audit.estimator == "exact":
        yield from _refused(lambda: begun.space)
    if "student" not in audit.on or not audit.students:
        return
    if begun.teacher() is None:
        yield (
            f"audit.students: strategy {experiment.strategy.name!r} has no global network to learn "
            "from; use one that averages whole networks, or set audit.students = {}"
        )
    for name, student in audit.students.items():
        yield from _refused(partial(student_parts, begun, name, student))


def _refused(attempt: Callable[[], object]) -> Iterator[str]:
    try:
        attempt()
    except (ConfigError, DataError) as error:
        yield str(error)
