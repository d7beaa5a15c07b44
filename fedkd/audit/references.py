"""Reference runs: the same experiment with other seeds, so with other coins for the same canaries.

They are whole runs in folders of their own, named by the hash of what they follow from: nothing is
run twice, neither after an interruption nor for another audit of the same experiment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from fedkd.audit.finished import Finished
from fedkd.config import Experiment
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import resolve
from fedkd.engine.simulation import Watcher, run
from fedkd.privacy.auditing.options import Audit


class AuditWatcher(Watcher, Protocol):
    """Is told of what an audit does, as well as of the rounds of the runs that it needs."""

    def doing(self, what: str) -> None:
        """Take note of the next step, in words."""


def reference_seeds(seed: int, count: int) -> list[int]:
    """Return the seeds of the reference runs of a run: the first numbers that are not its own.

    So runs of the seeds 0, 1, 2 of a comparison serve each other.

    >>> reference_seeds(1, 3)
    [0, 2, 3]
    """
    return [s for s in range(count + 1) if s != seed][:count]


def reference_runs(
    experiment: Experiment,
    audit: Audit,
    cache: Path,
    known: Mapping[str, Path],
    watcher: AuditWatcher | None = None,
) -> list[Finished]:
    """Return the reference runs, run where they are not yet; ``known`` are folders by digest.

    Raises:
        ConfigError, RunError: as a run raises them.
    """
    found = []
    for seed in reference_seeds(experiment.seed, audit.reference_models):
        other = resolve(replace(experiment, seed=seed))
        folder = known.get(other.digest(), cache / other.digest())
        if RunFolder(folder).summary() is None:
            if watcher is not None:
                watcher.doing(f"reference run with seed {seed}")
            run(other, folder, resume=RunFolder(folder).exists(), watcher=watcher)
        finished = Finished.load(folder)
        finished.check()
        found.append(finished)
    return found
