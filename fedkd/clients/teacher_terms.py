"""Loss terms that compare one network's output with another's: constant teachers, and peers.

A constant teacher is asked once a round for all training examples, which is cheaper than asking it
in every epoch and exact, since examples do not change. A peer learns in the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.clients.client import ByNetworks, Predictor
from fedkd.clients.guided import Guide, Led, led
from fedkd.clients.heads import infer
from fedkd.clients.local import Batch, Compared, Term
from fedkd.clients.stacked.modules import Joined, join
from fedkd.clients.terms import Supervised, alike, row_mean, widened
from fedkd.data.federated import UNLABELLED, Split
from fedkd.distill.not_true import not_true_divergence
from fedkd.distill.objectives.base import Objective
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.models.base import BlockNet
from fedkd.models.book import load
from fedkd.models.initial import initialise
from fedkd.rng import Rng
from fedkd.types import Arrays


def teacher_logits(teacher: BlockNet, data: Split) -> Tensor:
    """Return what a teacher says now about every example, logits (n, C), as a constant."""
    return infer(teacher, data.x, ())[0].clone()


PLAIN = KullbackLeibler()
"""What two networks teach each other by where nothing else is said."""


class NotTrue(Term):
    """Not-true distillation from constant teacher logits (n, C), indexed by training example.

    See :func:`~fedkd.distill.not_true.not_true_divergence`; ``weight`` is beta.
    """

    name = "not_true"
    teaches = True

    def __init__(self, logits: Tensor, temperature: float, weight: float) -> None:
        self.logits, self.temperature, self.weight = logits, temperature, weight

    def __call__(self, batch: Batch) -> Tensor:
        teacher = self.logits[batch.index]
        return not_true_divergence(batch.logits, teacher, batch.y, self.temperature)

    def compared(self, batch: Batch) -> Compared:
        teacher = functional.softmax(self.logits[batch.index] / self.temperature, dim=1)
        return Compared(batch.logits / self.temperature, teacher)

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        if not alike(NotTrue, terms, "temperature"):
            return None
        return NotTrue(torch.cat([t.logits for t in terms]), terms[0].temperature, terms[0].weight)


class LogitMatch(Term):
    """Mean squared difference ``1/C ||z - z_teacher||^2`` to constant teacher logits (n, C)."""

    name = "distil"
    teaches = True

    def __init__(self, logits: Tensor, weight: float) -> None:
        self.logits, self.weight = logits, weight

    def __call__(self, batch: Batch) -> Tensor:
        values = (batch.logits - self.logits[batch.index]).square().mean(-1)
        return values if values.dim() == 1 else row_mean(values, batch.y)

    def compared(self, batch: Batch) -> Compared:
        real = batch.y.flatten() != UNLABELLED
        teacher = functional.softmax(self.logits[batch.index].flatten(0, -2)[real], dim=1)
        return Compared(batch.logits.flatten(0, -2)[real], teacher)

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        if not alike(LogitMatch, terms):
            return None
        return LogitMatch(torch.cat([t.logits for t in terms]), terms[0].weight)


class Peer:
    """A second network on the batches of the first; it answers once a batch, whoever asks.

    Returns its logits (B, C) and the pooled features (B, d) of the blocks ``at``, with gradient. It
    is trained by the terms that list it in ``modules()``; without one it is a frozen teacher.
    """

    def __init__(self, net: BlockNet | Joined, at: frozenset[str] = frozenset()) -> None:
        self.net, self.at = net, at
        self._seen: tuple[Batch, Tensor, dict[str, Tensor]] | None = None
        self._joined: Peer | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self._seen is None or self._seen[0] is not batch:
            logits, features = self.net.forward_with_features(batch.x, self.at)
            wide = {at: widened(found) for at, found in features.items()}
            self._seen = (batch, widened(logits), wide)
        return self._seen[1:]

    def join(self, others: Sequence[Peer]) -> Peer | None:
        """Return this peer and those of other clients as one, the same for all who ask."""
        nets = (self.net, *(peer.net for peer in others))
        if any(peer.at != self.at for peer in others):
            return None
        if self._joined is None or self._members() != nets:
            net = join(nets)
            self._joined = None if net is None else Peer(net, self.at)
        return self._joined

    def _members(self) -> tuple[nn.Module, ...]:
        assert self._joined is not None and isinstance(self._joined.net, Joined)
        return self._joined.net.members


class TaskDivisor:
    """How wrong the network and its peer are together: ``CE(f(x), y) + CE(peer(x), y)``.

    Distillation divided by it counts little until both have learned something. ``per`` = ``batch``
    gives the sum of two means over the batch, ``example`` one number an example, (B,). It is at
    least ``floor``, so that a solved task does not blow up what is divided. With ``detach`` it is a
    weight; without, its gradient drives both cross-entropies *up* where the two disagree.
    Source: Wu et al., Nature Communications 2022.
    """

    def __init__(
        self, peer: Peer, per: Literal["batch", "example"], detach: bool, floor: float
    ) -> None:
        self.peer, self.per, self.detach, self.floor = peer, per, detach, floor

    def __call__(self, batch: Batch) -> Tensor:
        both = (batch.logits, self.peer(batch)[0])
        losses = [functional.cross_entropy(z, batch.y, reduction="none") for z in both]
        total = losses[0] + losses[1]
        total = total.mean() if self.per == "batch" else total
        return (total.detach() if self.detach else total).clamp_min(self.floor)


class PeerSupervised(Term):
    """Cross-entropy of the peer with the true label; trains the peer."""

    name = "peer_supervised"

    def __init__(self, peer: Peer, weight: float) -> None:
        self.peer, self.weight = peer, weight

    def __call__(self, batch: Batch) -> Tensor:
        return functional.cross_entropy(self.peer(batch)[0], batch.y, reduction="none")

    def modules(self) -> Sequence[nn.Module]:
        return (self.peer.net,)

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        peer = _joined(PeerSupervised, terms)
        return PeerSupervised(peer, terms[0].weight) if peer else None


class FromPeer(Led):
    """The network learns from its peer: ``D(softmax(z_peer) || softmax(z))``, z_peer constant."""

    name = "distil"
    teaches = True

    def __init__(
        self,
        peer: Peer,
        weight: float,
        objective: Objective = PLAIN,
        guide: Guide | None = None,
    ) -> None:
        self.peer, self.weight, self.objective = peer, weight, objective
        if objective.dp == "batch-coupled":
            self.dp = objective.dp
        self.led_by(guide)

    def __call__(self, batch: Batch) -> Tensor:
        probs = spoken(self.peer(batch)[0])
        return self.taught(self.objective, batch.logits, probs, 1.0, batch.y)

    def compared(self, batch: Batch) -> Compared:
        return Compared(batch.logits, spoken(self.peer(batch)[0]))

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        peer = _joined(FromPeer, terms)
        return FromPeer(peer, terms[0].weight, terms[0].objective) if peer else None


class ToPeer(Led):
    """The peer learns from the network: ``D(softmax(z) || softmax(z_peer))``, z a constant."""

    name = "peer_distil"
    teaches = True

    def __init__(
        self,
        peer: Peer,
        weight: float,
        objective: Objective = PLAIN,
        guide: Guide | None = None,
    ) -> None:
        self.peer, self.weight, self.objective = peer, weight, objective
        if objective.dp == "batch-coupled":
            self.dp = objective.dp
        self.led_by(guide)

    def __call__(self, batch: Batch) -> Tensor:
        probs = spoken(batch.logits)
        return self.taught(self.objective, self.peer(batch)[0], probs, 1.0, batch.y)

    def compared(self, batch: Batch) -> Compared:
        return Compared(self.peer(batch)[0], spoken(batch.logits), "@peer")

    def modules(self) -> Sequence[nn.Module]:
        return (self.peer.net, *super().modules())

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        peer = _joined(ToPeer, terms)
        return ToPeer(peer, terms[0].weight, terms[0].objective) if peer else None


class AdaptiveFromPeer(FromPeer):
    """:class:`FromPeer` divided by a :class:`TaskDivisor`, which couples a batch's examples."""

    dp = "batch-coupled"

    def __init__(
        self,
        peer: Peer,
        weight: float,
        divisor: TaskDivisor,
        objective: Objective = PLAIN,
        guide: Guide | None = None,
    ) -> None:
        super().__init__(peer, weight, objective, guide)
        self.divisor = divisor

    def __call__(self, batch: Batch) -> Tensor:
        return super().__call__(batch) / self.divisor(batch)


