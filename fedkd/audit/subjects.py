"""Who is attacked: every network that remembers, with the scores of canaries and references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedkd.audit.finished import Finished
from fedkd.audit.scoring import Scores, score
from fedkd.audit.students import distilled
from fedkd.clients.client import Predictor, personal
from fedkd.clients.judge import judge
from fedkd.data.federated import Split
from fedkd.errors import ConfigError
from fedkd.privacy.auditing.options import Audit


@dataclass(frozen=True, eq=False)
class Group:
    """Canaries (positions) that are judged by one network, with the references' scores there.

    ``space``: the bits of every possible secret, where exposure is to be exact, and ``planted``
    those of all canaries: this network may have seen the others as well, so they do not compete.
    """

    canaries: np.ndarray
    scores: Scores
    references: Scores
    space: np.ndarray | None = None
    planted: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """What one subject says of all canaries, by network, and how good it is.

    ``quality``: accuracy and, of text, bits per character on test data; of personal networks the
    mean over the clients that hold canaries, on their own test examples.
    """

    name: str
    groups: tuple[Group, ...]
    quality: Mapping[str, float | None]

    @property
    def scores(self) -> Scores:
        """The canaries' scores, in their order."""
        order = np.argsort(np.concatenate([g.canaries for g in self.groups]))
        columns = zip(
            *[(g.scores.bits, g.scores.log_p, g.scores.phi, g.scores.rank) for g in self.groups],
            strict=True,
        )
        return Scores(*[np.concatenate(column)[order] for column in columns])


def subjects(run: Finished, audit: Audit, cache: Path) -> list[Subject]:
    """Return all that ``audit.on`` names and this run has: teacher, students, personal networks.

    Raises:
        ConfigError: students are asked for and there is no teacher.
    """
    found = []
    teacher = run.teacher() if {"teacher", "student"} & set(audit.on) else None
    if "teacher" in audit.on and teacher is not None:
        found.append(_subject(run, "teacher", personal(teacher), "personal", audit))
    if "student" in audit.on and audit.students:
        if teacher is None:
            raise ConfigError(
                f"audit.students: strategy {run.prepared.experiment.strategy.name!r} has no global "
                "network to learn from; use one that averages whole networks, or set "
                "audit.students = {}"
            )
        for name, options in audit.students.items():
            network = distilled(run, name, options, teacher, cache)
            found.append(_subject(run, f"student:{name}", personal(network), "personal", audit))
    if "personal" in audit.on:
        found.append(_personal(run, audit))
    return found


def _subject(run: Finished, name: str, predict: Predictor, output: str, audit: Audit) -> Subject:
    everybody = np.arange(len(run.examples))
    group = _group(run, predict, output, everybody, audit, name)
    test = run.prepared.federation.global_test(0)
    return Subject(name, (group,), quality(run, predict, output, test))


def _personal(run: Finished, audit: Audit) -> Subject:
    """Return the personal networks, each judged by the canaries that its client (would) hold."""
    first = np.array([holders[0] for holders in run.canaries.holders])
    if run.prepared.strategy.pooled:
        first[:] = 0
    groups, verdicts = [], []
    for k in np.unique(first):
        predict = run.personal(int(k))
        mine = np.flatnonzero(first == k)
        groups.append(_group(run, predict, run.predict, mine, audit, f"client {k}"))
        test = run.prepared.federation.client(int(k)).test
        verdicts.append(quality(run, predict, run.predict, test))
    mean: dict[str, float | None] = {}
    for key in verdicts[0]:
        values = [value for v in verdicts if (value := v[key]) is not None]
        mean[key] = float(np.mean(values)) if values else None
    return Subject("personal", tuple(groups), mean)


def _group(
    run: Finished, predict: Predictor, output: str, which: np.ndarray, audit: Audit, what: str
) -> Group:
    def scored(examples: Split) -> Scores:
        return score(predict, output, _moved(run, examples), audit.batch_size, what)

    mine = Split(run.examples.x[which], run.examples.y[which])
    group = Group(which, scored(mine), scored(run.references))
    if audit.estimator != "exact":
        return group
    return replace(group, space=scored(run.space).bits, planted=scored(run.examples).bits)


def quality(run: Finished, predict: Predictor, output: str, test: Split) -> dict[str, float | None]:
    """Return accuracy and, of text, bits per character on test examples; None without any."""
    task = run.prepared.setting.task
    verdict = judge(predict, _moved(run, test), task.classes).get(output)
    if verdict is None:
        return {"accuracy": None, "bits_per_character": None}
    bits = verdict.bits_per_character(task.class_names) if task.sequence else None
    return {"accuracy": verdict.accuracy, "bits_per_character": bits}


def _moved(run: Finished, split: Split) -> Split:
    device = run.prepared.device
    return Split(split.x.to(device), split.y.to(device))
