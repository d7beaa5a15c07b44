"""Which options are tried next: all of them where they are few, else what Optuna asks for.

What is asked for follows from the seed, the label and the scores so far, so a search that was
interrupted is gone through again from finished runs and comes to the same place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from fedkd.axes import Table, Tune
from fedkd.errors import ConfigError
from fedkd.rng import Rng, stream
from fedkd.sweep.space import Dimension, combination, size

STARTUP = 4
"""Random trials before TPE learns: budgets are small, and Optuna's 10 would be all of them."""


class Search(Protocol):
    """Asked for one trial after the other, and told what each was worth."""

    method: str
    trials: int

    def ask(self) -> Table:
        """Return the next options."""
        ...

    def tell(self, validation: float | None) -> None:
        """Take note of the accuracy of what was asked for last; None: it failed."""
        ...


class Listed:
    """Combinations in random order, each once: all, or as many as there are trials."""

    method = "grid"

    def __init__(self, space: Sequence[Dimension], trials: int, rng: Rng) -> None:
        count = size(space)
        if count is None:
            raise ConfigError("a real range has no end")
        self.trials = min(trials, count)
        drawn = rng.numpy().choice(count, self.trials, replace=False)
        self._left = iter([combination(space, int(i)) for i in drawn])

    def ask(self) -> Table:
        return next(self._left)

    def tell(self, validation: float | None) -> None:
        """Learn nothing."""


class Sampled:
    """Optuna's random or TPE sampler (Bergstra et al., NeurIPS 2011), in memory.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, space: Sequence[Dimension], method: str, trials: int, rng: Rng) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                f"sweep.tune.method = {method!r} needs Optuna: pip install 'fedkd[tune]', or set "
                "it to 'grid', with lists or steps as space"
            ) from None
        self.method, self.trials, self._space = method, trials, space
        seed = rng.key % 2**32
        with _quiet():
            sampler = (
                optuna.samplers.RandomSampler(seed)
                if method == "random"
                else optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
            )
            self._study = optuna.create_study(direction="maximize", sampler=sampler)
            self._asked: Any = None

    def ask(self) -> Table:
        with _quiet():
            self._asked = self._study.ask({d.key: d.distribution() for d in self._space})
        drawn = self._asked.params
        return {d.key: d.value(drawn[d.key]) for d in self._space}

    def tell(self, validation: float | None) -> None:
        from optuna.trial import TrialState

        with _quiet():
            if validation is None:
                self._study.tell(self._asked, state=TrialState.FAIL)
            else:
                self._study.tell(self._asked, validation)


def search(tune: Tune, label: str, space: Sequence[Dimension]) -> Search:
    """Return how a label is searched: one stream of its own, so labels do not see each other.

    A space of no more combinations than there are trials is gone through, each once.

    Raises:
        ConfigError: a grid over a real range, or Optuna is needed and not installed.
    """
    rng, count = stream(tune.seed, "tune", label), size(space)
    if tune.method == "grid" and count is None:
        endless = next(d.key for d in space if d.count is None)
        raise ConfigError(
            f"sweep.tune.method = 'grid' with a real range for {endless}: give it a list or a "
            "step, or set the method to 'tpe' or 'random'"
        )
    if tune.method == "grid" or (count is not None and count <= tune.trials):
        return Listed(space, tune.trials, rng)
    return Sampled(space, tune.method, tune.trials, rng)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from announcing studies and from warning of what is experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
