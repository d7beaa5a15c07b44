"""Judging a predictor on a split: counts by class, so that every accuracy is a sum of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fedkd.clients.chunk import rows_at_once
from fedkd.clients.client import Predictor
from fedkd.data.federated import UNLABELLED, Split


@dataclass(frozen=True)
class Verdict:
    """Correct answers and examples by class (C,), and the summed negative log-likelihood."""

    correct: np.ndarray
    total: np.ndarray
    loss_sum: float

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.correct + other.correct, self.total + other.total, self.loss_sum + other.loss_sum
        )

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

    def bits_per_character(self, tokens: Sequence[str]) -> float:
        """Return ``sum -log2 p / characters`` of a text; ``tokens`` are what the classes stand for.

        It can be compared between tokenizers, which perplexity by token cannot.
        """
        characters = float(self.total @ np.array([len(token) for token in tokens]))
        return self.loss_sum / math.log(2) / characters if characters else float("nan")


@torch.inference_mode()
def judge(predict: Predictor, split: Split, classes: int) -> dict[str, Verdict]:
    """Return how each of a predictor's outputs does on ``split``; empty for an empty split.

    Of text every token counts by itself.
    """
    found: dict[str, Verdict] = {}
    size = rows_at_once(split.x)
    for x, labels in zip(split.x.split(size), split.y.split(size), strict=True):
        real = labels != UNLABELLED
        # Every image has a label: it is not worth a copy.
        y = labels if labels.dim() == 1 else labels[real]
        if len(y) == 0:
            continue
        total = np.bincount(y.cpu().numpy(), minlength=classes)
        for name, answer in predict(x).items():
            output = answer if labels.dim() == 1 else answer[real]
            logp = functional.log_softmax(output, dim=1)
            hit = y[logp.argmax(1) == y].cpu().numpy()
            here = Verdict(
                np.bincount(hit, minlength=classes),
                total,
                float(functional.nll_loss(logp, y, reduction="sum")),
            )
            found[name] = found[name] + here if name in found else here
    return found
