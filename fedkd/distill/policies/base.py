"""What a target policy is: it changes what an example is taught, how hot, how much it counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from fedkd.distill.objectives.base import Temperature
from fedkd.registry import Registry
from fedkd.rng import Rng
from fedkd.types import Arrays, DpClass


@dataclass(frozen=True)
class Taught:
    """What a batch is taught just now.

    ``logits`` (B, C) of the student, with gradient; ``probs`` (B, C) soft targets at
    ``temperature``, one number or (B,); ``weights`` (B,) of the examples (none: 1 for all);
    ``labels`` (B,), -1 where unknown (none: nobody knows any). ``progress`` is how much of the
    run is over, from 0 to 1. ``teachers`` (K, B, C) are the soft targets of each teacher by itself
    at ``temperature``, where there are several and a policy asked for them.
    """

    logits: Tensor
    probs: Tensor
    temperature: Temperature
    weights: Tensor | None = None
    labels: Tensor | None = None
    progress: float = 0.0
    teachers: Tensor | None = None


Need = Literal["branches", "teachers", "validation"]
"""What only some places have: inner blocks that can be taught, several teachers' answers, examples
that nobody is trained on."""


class TargetPolicy(ABC):
    """Changes targets, temperatures or weights of a batch before any objective reads them.

    Several are applied one after another, each to what the one before it left. A policy is made
    for one fit: what it learned in it is ``arrays``, which the next one is given by ``remember``.

    ``dp``: ``per-example`` where what becomes of an example depends on it alone;
    ``batch-coupled`` where it depends on others, also by way of a state that their losses move:
    refused under example-level DP. ``labels``: whether it reads them. ``retempers``: whether it
    puts another temperature in place of the given one, and so undoes swing distillation. ``needs``:
    what it cannot do without; with ``validation`` its modules are trained by :meth:`learn`, and not
    along with the student.
    ``source``, ``evidence`` as of an :class:`~fedkd.distill.objectives.base.Objective`.
    """

    dp: DpClass = "per-example"
    labels: ClassVar[bool] = False
    retempers: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()
    source: ClassVar[str] = ""
    evidence: ClassVar[Literal["paper", "code", "reconstruction"]] = "paper"

    @abstractmethod
    def __call__(self, taught: Taught) -> Taught:
        """Return what the batch is taught instead."""

    def seen(self, losses: Tensor) -> None:  # noqa: B027
        """Take note of the losses (B,) of the batch, constants, for the next one."""

    def sized(self, classes: int, teachers: int, rng: Rng) -> None:  # noqa: B027
        """Make what depends on the numbers of classes and teachers; once, before the first batch.

        What was remembered is known already.
        """

    def modules(self) -> Sequence[nn.Module]:
        """Return what of it is trained along with the student."""
        return ()

    def penalty(self, taught: Taught) -> Tensor | None:
        """Return what is added to the losses, (B,) or one number; ``taught`` as it was left."""
        return None

    def learn(self, gradients: Sequence[Tensor]) -> None:  # noqa: B027
        """Take a step against the gradients of its parameters, those of the loss on validation."""

    def arrays(self) -> Arrays:
        """Return what it has to know when it goes on in another fit."""
        return {}

    def remember(self, arrays: Arrays) -> None:  # noqa: B027
        """Go on from what an earlier fit left; ``{}`` is a beginning."""


policies: Registry[type[TargetPolicy]] = Registry(
    "target policy", "fedkd.distill.policies", "policies"
)
