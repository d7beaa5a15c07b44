"""Privacy scores of text, one for each place: how private the token is that is predicted there.

A scorer of tokens reads sequences and knows of no tensors; public text is judged without itself.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedkd.data.federated import Split
from fedkd.errors import ConfigError
from fedkd.privacy.scorers.base import Fitted, Sequences, TokenScorer
from fedkd.rng import Rng
from fedkd.types import Task

PADDING = 0


def predicted(data: Split) -> Tensor:
    """Return where something is predicted, (n, L) bool: not behind the end of a text."""
    return data.y.cpu() >= 0


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of the tokens that follow, by one scorer that learns from the public ``pool``.

    The sequence of an example is its first token and all that are predicted, up to the last one;
    the score of the first is dropped. Tokens are the strings that ``task.class_names`` has for
    them, or their numbers where it has none. Places where nothing is predicted hold 0.

    Raises:
        ConfigError: nothing is predicted anywhere in the pool, so everything would look public.
    """

    scorer: TokenScorer
    pool: Split
    task: Task
    rng: Rng

    def __post_init__(self) -> None:
        if not bool(predicted(self.pool).any()):
            raise ConfigError(
                "privacy.swing compares text with the public pool, but every sequence of the pool "
                "is empty; take it from another data.public.source, or raise data.public.size"
            )

    @cached_property
    def of_pool(self) -> Tensor:
        """The scores (n, L) of the pool in two folds, each by the scorer fitted on the other."""
        order = torch.randperm(len(self.pool), generator=self.rng.child("folds").torch())
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        found = torch.zeros(self.pool.y.shape, dtype=torch.float64)
        for mine, other in (halves, halves[::-1]):
            fitted = self.scorer.fit(self._texts(_rows(self.pool, other)))
            found[mine] = self._scored(fitted, _rows(self.pool, mine))
        return found

    def of(self, data: Split) -> Tensor:
        """Return the scores (m, L) of other text, by the scorer fitted on the whole pool."""
        return self._scored(self._whole, data)

    @cached_property
    def _whole(self) -> Fitted:
        return self.scorer.fit(self._texts(self.pool))

    def _scored(self, fitted: Fitted, data: Split) -> Tensor:
        there = predicted(data)
        by_length: dict[int, list[int]] = defaultdict(list)
        texts = self._texts(data)
        for i, text in enumerate(texts):
            by_length[len(text)].append(i)
        found = torch.zeros(there.shape, dtype=torch.float64)
        for length, rows in by_length.items():
            if length > 1:
                scores = fitted.score([texts[i] for i in rows])
                found[rows, : length - 1] = scores[:, 1:].double().cpu()
        return found.where(there, 0.0)

    def _texts(self, data: Split) -> Sequences:
        """Return the tokens of each example up to the last one that is predicted."""
        follows, there = data.y.cpu(), predicted(data)
        places = torch.arange(1, follows.shape[1] + 1)
        ends = (there * places).amax(1).tolist() if follows.numel() else [0] * len(follows)
        rows = torch.cat([data.x.cpu()[:, :1], follows.where(there, PADDING)], 1).tolist()
        names = self.task.class_names
        return [
            [names[token] for token in row[: end + 1]] if names else row[: end + 1]
            for row, end in zip(rows, ends, strict=True)
        ]


def _rows(data: Split, index: Tensor) -> Split:
    return Split(data.x.cpu()[index], data.y.cpu()[index])
