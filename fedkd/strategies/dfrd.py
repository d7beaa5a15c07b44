"""DFRD, reconstructed: a slow copy of the generator keeps the student from forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from fedkd.clients.local import Term
from fedkd.clients.synthesis import Answers, Boundary, Diversity, Fidelity
from fedkd.distill.generator import Codes
from fedkd.models.base import BlockNet
from fedkd.options import NonNegative, NotNegative, Positive, options
from fedkd.rng import stream
from fedkd.strategies.alternating import Alternating
from fedkd.strategies.base import Setting, strategies
from fedkd.types import Arrays, prefixed, select

SLOW = "generator_ema"
"""Where the server keeps the slow copy of the generator; it never travels."""


@strategies.register("dfrd")
@options
class DFRD(Alternating):
    """FedAvg, then distillation on samples of a generator and its slow copy (a reconstruction).

    Generator: ``f CE(p, y) - b 1[argmax s != argmax p] KL(p || s) + d div`` on G(e, y): fidelity,
    transferability and diversity, p the fused teachers and s the student. Slow copy, once a round:
    ``G' <- m G' + (1 - m) G``. Student: KL to the fused teachers on samples of which G' of earlier
    rounds makes the share ``ema_share``. Limits: ``server_steps = 0`` is FedAvg bit for bit;
    ``ema_share = 0`` keeps no copy. The formulas are ours: see the card.
    Source: Luo et al., DFRD, NeurIPS 2023 (the abstract only; a reconstruction).
    """

    source = "Luo et al., NeurIPS 2023, arXiv:2309.13546 (abstract only)"
    evidence = "reconstruction"

    server_steps: Annotated[
        NotNegative, Field(description="steps of the student a round; 0 is FedAvg")
    ] = 50
    server_lr: Annotated[Positive, Field(description="learning rate of the student")] = 1e-4
    generator_lr: Annotated[Positive, Field(description="learning rate of the generator")] = 5e-3
    transfer_weight: Annotated[
        NonNegative, Field(description="b, weight of samples that student and teachers name apart")
    ] = 0.3
    diversity_weight: Annotated[NonNegative, Field(description="d, weight of diversity")] = 1.0
    ema: Annotated[
        float, Field(ge=0, lt=1, description="m, what the slow copy keeps of itself in a round")
    ] = 0.5
    ema_share: Annotated[
        float, Field(ge=0, lt=1, description="share of samples that the slow copy makes; 0: none")
    ] = 0.5

    def generator_terms(
        self, answers: Answers, codes: Codes, students: Sequence[BlockNet]
    ) -> list[Term]:
        share = 1 / len(students)
        terms: list[Term] = [
            Fidelity(answers, self.fidelity_weight),
            *(Boundary(answers, s, self.transfer_weight * share) for s in students),
            Diversity(codes, self.diversity_weight),
        ]
        return [term for term in terms if term.weight]

    def makers(
        self, generator: BlockNet, state: Arrays, setting: Setting
    ) -> list[tuple[float, BlockNet]]:
        kept = select(state, SLOW)
        if not kept or not self.ema_share:
            return [(1.0, generator)]
        slow = self.generator(setting, stream(setting.seed, "server", "generator"), kept)
        return [(1 - self.ema_share, generator), (self.ema_share, slow)]

    def remembered(self, state: Arrays, generator: BlockNet) -> Arrays:
        kept = super().remembered(state, generator)
        if not self.ema_share:
            return kept
        now, slow = select(kept, "generator"), select(state, SLOW)
        m = np.float32(self.ema)
        moved = {k: m * slow[k] + (1 - m) * w for k, w in now.items()} if slow else now
        return {**kept, **prefixed(SLOW, moved)}