class AdaptiveToPeer(ToPeer):
    """:class:`ToPeer` divided by a :class:`TaskDivisor`, which couples a batch's examples."""

    dp = "batch-coupled"

    def __init__(
        self,
        peer: Peer,
        weight: float,
        divisor: TaskDivisor,
        objective: Objective = PLAIN,
        guide: Guide | None = None,
    ) -> None:
        super().__init__(peer, weight, objective, guide)
        self.divisor = divisor

    def __call__(self, batch: Batch) -> Tensor:
        return super().__call__(batch) / self.divisor(batch)


def _joined(
    owner: type[Term], terms: Sequence[PeerSupervised] | Sequence[FromPeer] | Sequence[ToPeer]
) -> Peer | None:
    """Return the peers of several clients' terms as one; None: the terms or networks differ."""
    first, *others = [term.peer for term in terms]
    options = () if owner is PeerSupervised else ("objective", "dp")
    if not alike(owner, terms, *options) or terms[0].dp == "batch-coupled" or led(terms):
        return None
    return first.join(others)


def spoken(logits: Tensor) -> Tensor:
    """Return what a network teaches, a constant: the softmax (B, C) of its logits."""
    return functional.softmax(logits.detach(), dim=1)


class HiddenMatch(Term):
    """Mean squared difference ``1/d ||h - W h_peer||^2`` of features behind a block of either.

    Both networks and the learnable ``projection`` W (d, d_peer) get its gradient: it is the
    network's loss, with the peer's side constant, and the peer's, with the network's, in one.
    Source: Wu et al., Nature Communications 2022; without attention maps.
    """

    dp = "batch-coupled"
    name = "hidden"

    def __init__(
        self,
        peer: Peer,
        blocks: tuple[str, str],
        projection: nn.Module,
        weight: float,
        divisor: TaskDivisor,
    ) -> None:
        self.peer, self.projection, self.divisor = peer, projection, divisor
        self.blocks, self.weight = blocks, weight

    def __call__(self, batch: Batch) -> Tensor:
        own, other = self.blocks
        projected = self.projection(self.peer(batch)[1][other])
        return (batch.features[own] - projected).square().mean(1) / self.divisor(batch)

    def at(self) -> frozenset[str]:
        return frozenset({self.blocks[0]})

    def modules(self) -> Sequence[nn.Module]:
        return (self.peer.net, self.projection)


