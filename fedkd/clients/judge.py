"""Judging a predictor on a split: counts by class, so that every accuracy is a sum of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedkd.clients.client import Predictor
from fedkd.data.federated import Split

CHUNK = 4096
"""Examples in one forward pass: bounds memory, large enough not to cost time."""


@dataclass(frozen=True)
class Verdict:
    """Correct answers and examples by class (C,), and the summed negative log-likelihood."""

    correct: np.ndarray
    total: np.ndarray
    loss_sum: float

    @property
    def accuracy(self) -> float:
        """Share of correct answers; NaN for an empty split."""
        n = int(self.total.sum())
        return float(self.correct.sum() / n) if n else float("nan")

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats; NaN for an empty split."""
        n = int(self.total.sum())
        return self.loss_sum / n if n else float("nan")


@torch.inference_mode()
def judge(predict: Predictor, split: Split, classes: int) -> Verdict:
    """Return how ``predict`` does on ``split``; a network is put into evaluation mode."""
    if isinstance(predict, nn.Module):
        predict.eval()
    correct = np.zeros(classes, dtype=np.int64)
    total = np.zeros(classes, dtype=np.int64)
    loss = 0.0
    for x, y in zip(split.x.split(CHUNK), split.y.split(CHUNK), strict=True):
        if len(y) == 0:
            continue
        logp = functional.log_softmax(predict(x), dim=1)
        loss += float(functional.nll_loss(logp, y, reduction="sum"))
        hit = y[logp.argmax(1) == y].cpu().numpy()
        correct += np.bincount(hit, minlength=classes)
        total += np.bincount(y.cpu().numpy(), minlength=classes)
    return Verdict(correct, total, loss)
