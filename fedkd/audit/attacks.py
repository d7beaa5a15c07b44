"""Membership inference on one subject: is a canary in? Scores are higher the more likely it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from fedkd.audit.finished import Finished
from fedkd.audit.subjects import Subject
from fedkd.errors import ConfigError, DataError
from fedkd.privacy.auditing.lira import lira
from fedkd.privacy.auditing.released import released
from fedkd.privacy.auditing.rmia import rmia

PREFERRED = ("lira-online", "rmia-online", "rmia-offline", "loss")
"""By which attack bounds are taken: the first that there is, and not the best afterwards."""


def attacks(
    target: Subject, references: Sequence[Subject], inside: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the scores (m,) of every attack that the reference runs allow, by its name.

    ``loss``: minus the loss, one threshold for all. ``lira`` and ``rmia``, online and offline,
    with ``inside`` (K, m), the references' coins. NaN: a canary that an attack cannot judge, having
    been in all of the references or in none.
    """
    found = {"loss": -target.scores.bits}
    if not references:
        return found
    phi = np.stack([r.scores.phi for r in references])
    for name, online in (("lira-online", True), ("lira-offline", False)):
        scores = _allowed(partial(lira, target.scores.phi, phi, inside, online=online))
        if scores is not None:
            found[name] = scores
    for name, online in (("rmia-online", True), ("rmia-offline", False)):
        scores = _allowed(partial(_rmia, target, references, inside, online))
        if scores is not None:
            found[name] = scores
    return found


def released_attack(
    run: Finished, references: Sequence[Finished], inside: np.ndarray
) -> np.ndarray | None:
    """Return the scores (m,) of the attack on released knowledge; None where nothing is released.

    It takes 3 reference runs.
    """
    target = run.released()
    if target is None:
        return None
    found = [r.released() for r in references]
    known = [k for k in found if k is not None and k.shape == target.shape]
    if len(known) < len(found):
        return None
    return _allowed(partial(released, target, np.stack(known), inside))


def _rmia(
    target: Subject, references: Sequence[Subject], inside: np.ndarray, online: bool
) -> np.ndarray:
    """Return RMIA's scores; what is public is judged by the network that judges the canary."""
    scores = np.full(inside.shape[1], np.nan)
    for place, group in enumerate(target.groups):
        others = [r.groups[place] for r in references]
        who = group.canaries
        found = _allowed(
            partial(
                rmia,
                group.scores.log_p,
                np.stack([r.scores.log_p for r in others]),
                inside[:, who],
                group.references.log_p,
                np.stack([r.references.log_p for r in others]),
                online=online,
            )
        )
        if found is not None:
            scores[who] = found
    return scores


def _allowed(attack: Callable[[], np.ndarray]) -> np.ndarray | None:
    """Return an attack's scores, or None where the references do not suffice for it."""
    try:
        scores = attack()
    except DataError:
        # Losses that are no numbers, runs that do not belong together: no matter of how many.
        raise
    except ConfigError:
        return None
    return scores if np.isfinite(scores).any() else None