def mutual(
    peer: Peer,
    own: tuple[float, float],
    other: tuple[float, float],
    divisor: TaskDivisor | None = None,
    objective: Objective = PLAIN,
    guides: tuple[Guide | None, Guide | None] = (None, None),
) -> list[Term]:
    """Return the terms of mutual learning of a network (``own``) and its peer (``other``).

    Either pair is (weight of the labels, weight of the other's predictions); a term of weight 0 is
    left out, so that a network that learns from labels only does so to the last bit. ``guides``
    lead what the network is taught by its peer, and what the peer is.
    """
    terms: list[Term] = [Supervised(own[0]), PeerSupervised(peer, other[0])]
    if divisor is None:
        terms += [
            FromPeer(peer, own[1], objective, guides[0]),
            ToPeer(peer, other[1], objective, guides[1]),
        ]
    else:
        terms += [
            AdaptiveFromPeer(peer, own[1], divisor, objective, guides[0]),
            AdaptiveToPeer(peer, other[1], divisor, objective, guides[1]),
        ]
    return [term for term in terms if term.weight]


def together(own: BlockNet, name: str, other: BlockNet) -> Predictor:
    """Return the predictors of two networks: ``own`` as ``personal``, ``other`` as ``name``."""
    return ByNetworks(name, (own, other), lambda x: {"personal": own(x), name: other(x)})


def projection(size: int, into: int, rng: Rng, weights: Arrays) -> nn.Linear:
    """Return a linear map R^size -> R^into without bias: ``weights``, or drawn from ``rng``."""
    with torch.device("meta"):
        layer = nn.Linear(size, into, bias=False)
    initialise(layer, rng)
    load(layer, weights)
    return layer
