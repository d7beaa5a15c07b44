"""DS-FL: soft labels of unlabelled public examples, sharpened by the server, teach everybody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkd.clients.client import Client, Predictor
from fedkd.clients.dp_sgd import steps_of
from fedkd.clients.guided import Guide, distil, guide
from fedkd.clients.local import Term
from fedkd.clients.swing_targets import Softening, softening
from fedkd.clients.teacher_terms import together
from fedkd.clients.training import Training
from fedkd.clients.transfer import agreed, transfer
from fedkd.distill.chosen import OFFERED, Chosen, chosen, problems_of
from fedkd.distill.fusion_rules import Fusion
from fedkd.distill.targets import SampleTargets
from fedkd.models.book import to_arrays
from fedkd.options import Count, NotNegative, Positive, options
from fedkd.rng import Rng, stream
from fedkd.strategies.base import Setting, strategies
from fedkd.strategies.public_exchange import CONSENSUS, PublicExchange, part, positions
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select


@strategies.register("ds-fl")
@options
class DsFl(PublicExchange):
    """Clients and server learn sharpened soft labels of a public pool (a reconstruction).

    ``q_i = softmax((1/K) sum_k p_k(x_i) / T)`` with T below 1 (entropy reduction aggregation), then
    ``min_w -mean_i sum_c q_ic log p_c(w; x_i)``. Limits: ``digest_epochs = 0`` leaves clients
    local-only, ``server_epochs = 0`` leaves the global network out, both: nothing travels.
    Source: Itahara et al., Distillation-Based Semi-Supervised Federated Learning, arXiv:2008.06180
    (in notes only).
    """

    source = "Itahara et al., arXiv:2008.06180 (read in notes only)"
    evidence = "reconstruction"
    swings = "public"
    kind: ClassVar[str] = "soft_labels"

    subset: Annotated[
        NotNegative, Field(description="examples of the pool scored a round, at most; 0: all")
    ] = 1000
    fusion: Annotated[
        str, Field(description="how clients' soft labels are fused, see fedkd list fusions")
    ] = "mean-probs"
    aggregation: Annotated[
        Literal["era", "sa"],
        Field(description="era sharpens the fused soft labels; sa, simple, leaves them"),
    ] = "era"
    era_temperature: Annotated[
        Positive, Field(description="T of era; smaller is sharper, 1 and more is nearly uniform")
    ] = 0.1
    objective: Annotated[Chosen, Field(description="distillation objective, see fedkd list")] = (
        "soft-ce"
    )
    server_epochs: Annotated[
        NotNegative, Field(description="epochs of the global network a round; 0: there is none")
    ] = 1
    server_batch_size: Annotated[
        Count, Field(description="examples a step of the global network")
    ] = 32
    server_lr: Annotated[Positive, Field(description="learning rate of the global network")] = 0.05

    def needs_public(self) -> bool:
        return self.server_epochs > 0 or super().needs_public()

    def wanted(self, round_: int, rounds: int) -> bool:
        # The global network still learns from what is said in the last round.
        return self.server_epochs > 0 or super().wanted(round_, rounds)

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        # The server's own network learns from the pool, too, and has no validation examples.
        offers = OFFERED - {"validation"} if self.server_epochs else OFFERED
        return found + problems_of(self.objective, guided=self.policies, offers=offers)

    def init(self, setting: Setting, rng: Rng) -> Arrays:
        if not self.server_epochs:
            return {}
        return prefixed("model", setting.book.initial(setting.book.labels[0]))

    def judging(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        return prefixed("model", select(state, "model"))

    def answers(self, logits: Tensor) -> Tensor:
        return functional.softmax(logits, dim=1)

    def consensus(
        self, scores: Tensor, rule: Fusion, shares: Tensor | None, swing: Softening | None = None
    ) -> Tensor:
        # Rules take logits; every one of them is blind to what is added to all classes alike, so
        # log-probabilities are as good.
        logits = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        fused = rule(logits, 1.0, shares)
        if self.aggregation == "era":
            fused = sharpened(fused, self.era_temperature)
        return fused if swing is None else swing.soften(fused)

    def probs(self, consensus: Tensor) -> Tensor:
        return consensus

    def lesson(
        self, consensus: Tensor, swing: Softening | None = None, guide: Guide | None = None
    ) -> Term:
        at, rescale = (1.0, True) if swing is None else (swing.temperatures, swing.rescale)
        counts = None if swing is None else swing.weights
        objective, targets = chosen(self.objective), SampleTargets(consensus)
        return distil(
            objective,
            targets,
            at,
            1.0,
            guide=guide,
            rescale=rescale,
            counts=counts,
            labelled=False,
        )

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        before = state.get(CONSENSUS)
        state, metrics = super().aggregate(state, uploads, round_, setting)
        if not self.server_epochs or state.get(CONSENSUS) is before or setting.public is None:
            return state, metrics
        data = part(setting.public, self.subset, setting.seed, round_ + 1)
        index = positions(len(setting.public), self.subset, setting.seed, round_ + 1)
        swing = softening(
            setting.swing, setting.public_temperatures, index, noise=False, device=setting.device
        )
        student = setting.book.make(
            setting.book.labels[0], select(state, "model"), device=setting.device
        )
        training = Training(
            epochs=self.server_epochs, batch_size=self.server_batch_size, lr=self.server_lr
        )
        steps = steps_of(training, len(data))
        by = guide(self.policies, round_, setting.rounds, steps, device=setting.device)
        result = transfer(
            student,
            data.x,
            torch.tensor(state[CONSENSUS], device=setting.device),
            objective=chosen(self.objective),
            temperature=1.0 if swing is None else swing.temperatures,
            rescale=swing is None or swing.rescale,
            weights=None if swing is None else swing.weights,
            training=training,
            rng=stream(setting.seed, "server", "distil", round_),
            guide=by,
            measure=round_ == setting.rounds,
        )
        metrics["loss/server"] = sum(result.losses.values())
        metrics |= agreed(result, setting.book.labels[0])
        return {**state, **prefixed("model", to_arrays(student))}, metrics

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        weights = select(received, "model")
        if not weights:
            return super().predictor(client, received)
        own = client.model(select(client.state, "model"))
        shared = client.book.make(client.book.labels[0], weights, device=client.device)
        return together(own, "global", shared)

    def server_model(self, state: Arrays) -> Arrays | None:
        return select(state, "model") or None


def sharpened(probs: Tensor, temperature: float) -> Tensor:
    """Return ``softmax(p / T)`` of mean probabilities p: entropy reduction aggregation.

    The probabilities themselves stand in the exponent, so a uniform p stays uniform, T -> 0 is the
    one-hot vector of the largest class, and T of 1 or more makes every p nearly uniform.
    Source: Itahara et al., DS-FL, 2020.

    >>> sharpened(torch.tensor([[0.6, 0.4]]), 0.1)
    tensor([[0.8808, 0.1192]])
    """
    return functional.softmax(probs / temperature, dim=1)
