"""FedKD of Wu et al. (2022): a big personal mentor and a small shared mentee teach each other.

The name carries authors and year because the published method and this library share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import nn

from fedkd.clients.client import Client, Predictor, Update
from fedkd.clients.guided import guide_of
from fedkd.clients.local import Term
from fedkd.clients.teacher_terms import (
    HiddenMatch,
    Peer,
    TaskDivisor,
    mutual,
    projection,
    together,
)
from fedkd.distill.chosen import Chosen, ChosenPolicies, chosen, problems_of
from fedkd.distill.low_rank import Factors, factorise, most_rank, restore
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.options import NonNegative, Positive, Ratio, options
from fedkd.privacy.payload import Payload, Weights
from fedkd.rng import Rng
from fedkd.strategies.averaging import LAST_ROUND, ModelAveraging, loss_metrics
from fedkd.strategies.base import Setting, strategies
from fedkd.strategies.expected import Expected, Form, Group
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select


@strategies.register("fedkd-wu2022")
@options
class FedKDWu2022(ModelAveraging):
    """A personal mentor and an averaged mentee in adaptive mutual distillation, low-rank updates.

    ``L_t = CE_t + [kd_weight KL(s || t) + hidden_weight MSE(h_t, W h_s)] / (CE_t + CE_s)`` for the
    mentor t, the same with s and t exchanged in KL for the mentee s, whose architecture is the
    federation's first. A weight of the mentee travels as the truncated SVD of its update that keeps
    the energy ``T(r) = energy_start + (energy_end - energy_start) r / R`` in round r of R, where
    that is smaller. Limits: kd_weight = hidden_weight = 0 makes mentors local-only's networks; with
    both energies 1 the mentee then is FedAvg's model, bit for bit.
    Source: Wu et al., Communication-efficient federated learning via knowledge distillation, Nature
    Communications 13 (2022).
    """

    source = "Wu et al., Nature Communications 13 (2022)"
    mixed = True

    kd_weight: Annotated[
        NonNegative, Field(description="weight of the two divergences of predictions")
    ] = 1.0
    objective: Annotated[
        Chosen | None,
        Field(description="what each learns from the other by, see fedkd list; none: kl"),
    ] = None
    policies: Annotated[
        ChosenPolicies, Field(description="target policies, one after another, see fedkd list")
    ] = None
    hidden_weight: Annotated[
        NonNegative, Field(description="weight of the distance of last features")
    ] = 1.0
    divisor: Annotated[
        Literal["batch", "example"],
        Field(description="CE_t + CE_s as means over the batch, or of each example"),
    ] = "batch"
    detach_divisor: Annotated[
        bool, Field(description="whether CE_t + CE_s is a weight, without gradient of its own")
    ] = True
    divisor_floor: Annotated[
        Positive, Field(description="CE_t + CE_s counts at least this (nats)")
    ] = 0.1
    energy_start: Annotated[
        Ratio, Field(description="energy of an update that is kept at the start; 1: no SVD")
    ] = 0.95
    energy_end: Annotated[
        Ratio, Field(description="energy kept in the last round; 1: no SVD there")
    ] = 0.98

    def energy(self, round_: int, rounds: int) -> float:
        """Return the share of an update's energy (squared norm) that is kept in a round."""
        return self.energy_start + (self.energy_end - self.energy_start) * round_ / rounds

    def compresses(self) -> bool:
        """Return whether updates are factorised in any round."""
        return min(self.energy_start, self.energy_end) < 1

    def problems(self, setting: Setting) -> list[str]:
        return problems_of(self.objective or "kl", guided=self.policies, offers=())

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        """Send the last update to whoever holds what it was made to, the whole mentee to others.

        A participant keeps the mentee that it received. The last update was made in the last round
        that anybody took part in, so it fits for those who took part in it; newcomers and whoever
        missed an update get all weights.
        """
        weights, last = select(state, "model"), state[LAST_ROUND]
        mine = int(last[client.id])
        current = mine > 0 and mine == int(last.max())
        return _packed(weights, _last_update(state) if current else {})

    def local_update(self, client: Client, received: Arrays) -> Update:
        start = self._received(client, received)
        mentor, mentee = self._networks(client, start)
        hidden = self._projection(client, mentor, mentee) if self.hidden_weight else None
        result = client.fit(mentor, self._terms(client, mentor, mentee, hidden))
        client.state.update(prefixed("mentor", to_arrays(mentor)))
        if hidden is not None:
            client.state.update(prefixed("projection", to_arrays(hidden)))
        trained, factors = to_arrays(mentee), {}
        if self.compresses():
            client.state.update(prefixed("mentee", start))
            factors = _factors(trained, start, self.energy(client.round, client.rounds))
        predictor = together(mentor, "mentee", mentee)
        return Update(_packed(trained, factors), predictor, loss_metrics(result.losses))

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        """Average the mentees; what the update loses in being sent is lost for the server too."""
        before = select(state, "model")
        whole = [replace(u, arrays=prefixed("model", _unpacked(before, u.arrays))) for u in uploads]
        state, metrics = super().aggregate(state, whole, round_, setting)
        if not self.compresses():
            return state, metrics
        after = select(state, "model")
        factors = _factors(after, before, self.energy(round_, setting.rounds))
        for key, pair in factors.items():
            state[f"model/{key}"] = restore(before[key], pair)
        return {**state, **_stored(after, factors)}, metrics

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        """Nothing is declared of factors: how many there are follows from a client's own data."""
        if self.compresses():
            return None
        return (Weights(prefixed("model", select(received, "model"))),)

    def uploads(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Expected | None:
        """Return for each weight of the mentee itself, or factors of an update smaller than it."""
        energy = self.energy(round_, setting.rounds)
        mentee = setting.book.initial(setting.book.labels[0])
        return tuple(_either(key, weight, energy) for key, weight in mentee.items())

    def coupled(self) -> list[str]:
        if not (self.kd_weight or self.hidden_weight):
            return []
        return [
            "its divergences are divided by losses of the whole batch; set strategy.kd_weight = 0 "
            "and strategy.hidden_weight = 0, or use strategy 'fml' for mutual learning"
        ]

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        mentor, mentee = self._networks(client, self._received(client, received))
        return together(mentor, "mentee", mentee)

    def _received(self, client: Client, received: Arrays) -> Arrays:
        return _unpacked(select(client.state, "mentee"), received)

    def _networks(self, client: Client, mentee: Arrays) -> tuple[BlockNet, BlockNet]:
        mentor = client.model(select(client.state, "mentor"))
        return mentor, client.book.make(client.book.labels[0], mentee, device=client.device)

    def _projection(self, client: Client, mentor: BlockNet, mentee: BlockNet) -> nn.Module:
        """Return the client's own map from the mentee's last features to the mentor's."""
        size, into = (
            net.feature_size(client.task, net.block_names[-1]) for net in (mentee, mentor)
        )
        rng, kept = Rng(client.seed, ("projection",)), select(client.state, "projection")
        return projection(size, into, rng, kept).to(client.device)

    def _terms(
        self, client: Client, mentor: BlockNet, mentee: BlockNet, hidden: nn.Module | None
    ) -> list[Term]:
        blocks = (mentor.block_names[-1], mentee.block_names[-1])
        peer = Peer(mentee, frozenset({blocks[1]}) if hidden is not None else frozenset())
        divisor = TaskDivisor(peer, self.divisor, self.detach_divisor, self.divisor_floor)
        weights = (1.0, self.kd_weight)
        # Either direction has policies of its own: they learn from other losses.
        guides = (
            guide_of(self.policies, client, place="policies/mentor"),
            guide_of(self.policies, client, place="policies/mentee"),
        )
        terms = mutual(peer, weights, weights, divisor, chosen(self.objective or "kl"), guides)
        if hidden is not None:
            terms.append(HiddenMatch(peer, blocks, hidden, self.hidden_weight, divisor))
        return terms


def _factors(after: Arrays, before: Arrays, energy: float) -> dict[str, Factors]:
    """Return the factors of every weight's update for which they are smaller than the weight."""
    found = {key: factorise(after[key] - before[key], energy) for key in after}
    return {key: pair for key, pair in found.items() if pair is not None}


def _either(key: str, weight: np.ndarray, energy: float) -> Group:
    """Return the forms in which a weight may travel."""
    dtype, plain = str(weight.dtype), {f"model/{key}": Form(str(weight.dtype), weight.shape)}
    most = most_rank(weight.shape) if energy < 1 else 0
    if not most:
        return Group((plain,))
    factors = {
        f"factors/{key}/u": Form(dtype, (len(weight), "rank")),
        f"factors/{key}/sv": Form(dtype, ("rank", weight.size // len(weight))),
    }
    return Group((plain, factors), {"rank": (1, most)})


def _packed(weights: Arrays, factors: dict[str, Factors]) -> Arrays:
    """Return what travels: factors of the update where there are some, else the weight itself."""
    arrays = prefixed("model", {k: w for k, w in weights.items() if k not in factors})
    for key, (u, sv) in factors.items():
        arrays |= {f"factors/{key}/u": u, f"factors/{key}/sv": sv}
    return arrays


def _unpacked(base: Arrays, arrays: Arrays) -> Arrays:
    """Return the weights that were sent: plain ones, and ``base`` with the updates that came."""
    weights, factors = select(arrays, "model"), select(arrays, "factors")
    for key in (name.removesuffix("/u") for name in factors if name.endswith("/u")):
        pair = (factors[f"{key}/u"], factors[f"{key}/sv"])
        weights[key] = restore(base[key], pair)
    return weights


def _stored(weights: Arrays, factors: dict[str, Factors]) -> Arrays:
    """Return the last update as the server keeps it: padded to one size, so that memory is fixed.

    ``last/<key>/rank`` is 0 where the weight itself has to be sent.
    """
    arrays: Arrays = {}
    for key, weight in weights.items():
        most = most_rank(weight.shape)
        if not most:
            continue
        rank = np.zeros(1, dtype=np.int64)
        u = np.zeros((len(weight), most), dtype=weight.dtype)
        sv = np.zeros((most, weight.size // len(weight)), dtype=weight.dtype)
        if key in factors:
            rank[0] = factors[key][0].shape[1]
            u[:, : rank[0]], sv[: rank[0]] = factors[key]
        arrays |= {f"last/{key}/rank": rank, f"last/{key}/u": u, f"last/{key}/sv": sv}
    return arrays


def _last_update(state: Arrays) -> dict[str, Factors]:
    """Return the factors of the last update of the mentee, as :func:`_stored` keeps them."""
    last = select(state, "last")
    keys = [name.removesuffix("/rank") for name in last if name.endswith("/rank")]
    ranks = {key: int(last[f"{key}/rank"][0]) for key in keys}
    return {
        key: (last[f"{key}/u"][:, :rank], last[f"{key}/sv"][:rank])
        for key, rank in ranks.items()
        if rank
    }
