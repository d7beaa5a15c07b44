"""Three privacy curves over participation ratios, which meet at one ratio and tell three stories.

At a fixed noise multiplier a smaller ratio looks more private, but the noise on the mean grows; at
a fixed epsilon, or at a fixed noise on the mean, the comparison is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedkd.axes import Table
from fedkd.config import Experiment
from fedkd.engine.setup import load_workspace, prepare
from fedkd.errors import ConfigError
from fedkd.privacy.accounting import epsilon as epsilon_of
from fedkd.privacy.plan import PrivacyPlan, make_plan, planned

MULTIPLIER, EPSILON, MEAN = CURVES = (
    "fixed noise multiplier",
    "fixed epsilon",
    "fixed noise on the mean",
)
NOISE = ("epsilon", "noise_multiplier", "mean_noise")
"""The options of which one says how much noise there is; the others are none."""
AGREE = 0.01
"""Relative difference of the noise multipliers of the curves where they meet."""
NUDGES = (1.0, 1.0025, 1.005, 1.0075, 1.01)
"""A calibration stops up to 1 % below its target: a target slightly higher makes up for that."""


def variants(experiment: Experiment, at: float, workspace: Path | None = None) -> dict[str, Table]:
    """Return what differs on each of the three curves, by their names in :data:`CURVES`.

    With z the noise multiplier at participation ratio ``at``, n the expected cohort there: z at
    every ratio; the epsilon that z costs there, with noise calibrated anew at every ratio; and
    noise z / n on the mean at every ratio. Give it the experiment of one label: what epsilon costs
    depends on how often its strategy releases something.

    Raises:
        ConfigError: there is no noise by the server at client level, or no delta.
    """
    _check(experiment, at)
    load_workspace(workspace)
    clients = experiment.clients
    there = replace(clients, participation=replace(clients.participation, ratio=at))
    plan = prepare(replace(experiment, clients=there)).plan
    z = plan.noise_multiplier
    if not z > 0 or not _spent(plan) > 0:
        raise ConfigError(
            f"sweep.privacy_at = {at:g}: no noise is added there, so that there is none to hold "
            "fixed; give privacy.noise_multiplier > 0"
        )
    given = experiment.privacy.epsilon
    values: dict[str, tuple[str, float]] = {
        MULTIPLIER: ("noise_multiplier", z),
        EPSILON: ("epsilon", _epsilon(plan) if given is None else given),
        MEAN: ("mean_noise", z / plan.expected()),
    }
    return {
        name: {f"privacy.{other}": value if other == option else None for other in NOISE}
        for name, (option, value) in values.items()
    }


def _check(experiment: Experiment, at: float) -> None:
    privacy, scheme = experiment.privacy, experiment.clients.participation.scheme
    if privacy.unit != "client" or privacy.trust != "central":
        raise ConfigError(
            "sweep.privacy_at compares noise that the server adds at client level; set "
            "privacy.unit = 'client' and privacy.trust = 'central', or leave it out"
        )
    if privacy.delta is None:
        raise ConfigError(
            "sweep.privacy_at: epsilons of different ratios are compared at one delta; set "
            "privacy.delta, for instance to 1e-5, and one of epsilon and noise_multiplier"
        )
    if scheme == "full":
        raise ConfigError(
            "sweep.privacy_at with clients.participation.scheme = 'full', which has no ratio; set "
            "it to 'poisson'"
        )
    if not 0 < at <= 1:
        raise ConfigError(f"sweep.privacy_at = {at!r}: a participation ratio is above 0, at most 1")


def _epsilon(plan: PrivacyPlan) -> float:
    """Return what the plan's noise costs, as short as noise calibrated to it is this noise."""
    exact = _spent(plan)
    calibrated = _calibrated(plan)
    for nudge in NUDGES:
        for digits in range(3, 8):
            short = float(f"{nudge * exact:.{digits}g}")
            if abs(calibrated(short) / plan.noise_multiplier - 1) <= AGREE:
                return short
    raise ConfigError(
        f"sweep.privacy_at: epsilon = {exact:.3g} is near the floor of the "
        f"{plan.options.accountant} accountant, where noise does not follow from it; give less "
        "noise, or privacy.accountant = 'prv'"
    )


def _spent(plan: PrivacyPlan) -> float:
    """Return the epsilon after all rounds, of the client with the largest."""
    histories = (planned(plan, k, plan.noise_multiplier) for k in range(plan.population.clients))
    kinds = {str(history.events()): history for history in histories}
    return max(epsilon_of(h, plan.delta, plan.options.accountant) for h in kinds.values())


def _calibrated(plan: PrivacyPlan) -> Callable[[float], float]:
    """Return the function from an epsilon to its noise multiplier in this federation."""

    def noise(target: float) -> float:
        asked = replace(plan.options, epsilon=target, noise_multiplier=None, mean_noise=None)
        return make_plan(asked, plan.population).noise_multiplier

    return noise
