"""What a network says of given examples, in one batched pass: bits, and what attacks read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedkd.clients.client import Predictor
from fedkd.data.federated import UNLABELLED, Split
from fedkd.errors import RunError


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of n examples under one network, float64 (n,).

    ``bits``: ``-log2 p`` of the label, of text the sum over its tokens (log-perplexity); lower is
    better remembered. ``log_p``: natural logarithm of the label's probability, of text the mean
    over tokens, so that rows of any length are alike. ``phi``: ``log p / (1 - p)`` of the label, of
    text ``log_p``: what LiRA takes for nearly normal. ``rank`` of the label among the classes, 1
    for the most likely, 0 for text.
    """

    bits: np.ndarray
    log_p: np.ndarray
    phi: np.ndarray
    rank: np.ndarray

    def __getitem__(self, index: np.ndarray | slice) -> Scores:
        return Scores(self.bits[index], self.log_p[index], self.phi[index], self.rank[index])


@torch.inference_mode()
def score(predict: Predictor, name: str, examples: Split, batch_size: int, what: str) -> Scores:
    """Return how the output ``name`` of a predictor scores ``examples``.

    Raises:
        RunError: the predictor has no such output, or a loss is not finite; names ``what``.
    """
    parts = []
    for x, y in zip(examples.x.split(batch_size), examples.y.split(batch_size), strict=True):
        found = predict(x)
        if name not in found:
            raise RunError(f"{what} has no output {name!r}; it has {', '.join(sorted(found))}")
        logp = functional.log_softmax(found[name].double(), dim=-1)
        parts.append(_of_rows(logp, y) if y.dim() == 2 else _of_labels(logp, y))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    scores = Scores(*columns)
    if not np.isfinite(scores.bits).all():
        raise RunError(
            f"{what}: {int((~np.isfinite(scores.bits)).sum())} of {len(scores.bits)} losses are "
            "not finite, so nothing can be ranked; the run diverged: lower clients.training.lr"
        )
    return scores


def _of_labels(logp: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = logp.gather(1, y[:, None])[:, 0]
    others = logp.scatter(1, y[:, None], -math.inf).logsumexp(1)
    # A certain network leaves the others nothing; 1e-45 is the least that the official code takes.
    phi = own.clamp_min(math.log(1e-45)) - others.clamp_min(math.log(1e-45))
    rank = 1 + (logp > own[:, None]).sum(1)
    return -own / math.log(2), own, phi, rank


def _of_rows(logp: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = y != UNLABELLED
    own = logp.gather(2, y.clamp_min(0)[:, :, None])[:, :, 0]
    total = torch.where(real, own, torch.zeros_like(own)).sum(1)
    mean = total / real.sum(1).clamp_min(1)
    return -total / math.log(2), mean, mean, torch.zeros_like(y[:, 0])
