"""Swing distillation in a run: temperatures of the pool for everybody, of own examples for one."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedkd.clients.swing_targets import SwingTargets
from fedkd.config import Experiment
from fedkd.data.federated import Split
from fedkd.errors import ConfigError
from fedkd.privacy.swing import Items, SwingPlan
from fedkd.rng import stream
from fedkd.strategies.base import Setting, Strategy, strategies


def swing_plan(experiment: Experiment, strategy: Strategy, setting: Setting) -> SwingPlan | None:
    """Return how temperatures are made, or None where swing distillation is off.

    Raises:
        ConfigError: the strategy has no teacher whose targets could be softened.
    """
    swing = experiment.privacy.swing
    if swing.map == "off":
        return None
    if not strategy.swings:
        able = [name for name in strategies.names() if strategies.get(name).swings]
        raise ConfigError(
            f"privacy.swing.map = {swing.map!r}, but strategy {experiment.strategy.name!r} has no "
            "teacher whose soft targets it could soften; set privacy.swing.map = 'off', or use one "
            f"of: {', '.join(able)}"
        )
    rng = stream(setting.seed, "privacy", "swing")
    return SwingPlan(swing, experiment.privacy.release, setting.public, setting.task, rng)


def with_pool(setting: Setting, plan: SwingPlan | None, strategy: Strategy) -> Setting:
    """Return the setting with the temperatures of the public pool, where a strategy needs them.

    Raises:
        ConfigError: the pool cannot be scored.
    """
    if plan is None:
        return setting
    if strategy.swings == "own":
        if plan.swing.map != "constant":
            # Once and before any client is there: their own examples are compared with these.
            plan.of_pool()
        return replace(setting, swing=_targets(plan))
    items = plan.of_pool()
    return replace(setting, swing=_targets(plan, items), public_temperatures=items.temperatures)


def own(plan: SwingPlan, data: Split) -> tuple[SwingTargets, Tensor]:
    """Return how a client's targets are made, and the temperatures of its own examples (n,)."""
    if len(data) == 0:
        return _targets(plan), data.y.double()
    items = plan.of_data(data)
    return _targets(plan, items), items.temperatures


def _targets(plan: SwingPlan, items: Items | None = None) -> SwingTargets:
    return SwingTargets(
        noise=items.noise if items is not None and plan.swing.noise else None,
        clip=plan.release.logit_clip,
        rescale=plan.swing.rescale,
        weights=None if items is None else items.weights,
    )
