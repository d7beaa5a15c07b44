"""How much a network that was taught does as its teacher does: measured once, after a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.clients.chunk import rows_at_once
from fedkd.clients.local import Losses, Term
from fedkd.data.federated import UNLABELLED, Split
from fedkd.models.base import BlockNet
from fedkd.types import Metrics

MOST = 2000
"""Examples, or tokens, that are compared: evenly spread over the data."""


def agreement(model: BlockNet, data: Split, terms: Sequence[Term]) -> Metrics:
    """Return how a network and the soft targets that it was just taught agree, by taught point.

    ``agreement/top1``: the share of equal answers (label loyalty); ``agreement/kl``: the mean
    ``KL(teacher || student)`` in nats; ``agreement/tau``: the mean of Kendall's tau-b of both
    rankings of the classes; ``agreement/loyalty``: probability loyalty; ``agreement/cka``: linear
    CKA of the two tables of probabilities, where both vary (of outputs: nobody has a teacher's
    features). Of at most :data:`MOST` examples of ``data`` that have a target, with the network in
    evaluation mode. Student and teacher are compared at the temperature of the targets, before any
    target policy. A point beside the output is named behind an ``@``. Terms that teach nothing
    give nothing. See :mod:`fedkd.metrics.agreement` for formulas and sources.
    """
    teaching = [term for term in terms if term.teaches]
    if not teaching or not len(data):
        return {}
    for part in (model, *(module for term in terms for module in term.modules())):
        part.eval()
    found: Metrics = {}
    for point, pairs in _pairs(model, data, teaching).items():
        both = [torch.cat(side) for side in zip(*pairs, strict=True)]
        some = _spread(len(both[0]), MOST).to(both[0].device)
        student, teacher = (side[some].double().cpu() for side in both)
        for name, value in _measured(student, teacher).items():
            found[f"agreement/{name}{point}"] = value
    return found


def _pairs(
    model: BlockNet, data: Split, terms: Sequence[Term]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return probabilities of student and teacher by point, each (n, C), chunk by chunk."""
    losses, found = Losses(model, terms), dict[str, list[tuple[Tensor, Tensor]]]()
    most = MOST
    if data.y.dim() > 1:
        # A row is many tokens, each of which has all classes of a vocabulary.
        most = math.ceil(MOST * len(data) / max(1, int((data.y != UNLABELLED).sum())))
    index = _spread(len(data), most).to(data.y.device)
    with torch.inference_mode():
        for part in index.split(rows_at_once(data.x)):
            batch = losses.batch(data.x[part], data.y[part], part)
            for term in terms:
                compared = term.compared(batch)
                if compared is not None and len(compared.student):
                    pair = functional.softmax(compared.student, dim=1), compared.teacher
                    found.setdefault(compared.point, []).append(pair)
    return found


def _spread(n: int, most: int) -> Tensor:
    """Return at most ``most`` positions of n, evenly spread."""
    return torch.arange(min(n, most)) * n // max(1, min(n, most))


def _measured(student: Tensor, teacher: Tensor) -> Metrics:
    # SciPy is behind it: only runs that distil wait for that, and only once.
    from fedkd.metrics import agreement as meters

    # Rows of float32 do not add up to 1 as exactly as meters expect of distributions.
    p, q = (x / x.sum(1, keepdim=True) for x in (teacher, student))
    # Who has no distribution agrees with nobody; a fit that diverged says so for itself.
    if not (torch.isfinite(p).all() and torch.isfinite(q).all() and (p >= 0).all()):
        return {}
    t, s = p.numpy(), q.numpy()
    found = {
        "top1": meters.top1_agreement(t, s),
        "kl": meters.mean_kl(t, s),
        "loyalty": meters.probability_loyalty(t, s),
    }
    # A ranking and an alignment need something that differs.
    for name, meter in (("tau", meters.mean_kendall_tau), ("cka", meters.linear_cka)):
        try:
            found[name] = meter(t, s)
        except ValueError:
            continue
    return found
