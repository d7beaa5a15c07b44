"""What a privacy scorer is: how private an item is, judged without the teacher's private data.

A score is no measure of privacy by law or by consent. It is a guess from the outside: rare, far
from what is public, or of a form that was declared private.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Protocol

from pydantic import Field
from torch import Tensor

from fedkd.data.federated import Split
from fedkd.options import options
from fedkd.registry import Registry
from fedkd.rng import Rng
from fedkd.types import Task

Sequences = Sequence[Sequence[str | int]]
"""Token sequences of one length: strings (characters), or sequences of words or token numbers."""


@options
class Scorer:
    """Gives a higher score to what is more likely private.

    ``ranked``: only the order of scores counts; otherwise they are themselves likelihoods in
    [0, 1].
    """

    ranked: ClassVar[bool] = True

    private: Annotated[
        bool, Field(description="scores depend on private data: noise as at the coldest T")
    ] = False


@options
class ExampleScorer(Scorer, ABC):
    """Scores whole examples, such as images."""

    @abstractmethod
    def score_public(self, pool: Split, task: Task, rng: Rng) -> Tensor:
        """Return the scores (n,) float64 of the public pool, no example judged by itself."""

    @abstractmethod
    def score(self, data: Split, pool: Split, task: Task, rng: Rng) -> Tensor:
        """Return the scores (m,) float64 of other examples, judged by the public pool alone."""


class Fitted(Protocol):
    """A token scorer that has seen its public reference."""

    def score(self, sequences: Sequences) -> Tensor:
        """Return the score of every token, (N, L) float64."""


@options
class TokenScorer(Scorer, ABC):
    """Scores each token of a sequence at its position."""

    @abstractmethod
    def fit(self, sequences: Sequences) -> Fitted:
        """Return the scorer with what it learns of public ``sequences``."""


scorers: Registry[type[Scorer]] = Registry("scorer", "fedkd.privacy.scorers", "scorers")
