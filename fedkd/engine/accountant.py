"""Our accounting behind Flower's ``PrivacyAccountant`` protocol, for strategies of Flower's own.

Flower ships one accountant, which needs a package that fedkd does not. This one refuses what cannot
be justified instead of amplifying it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, final

from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    PrivacySpent,
    SamplingMethod,
)

from fedkd.errors import CheckpointError, ConfigError, unknown
from fedkd.privacy.accounting import ACCOUNTANTS, History, delta_of, effective, epsilon

VERSION = 1


@final
class FlowerAccountant:
    """Satisfies ``flwr.serverapp.PrivacyAccountant``; accountant ``rdp`` or ``prv``.

    Poisson sampling with add-or-remove-one neighbours is amplified at the rate sample_size /
    population_size. No amplification counts every release in full. Sampling without replacement
    with replace-one neighbours is counted in full too, at half the noise multiplier: replacing a
    client moves a sum of clipped updates by twice the norm, and Opacus knows no amplification for
    such sampling.

    Example: ``DifferentialPrivacyServerSideFixedClipping(..., accountant=FlowerAccountant(c))``.
    """

    def __init__(self, config: PrivacyConfig, accountant: str = "rdp") -> None:
        if accountant not in ACCOUNTANTS:
            raise unknown("accountant", accountant, ACCOUNTANTS)
        self._config = config
        self._accountant = accountant
        self._history = History()
        self._releases = 0

    @property
    def config(self) -> PrivacyConfig:
        """The unit's definition, delta and budget."""
        return self._config

    @property
    def num_releases(self) -> int:
        """How many releases were counted."""
        return self._releases

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        """Count ``count`` identical releases.

        Raises:
            ConfigError: another population than the configured one, or a count below 1.
        """
        self._history = self._after(event, count)
        self._releases += count

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon of everything counted, at ``delta``."""
        return epsilon(self._history, delta, self._accountant)

    def get_delta(self, epsilon: float) -> float:
        """Return the smallest delta at which ``epsilon`` holds for everything counted."""
        return delta_of(self._history, epsilon, self._accountant)

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """Return epsilon at ``delta``, or at the configured one."""
        at = self._config.target_delta if delta is None else delta
        return PrivacySpent(
            epsilon=self.get_epsilon(at),
            delta=at,
            num_releases=self._releases,
            accounting_method=self._accountant,
        )

    def would_exceed(
        self, event: GaussianPrivacyEvent, max_epsilon: float | None = None, count: int = 1
    ) -> bool:
        """Return whether epsilon would be above the limit after these releases; counts nothing.

        Raises:
            ConfigError: no limit is known, or it is not positive.
        """
        limit = self._config.max_epsilon if max_epsilon is None else max_epsilon
        if limit is None or not limit > 0:
            raise ConfigError(
                f"max_epsilon = {limit!r}: give a positive one to PrivacyConfig or would_exceed"
            )
        after = self._after(event, count)
        return epsilon(after, self._config.target_delta, self._accountant) > limit

    def state_dict(self) -> dict[str, object]:
        """Return JSON that shares nothing with this accountant."""
        return {
            "version": VERSION,
            "accountant": self._accountant,
            "config": self._settings(),
            "history": [list(event) for event in self._history.events()],
            "releases": self._releases,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was counted by what :meth:`state_dict` returned.

        Raises:
            CheckpointError: not such a state, or one of another configuration.
        """
        try:
            known = (state["version"], state["accountant"], dict(state["config"]))
            history = History((float(z), float(q), n) for z, q, n in state["history"])
            releases = operator.index(state["releases"])
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(f"the accountant's state cannot be read: {error!r}") from error
        if known != (VERSION, self._accountant, self._settings()):
            raise CheckpointError(
                f"the accountant's state belongs to {known}, not to "
                f"{(VERSION, self._accountant, self._settings())}"
            )
        if releases != sum(n for _, _, n in history.events()):
            raise CheckpointError(f"the accountant's state counts {releases} releases, not {state}")
        self._history, self._releases = history, releases

    def _settings(self) -> dict[str, object]:
        config = self._config
        return {
            "target_delta": config.target_delta,
            "population_size": config.population_size,
            "neighboring_relation": config.neighboring_relation.value,
            "sampling_method": config.sampling_method.value,
            "max_epsilon": config.max_epsilon,
        }

    def _after(self, event: GaussianPrivacyEvent, count: int) -> History:
        if event.population_size != self._config.population_size:
            raise ConfigError(
                f"the release is from {event.population_size} clients, the accountant was made "
                f"for {self._config.population_size}: PrivacyConfig.population_size must be equal"
            )
        if isinstance(count, bool) or operator.index(count) < 1:
            raise ConfigError(f"count = {count!r}: must be 1 or more")
        z, q = self._cost_of(event)
        return self._history.joined(History([(z, q, count)]))

    def _cost_of(self, event: GaussianPrivacyEvent) -> tuple[float, float]:
        """Return the noise multiplier and sampling rate that a release is accounted at."""
        z = event.noise_multiplier
        match (self._config.sampling_method, self._config.neighboring_relation):
            case (SamplingMethod.POISSON, NeighboringRelation.ADD_OR_REMOVE_ONE):
                return z, event.sample_size / event.population_size
            case (SamplingMethod.NO_AMPLIFICATION, NeighboringRelation.ADD_OR_REMOVE_ONE):
                return z, 1.0
            case (SamplingMethod.WITHOUT_REPLACEMENT, NeighboringRelation.REPLACE_ONE):
                return effective(z, "replace-one"), 1.0
        raise ConfigError(
            f"sampling {self._config.sampling_method.value!r} with neighbours "
            f"{self._config.neighboring_relation.value!r} cannot be accounted; allowed: poisson or "
            "no-amplification with add-or-remove-one, without-replacement with replace-one"
        )
