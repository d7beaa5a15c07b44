"""DHO in a federation: a head for the labels, another for what is distilled, on one backbone.

The method is centralised, with a pretrained teacher. Here the backbone and the distilled head are
averaged, the supervised head is each client's own, and the clients themselves are the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd.clients.client import Client, Predictor, Update
from fedkd.clients.dual_head import Labelled, OnPool, answers, dual
from fedkd.clients.guided import distil, guide_of
from fedkd.clients.heads import client_head, keep_heads, make_head, soften
from fedkd.clients.local import Term
from fedkd.distill.chosen import (
    OFFERED,
    Chosen,
    ChosenPolicies,
    chosen,
    mixing,
    problems_of,
)
from fedkd.distill.targets import SampleTargets
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.options import Count, Fraction, NonNegative, NotNegative, Positive, Ratio, options
from fedkd.privacy.payload import Payload, Scores, Weights
from fedkd.rng import Rng
from fedkd.strategies.averaging import ModelAveraging, average, loss_metrics
from fedkd.strategies.base import Setting, strategies
from fedkd.strategies.expected import Expected, of_payload
from fedkd.strategies.public_exchange import CONSENSUS, CONSENSUS_ROUND, part
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select

SCORES = "soft_labels/scores"
TAUGHT = "soft_labels/consensus"


@strategies.register("dho")
@options
class DHO(ModelAveraging):
    """Dual-head optimisation: labels and soft targets have a head each (a reconstruction).

    ``l CE(ce(g(x)), y) + (1 - l) T^2 [v D(p_x || softmax(kd(g(x))/T)) + u D(p_z ||
    softmax(kd(g(z))/T))]``, with the backbone g, private examples x, public examples z and soft
    targets p at T. Backbone and head kd are averaged; the head ce is personal, or averaged. Clients
    predict with ``a softmax(ce) + (1 - a) softmax(kd / b)``.

    The paper's teacher is a large pretrained network. Here p_x is what the client's own two heads
    say when its round begins, and p_z the mean of what all clients' heads said of z a round ago
    (``ensemble``), or again its own (``composite``). Limits: a = 1 and a = 0 are single heads;
    l = 1 is FedPer with a fresh linear head, and the head kd learns nothing.
    Source: Kang et al., Dual-Head Optimization, arXiv:2505.07675, 2025, for the loss, T and the
    mixture; everything federated is ours.
    """

    source = "Kang et al., arXiv:2505.07675 (loss and prediction; the federation is ours)"
    evidence = "reconstruction"

    lam: Annotated[Ratio, Field(description="l, weight of the labels; 1: nothing is distilled")] = (
        0.5
    )
    labelled_weight: Annotated[
        NonNegative, Field(description="v, weight of soft targets of private examples; 0: none")
    ] = 1.0
    unlabelled_weight: Annotated[
        NonNegative, Field(description="u, weight of soft targets of the public pool; 0: none")
    ] = 1.0
    teacher: Annotated[
        Literal["ensemble", "composite"],
        Field(description="who teaches on the pool: all clients, or each itself, as received"),
    ] = "ensemble"
    teacher_mix: Annotated[
        Ratio, Field(description="share of the supervised head in what is taught, at b = 1")
    ] = 0.5
    supervised_head: Annotated[
        Literal["personal", "averaged"], Field(description="whether the head of the labels travels")
    ] = "personal"
    objective: Annotated[Chosen, Field(description="distillation objective, see fedkd list")] = "kl"
    policies: Annotated[
        ChosenPolicies, Field(description="target policies, one after another, see fedkd list")
    ] = None
    temperature: Annotated[Positive, Field(description="T of soft targets and student")] = 2.0
    mix: Annotated[
        Fraction, Field(description="a, share of the supervised head in predictions")
    ] = 0.5
    sharpness: Annotated[
        Positive, Field(description="b, divides the distilled head's logits in predictions")
    ] = 1.0
    subset: Annotated[
        NotNegative, Field(description="examples of the pool used a round, at most; 0: all")
    ] = 0
    pool_batch_size: Annotated[
        Count | None, Field(description="public examples a step; none: as of private data")
    ] = None

    @property
    def scoring(self) -> bool:
        """Whether clients score the pool for each other."""
        return self.teacher == "ensemble" and self.lam < 1 and self.unlabelled_weight > 0

    @property
    def shares_head(self) -> bool:
        """Whether the supervised head is averaged, too."""
        return self.supervised_head == "averaged"

    def needs_public(self) -> bool:
        return self.scoring

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        pool = self.unlabelled_weight and (setting.public is not None or self.scoring)
        # A step on the pool is none on the examples whose outcome validation examples could tell.
        offers = frozenset() if pool and self.lam < 1 else OFFERED
        found += problems_of(self.objective, guided=self.policies, offers=offers)
        if self.lam < 1 and not (self.labelled_weight or pool):
            found.append(
                "strategy.labelled_weight = 0, and strategy.unlabelled_weight = 0 or no pool: the "
                "distilled head would learn nothing; set strategy.labelled_weight above 0, or "
                "strategy.unlabelled_weight above 0 and data.public.size, or strategy.lam = 1"
            )
        if self.lam == 1 and self.mix == 0:
            found.append(
                "strategy.lam = 1 leaves the distilled head as it was drawn, and strategy.mix = 0 "
                "predicts with nothing else; set strategy.mix = 1"
            )
        return found

    def coupled(self) -> list[str]:
        if self.lam == 1:
            return super().coupled()
        # On the pool an objective mixes public examples only; a policy may look at others as well.
        private = self.objective if self.labelled_weight else "kl"
        return [*super().coupled(), *mixing(private, guided=self.policies)]

    def init(self, setting: Setting, rng: Rng) -> Arrays:
        state = super().init(setting, rng)
        if self.shares_head:
            label = setting.clients[0].model
            block = setting.book.blocks(label)[-2]
            size = setting.book.make(label).feature_size(setting.task, block)
            head = make_head(size, 0, setting.task.classes, Rng(setting.seed, ("head", block)), {})
            state |= prefixed(f"global_head/{block}", to_arrays(head))
        return state

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        sent = self.judging(state, client, round_, setting)
        scored = CONSENSUS_ROUND in state and int(state[CONSENSUS_ROUND][0]) == round_
        return {**sent, TAUGHT: state[CONSENSUS]} if scored else sent

    def judging(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        heads = prefixed("global_head", select(state, "global_head"))
        return {**super().broadcast(state, client, round_, setting), **heads}

    def local_update(self, client: Client, received: Arrays) -> Update:
        model = self.start(client, received)
        block = model.block_names[-1]
        head = self._head(client, model, received)
        terms = [Labelled(head, block, self.lam), *self._distilled(client, model, head, received)]
        result = client.fit(model, terms)
        arrays = self.finish(client, model)
        if self.shares_head:
            arrays |= prefixed(f"global_head/{block}", to_arrays(head))
        else:
            keep_heads(client, {block: head})
        arrays |= self._scores(client, model, head)
        return Update(arrays, self._predictor(model, head), loss_metrics(result.losses))

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        model = self.start(client, received)
        return self._predictor(model, self._head(client, model, received))

    def _predictor(self, model: BlockNet, head: BlockNet) -> Predictor:
        return dual(model, head, model.block_names[-1], self.mix, self.sharpness)

    def _head(self, client: Client, model: BlockNet, received: Arrays) -> BlockNet:
        """Return the supervised head: the one received, or the client's own."""
        block = model.block_names[-1]
        size = model.feature_size(client.task, block)
        if not self.shares_head:
            return client_head(client, block, size, 0)
        weights = select(received, f"global_head/{block}")
        made = make_head(size, 0, client.task.classes, client.rng("unused"), weights)
        return made.to(client.device)

    def _distilled(
        self, client: Client, model: BlockNet, head: BlockNet, received: Arrays
    ) -> list[Term]:
        """Return what the distilled head learns, with targets as they are before the first step."""
        if self.lam == 1 or not len(client.data.train):
            return []
        terms: list[Term] = []
        # A head that has seen no label has nothing to teach.
        trained = client.round > 1 if self.shares_head else bool(select(client.state, "head"))
        objective, at, weight = chosen(self.objective), self.temperature, 1 - self.lam
        if self.labelled_weight and trained:
            said = self._answers(client, model, head, client.data.train.x)
            own = weight * self.labelled_weight
            by = guide_of(self.policies, client)
            terms.append(distil(objective, SampleTargets(soften(said, at)), at, own, guide=by))
        pool = self._pool(client, model, head, received, trained)
        if pool is not None:
            term = OnPool(
                model,
                *pool,
                objective=objective,
                temperature=at,
                weight=weight * self.unlabelled_weight,
                size=self.pool_batch_size or client.training.batch_size,
                rng=client.rng("pool"),
                guide=guide_of(self.policies, client, place="policies@pool"),
            )
            terms.append(term)
        return terms

    def _pool(
        self, client: Client, model: BlockNet, head: BlockNet, received: Arrays, trained: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Return this round's public inputs and their soft targets at T; None: there are none."""
        if client.public is None or not self.unlabelled_weight:
            return None
        x = part(client.public, self.subset, client.seed, client.round).x
        if TAUGHT in received:
            probs = torch.tensor(received[TAUGHT], device=client.device)
            said = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
        elif self.teacher == "composite" and trained:
            said = self._answers(client, model, head, x)
        else:
            return None
        return x, soften(said, self.temperature)

    def _answers(self, client: Client, model: BlockNet, head: BlockNet, x: Tensor) -> Tensor:
        return answers(model, head.eval(), model.block_names[-1], x, self.teacher_mix, 1.0)

    def _scores(self, client: Client, model: BlockNet, head: BlockNet) -> Arrays:
        """Return what a client predicts of the next round's public examples, as it is now."""
        if not self._wanted(client.round, client.rounds) or not client.info.examples:
            return {}
        assert client.public is not None
        x = part(client.public, self.subset, client.seed, client.round + 1).x
        return {SCORES: self._answers(client, model, head, x).exp().cpu().numpy()}

    def _wanted(self, round_: int, rounds: int) -> bool:
        return self.scoring and round_ < rounds

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        weights = self._weights(received, client, round_, setting)
        if not self._wanted(round_, setting.rounds) or setting.public is None:
            return weights
        rows = len(part(setting.public, self.subset, setting.seed, round_ + 1))
        said = Scores(SCORES, rows, setting.task.classes, "probs", np.ones(rows))
        return (*weights, said)

    def _weights(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload:
        """Return the averaged arrays as one part: a client's whole update is clipped together."""
        blocks = super().declare(received, client, round_, setting) or ()
        heads = prefixed("global_head", select(received, "global_head"))
        return tuple(
            replace(part, reference={**part.reference, **heads})
            for part in blocks
            if isinstance(part, Weights)
        )

    def uploads(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Expected | None:
        """Return what is declared; a client without examples scores nothing."""
        weights, *scores = of_payload(self.declare(received, client, round_, setting) or ())
        return (weights, *(replace(group, of_examples=True) for group in scores))

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        """Average blocks and heads alike, and the scores of those who scored."""
        state, metrics = super().aggregate(state, uploads, round_, setting)
        if self.shares_head:
            weights = [u.client.examples if self.weighting == "examples" else 1 for u in uploads]
            heads = [prefixed("global_head", select(u.arrays, "global_head")) for u in uploads]
            state = {**state, **average(heads, weights)}
        said = [{CONSENSUS: u.arrays[SCORES]} for u in uploads if SCORES in u.arrays]
        if not said or setting.public is None:
            return state, metrics
        mean = average(said, [1.0] * len(said))[CONSENSUS]
        labels = part(setting.public, self.subset, setting.seed, round_ + 1).y.cpu()
        kept = {CONSENSUS: mean, CONSENSUS_ROUND: np.array([round_ + 1], dtype=np.int64)}
        return {**state, **kept}, {**metrics, **_described(torch.from_numpy(mean), labels)}


def _described(probs: Tensor, labels: Tensor) -> Metrics:
    """Return the mean entropy of a consensus in nats, and its accuracy where labels are known."""
    found = {"consensus/entropy": float(torch.special.entr(probs).sum(1).mean())}
    if bool((labels >= 0).all()):
        found["consensus/accuracy"] = float((probs.argmax(1) == labels).float().mean())
    return found
