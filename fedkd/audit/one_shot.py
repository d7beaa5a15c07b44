"""The one-shot audit: whether the directions of canary clients are in what was released."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedkd.audit.finished import Finished
from fedkd.audit.results import number, of_bound
from fedkd.privacy.auditing.one_shot import one_shot
from fedkd.privacy.auditing.options import Audit
from fedkd.privacy.canaries.clients import CanaryClients, keys
from fedkd.privacy.payload import Weights
from fedkd.rng import stream


def one_shot_table(run: Finished, audit: Audit) -> dict[str, Any] | None:
    """Return what the cosines of canary clients with the final model say; None without any.

    The statistic is that of the published algorithm 1: the cosine of a canary's direction with the
    whole update of the model, ``theta_T - theta_0``. ``rounds``: the mean cosine, round by round,
    of those that took part and of those that did not, which is for reading only.

    Raises:
        ConfigError: the network has too few parameters for the null to be known in closed form.
    """
    experiment, strategy = run.prepared.experiment, run.prepared.strategy
    if not experiment.canaries.random_clients:
        return None
    setting = run.prepared.setting
    first = strategy.init(setting, stream(experiment.seed, "server", "init"))
    client = setting.clients[0]
    received = strategy.broadcast(first, client, 1, setting)
    (part,) = strategy.declare(received, client, 1, setting) or (None,)
    assert isinstance(part, Weights)
    known = CanaryClients(
        experiment.canaries.random_clients,
        run.prepared.plan.rate,
        stream(experiment.seed, "canaries", "clients"),
    )
    last = strategy.broadcast(run.state, client, run.round + 1, setting)
    cosines = np.array(known.cosines(part, {**part.reference, **last}))
    dimension = sum(part.reference[key].size for key in keys(part))
    found = one_shot(cosines, dimension, audit.delta or 0.0, audit.confidence)
    privacy = run.extra["privacy"]
    observed, came = np.array(privacy["observed"]), np.array(privacy["came"], dtype=bool)
    rounds = [
        {
            "there": float(row[there].mean()) if there.any() else None,
            "absent": float(row[~there].mean()) if (~there).any() else None,
        }
        for row, there in zip(observed, came, strict=True)
    ]
    return {
        "estimate": of_bound(found["estimate"]),
        "lower": of_bound(found["lower"]),
        "mean": number(found["mean"]),
        "std": number(found["std"]),
        "clients": len(cosines),
        "dimension": dimension,
        "rounds": rounds,
    }
