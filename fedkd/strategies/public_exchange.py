"""What FedMD and DS-FL share: clients score a public pool, and learn from the fused scores.

Which part of the pool belongs to a round follows from the seed, so only scores travel.
Nothing grows over rounds: the part is drawn afresh, and the server keeps one consensus.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkd.clients.chunk import CHUNK
from fedkd.clients.client import Client, Predictor, Update, personal
from fedkd.clients.guided import Guide, guide_of
from fedkd.clients.local import Batch, Compared, Term
from fedkd.clients.swing_targets import Softening, softening
from fedkd.clients.terms import Supervised, alike
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.chosen import ChosenPolicies, asks, mixing, retempering
from fedkd.distill.fusion_rules import Fusion, fusions, label_shares
from fedkd.distill.soft_store import Precision, Rest
from fedkd.errors import ConfigError, RunError
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.options import Count, NotNegative, Positive, options
from fedkd.privacy.payload import Histogram, Payload, Scores
from fedkd.rng import Rng, stream
from fedkd.strategies.averaging import loss_metrics
from fedkd.strategies.base import Setting, Strategy
from fedkd.strategies.data_free import COUNTS, label_counts_of
from fedkd.strategies.expected import Expected
from fedkd.strategies.reinforcement import Packing
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, kind_of, prefixed, select

CONSENSUS = "consensus/scores"
CONSENSUS_ROUND = "consensus/round"
PACKED = "consensus/top"


@options
class PublicExchange(Strategy):
    """Digest the consensus on a part of the pool, train on private data, score the next part.

    In round t a client receives the consensus on part t (nothing in round 1), trains on it for
    ``digest_epochs``, then on its own data, then scores part t + 1 and uploads the scores. The
    server fuses what it gets; the consensus is of those who took part in round t - 1. Whoever is
    there in round t receives it, and where nobody scored part t nobody digests.

    Under swing distillation every public example has its own temperature, and the server adds noise
    to the consensus before anybody, its own network included, learns from it.

    With ``top_k`` only the likeliest classes of each example travel to the clients; with
    ``cached_rounds`` they keep what they got and digest it again with what they get later.
    """

    mixed = True

    kind: ClassVar[str] = "logits"
    """What clients upload: ``logits``, or ``soft_labels``."""

    subset: Annotated[
        NotNegative, Field(description="examples of the pool scored a round, at most; 0: all")
    ] = 0
    fusion: Annotated[
        str, Field(description="how clients' scores are fused, see fedkd list fusions")
    ] = "mean-logits"
    digest_epochs: Annotated[
        NotNegative, Field(description="epochs on the consensus a round; 0: clients learn alone")
    ] = 1
    digest_batch_size: Annotated[
        Count | None, Field(description="examples a step there; none: as on private data")
    ] = None
    digest_lr: Annotated[
        Positive | None, Field(description="learning rate there; none: as on private data")
    ] = None

    policies: Annotated[
        ChosenPolicies, Field(description="target policies, one after another, see fedkd list")
    ] = None
    top_k: Annotated[
        Count | None,
        Field(description="likeliest classes of the consensus that are sent; none: all"),
    ] = None
    top_type: Annotated[
        Precision | None, Field(description="what their probabilities are sent in; none: float16")
    ] = None
    top_rest: Annotated[
        Rest | None, Field(description="how the other classes are filled in; none: smooth")
    ] = None
    cached_rounds: Annotated[
        Count | None,
        Field(description="rounds in which clients learn again from what they got; none: never"),
    ] = None

    @abstractmethod
    def answers(self, logits: Tensor) -> Tensor:
        """Return what a client uploads of its logits (n, C)."""

    @abstractmethod
    def consensus(
        self, scores: Tensor, rule: Fusion, shares: Tensor | None, swing: Softening | None = None
    ) -> Tensor:
        """Return the consensus (n, C) on the uploaded scores (K, n, C), before any noise."""

    @abstractmethod
    def probs(self, consensus: Tensor) -> Tensor:
        """Return the consensus as probabilities (n, C), for what is logged."""

    @abstractmethod
    def lesson(
        self, consensus: Tensor, swing: Softening | None = None, guide: Guide | None = None
    ) -> Term:
        """Return the loss by which a network digests the consensus (n, C)."""

    def down(self) -> str:
        """Return the key under which the consensus travels."""
        return f"{self.kind}/consensus"

    def wanted(self, round_: int, rounds: int) -> bool:
        """Return whether the scores uploaded in a round will be of use to anybody."""
        return self.digest_epochs > 0 and round_ < rounds

    def needs_public(self) -> bool:
        return self.digest_epochs > 0

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        try:
            fusions.get(self.fusion)
        except ConfigError as error:
            found.append(f"strategy.fusion: {error}")
        if setting.swing is not None:
            found += retempering(self.policies)
        logits = kind_of(self.down()) == "logits"
        scores = "strategy.digest_loss compares logits as they are" if logits else ""
        return found + self.packing.problems(setting.task.classes, scores)

    @property
    def packing(self) -> Packing:
        """How the consensus travels, and how long clients keep it."""
        return Packing(self.top_k, self.top_type, self.top_rest, self.cached_rounds)

    def coupled(self) -> list[str]:  # Public examples may be mixed; validation ones are private.
        private = [p for p in self.policies or () if self.digest_epochs and asks(p, "validation")]
        return [*super().coupled(), *mixing("kl", guided=private)]

    def init(self, setting: Setting, rng: Rng) -> Arrays:
        return {}

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        scored = CONSENSUS_ROUND in state and int(state[CONSENSUS_ROUND][0]) == round_
        if not (scored and self.digest_epochs):
            return {}
        if self.top_k is None:
            return {self.down(): state[CONSENSUS]}
        return prefixed(self.down(), select(state, PACKED))

    def judging(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        return {}

    def local_update(self, client: Client, received: Arrays) -> Update:
        kept = select(client.state, "model")
        model = client.model(kept)
        metrics = {} if kept else self.prepare(client, model)
        metrics |= self.digest(client, model, received)
        metrics |= loss_metrics(client.fit(model, [Supervised()]).losses)
        client.state.update(prefixed("model", to_arrays(model)))
        return Update(self.score(client, model), personal(model), metrics)

    def prepare(self, client: Client, model: BlockNet) -> Metrics:
        """Do what a client does once, before anything else; nothing unless a method says so."""
        return {}

    def digest(self, client: Client, model: BlockNet, received: Arrays) -> Metrics:
        """Train ``model`` in place on the consensus that was received; return its mean loss.

        Raises:
            RunError: the loss is not finite.
        """
        heard = self.heard(client, received)
        if heard is None:
            return {}
        consensus, index, data = heard
        swing = softening(
            client.swing, client.public_temperatures, index, noise=False, device=client.device
        )
        training = self.digesting(client.training)
        guide = guide_of(self.policies, client, training, len(data))
        try:
            term = self.lesson(consensus, swing, guide)
            result = client.fit(model, [term], "digest", training, data)
        except RunError:
            raise RunError(
                "training on the public consensus diverged; lower strategy.digest_lr (now "
                f"{training.lr:.4g})"
            ) from None
        return {"loss/digest": sum(result.losses.values())}

    def heard(self, client: Client, received: Arrays) -> tuple[Tensor, Tensor | None, Split] | None:
        """Return what a client learns: a consensus (n, C), where in the pool (n,), the examples.

        What it was sent in this round, and what it keeps of earlier ones; None: neither.
        """
        sent = received.get(self.down())
        if sent is None and self.top_k is None and self.cached_rounds is None:
            return None
        pool, mine = _pool(client.public), (client.seed, client.round)
        index = positions(len(pool), self.subset, *mine)
        if sent is not None and self.cached_rounds is None:
            consensus = torch.tensor(sent, device=client.device)
            return consensus, index, part(pool, self.subset, *mine)
        at = np.arange(len(pool)) if index is None else index.numpy()
        packing, classes = self.packing, client.task.classes
        arrays = select(received, self.down()) if sent is None else packing.packed(sent)
        found = packing.heard(client.state, arrays, at, client.round, classes)
        if found is None:
            return None
        consensus = torch.from_numpy(packing.dense(found.store)).to(client.device)
        if np.array_equal(found.at, at):
            return consensus, index, part(pool, self.subset, *mine)
        index = torch.from_numpy(found.at.astype(np.int64))
        return consensus, index, rows_of(pool, index)

    def digesting(self, training: Training) -> Training:
        """Return how the consensus is digested: as private data, where no option says otherwise."""
        return replace(
            training,
            epochs=self.digest_epochs,
            steps=0,
            batch_size=self.digest_batch_size or training.batch_size,
            lr=self.digest_lr or training.lr,
        )

    def score(self, client: Client, model: BlockNet) -> Arrays:
        """Return the scores of the part that belongs to the next round.

        A client without training examples has nothing to say and uploads nothing.
        """
        if not client.info.examples or not self.wanted(client.round, client.rounds):
            return {}
        data = part(_pool(client.public), self.subset, client.seed, client.round + 1)
        model.eval()
        with torch.inference_mode():
            logits = torch.cat([model(x) for x in data.x.split(CHUNK)])
            arrays = {f"{self.kind}/scores": self.answers(logits).cpu().numpy()}
        if self.fusion == "class-counts":
            arrays |= label_counts_of(client)
        return arrays

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        said = [u.arrays for u in uploads if f"{self.kind}/scores" in u.arrays]
        if not said:
            return state, {}
        scores = torch.from_numpy(np.stack([arrays[f"{self.kind}/scores"] for arrays in said]))
        shares = None
        if self.fusion == "class-counts":
            shares = label_shares(torch.from_numpy(np.stack([a[COUNTS] for a in said])).float())
        index = positions(len(_pool(setting.public)), self.subset, setting.seed, round_ + 1)
        swing = softening(setting.swing, setting.public_temperatures, index)
        consensus = self.consensus(scores, fusions.get(self.fusion)(), shares, swing)
        if swing is not None:
            consensus = swing.of_probs(consensus, stream(setting.seed, "server", "swing", round_))
        labels = part(_pool(setting.public), self.subset, setting.seed, round_ + 1).y.cpu()
        kept = {
            CONSENSUS: consensus.numpy(),
            CONSENSUS_ROUND: np.array([round_ + 1], dtype=np.int64),
        }
        if self.top_k is not None and self.digest_epochs:
            kept |= prefixed(PACKED, self.packing.packed(consensus.numpy()))
        return {**state, **kept}, _described(self.probs(consensus), labels)

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        """Return the scores of the next round's part of the pool; label counts where they weigh."""
        if not self.wanted(round_, setting.rounds) or setting.public is None:
            return ()
        index = positions(len(setting.public), self.subset, setting.seed, round_ + 1)
        rows = len(setting.public) if index is None else len(index)
        temperatures = self.at(rows)
        if temperatures is not None and setting.public_temperatures is not None:
            chosen = (
                setting.public_temperatures
                if index is None
                else (setting.public_temperatures[index.to(setting.public_temperatures.device)])
            )
            temperatures = chosen.cpu().numpy().astype(np.float64)
        space: Literal["logits", "probs"] = "logits" if self.kind == "logits" else "probs"
        classes = setting.task.classes
        scores = Scores(f"{self.kind}/scores", rows, classes, space, temperatures)
        counts = Histogram(COUNTS, classes)
        return (scores, counts) if self.fusion == "class-counts" else (scores,)

    def uploads(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Expected | None:
        """Return what is declared; nothing of it comes from a client without examples."""
        groups = super().uploads(received, client, round_, setting) or ()
        return tuple(replace(group, of_examples=True) for group in groups)

    def at(self, rows: int) -> np.ndarray | None:
        """Return the temperatures (rows,) at which scores are fused; None: logits as they are."""
        return np.ones(rows)

    def summable(self) -> tuple[str, ...]:
        """Return the fusion rules that read nothing but a mean over clients."""
        return ("mean-probs",)

    def alone(self, setting: Setting) -> list[str]:
        if not self.needs_public() or self.fusion in self.summable():
            return []
        allowed = " or ".join(repr(name) for name in self.summable())
        return [
            f"strategy.fusion = {self.fusion!r} reads every client's scores by themselves; set "
            f"strategy.fusion = {allowed}"
        ]

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        return personal(client.model(select(client.state, "model")))


class MatchScores(Term):
    """Distance of the network's logits to given scores (n, C): mean over the classes.

    ``mean_c |f_c(x_i) - s_ic|``, or the mean of squares; no softmax. Scores are constants.
    Source: Li and Wang, 2019 (formula not in the paper; mean absolute error in the authors' code).
    """

    name = "digest"
    teaches = True

    def __init__(self, scores: Tensor, squared: bool = False, weight: float = 1.0) -> None:
        self.scores, self.squared, self.weight = scores, squared, weight

    def __call__(self, batch: Batch) -> Tensor:
        gap = batch.logits - self.scores[batch.index]
        return (gap.square() if self.squared else gap.abs()).mean(1)

    def compared(self, batch: Batch) -> Compared:
        return Compared(batch.logits, functional.softmax(self.scores[batch.index], dim=1))

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        if not alike(MatchScores, terms, "squared"):
            return None
        scores = torch.cat([term.scores for term in terms])
        return MatchScores(scores, terms[0].squared, terms[0].weight)


@lru_cache(maxsize=2)
def part(pool: Split, size: int, seed: int, round_: int) -> Split:
    """Return the part of the pool that belongs to a round: ``size`` examples of it (0: all).

    It is drawn without replacement, afresh in each round, and is the same on every side: so it is
    made once for all clients. Two are kept, that which is digested and that which is scored.
    """
    index = positions(len(pool), size, seed, round_)
    return pool if index is None else rows_of(pool, index)


def rows_of(pool: Split, index: Tensor) -> Split:
    """Return the examples of a pool at ``index`` (n,)."""
    chosen = index.to(pool.y.device)
    return Split(pool.x.index_select(0, chosen), pool.y.index_select(0, chosen))


@lru_cache(maxsize=2)
def positions(total: int, size: int, seed: int, round_: int) -> Tensor | None:
    """Return where in a pool of ``total`` the part of a round lies, ascending; None: all of it."""
    if not 0 < size < total:
        return None
    order = stream(seed, "public", "part", round_).numpy().permutation(total)
    return torch.from_numpy(np.sort(order[:size]))


def _pool(public: Split | None) -> Split:
    if public is None:
        raise RunError("there is no public pool; set data.public.size")
    return public


def _described(probs: Tensor, labels: Tensor) -> Metrics:
    """Return the mean entropy of the consensus in nats, and its accuracy where labels are known."""
    entropy = torch.special.entr(probs).sum(1).mean()
    found = {"consensus/entropy": float(entropy)}
    if (labels >= 0).all():
        found["consensus/accuracy"] = float((probs.argmax(1) == labels).float().mean())
    return found
