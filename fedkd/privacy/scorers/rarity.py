"""Rarity: a token is as private as a language model of public text finds it surprising there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkd.errors import DataError
from fedkd.options import Count, options
from fedkd.privacy.scorers.base import Fitted, Sequences, TokenScorer, scorers

Context = tuple[str | int, ...]


@scorers.register("rarity")
@options
class Rarity(TokenScorer):
    """Negative log-likelihood of a token after the n - 1 before it, in public text, in nats.

    ``-log (N(context, token) + 1) / (N(context) + V)``: add-one smoothing over the V tokens of the
    public text and one for all others. At the start of a sequence the context is shorter.
    After Wu, Gong and Xiong, FL4NLP 2022, who take the perplexity of a neural language model.
    """

    n: Annotated[Count, Field(description="tokens that count, this one and those before")] = 2

    def fit(self, sequences: Sequences) -> Fitted:
        pairs: Counter[tuple[Context, str | int]] = Counter()
        for sequence in sequences:
            pairs.update(_pairs(sequence, self.n))
        contexts: Counter[Context] = Counter()
        for (context, _), count in pairs.items():
            contexts[context] += count
        return NGrams(self.n, pairs, contexts, len({token for _, token in pairs}) + 1)


@dataclass(frozen=True)
class NGrams:
    """Counts of public n-grams: how often a token follows a context, and a context occurs."""

    n: int
    pairs: Counter[tuple[Context, str | int]] = field(repr=False)
    contexts: Counter[Context] = field(repr=False)
    vocabulary: int

    def score(self, sequences: Sequences) -> Tensor:
        """Return the negative log-likelihood of every token, (N, L) float64, in nats.

        Raises:
            DataError: the sequences have different lengths.
        """
        rows = [
            [
                math.log(self.contexts[pair[0]] + self.vocabulary) - math.log(self.pairs[pair] + 1)
                for pair in _pairs(sequence, self.n)
            ]
            for sequence in sequences
        ]
        return as_rows(rows)


def _pairs(sequence: Sequence[str | int], n: int) -> list[tuple[Context, str | int]]:
    tokens = list(sequence)
    return [(tuple(tokens[max(0, i - n + 1) : i]), token) for i, token in enumerate(tokens)]


def as_rows(rows: list[list[float]]) -> Tensor:
    """Return scores of sequences of one length as (N, L) float64.

    Raises:
        DataError: the sequences have different lengths.
    """
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise DataError(
            f"token sequences have lengths from {lengths[0]} to {lengths[-1]}; cut them to one "
            "length, since a padded place would take a rank among the scores"
        )
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), lengths[0] if lengths else 0)
