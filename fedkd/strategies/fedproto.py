"""FedProto: clients share mean features of each class, and hold their own features near them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd.clients.class_terms import FeatureMatch
from fedkd.clients.client import Client, Predictor, Update, personal
from fedkd.clients.heads import infer
from fedkd.clients.local import Term
from fedkd.clients.terms import Supervised
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.options import NonNegative, options
from fedkd.privacy.payload import Payload, Table
from fedkd.rng import Rng
from fedkd.strategies.averaging import loss_metrics
from fedkd.strategies.base import Setting, Strategy, strategies
from fedkd.strategies.class_exchange import lesson, remember, summarise, tables, targets
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select

KIND = "prototypes"
FAR = 30.0
"""Nats by which a class without a prototype lies below all others: never chosen, a finite loss."""


@strategies.register("fedproto")
@options
class FedProto(Strategy):
    """Class means of features travel; features are held near the global mean of their class.

    ``CE(f(x), y) + lam ||h(x) - c_y||^2 / d``, h the features (d,) behind ``block``, c_y the mean
    of class y over the clients that hold it. Two predictors: ``personal``, the client's network,
    and ``prototype``, the nearest global prototype. Limits: lam = 0 leaves the networks to
    local-only bit for bit.
    Source: Tan et al., FedProto: Federated Prototype Learning across Heterogeneous Clients, AAAI
    2022, algorithm 1 and eq. 6.
    """

    source = "Tan et al., AAAI 2022, algorithm 1"
    mixed = True

    lam: Annotated[NonNegative, Field(description="weight of the distance to prototypes")] = 1.0
    block: Annotated[
        str | None,
        Field(description="block whose features are shared; none: the last before the head"),
    ] = None
    weighting: Annotated[
        Literal["uniform", "examples", "paper"],
        Field(description="weights of clients in a prototype; paper is eq. 6 as it is written"),
    ] = "uniform"
    predict: Annotated[
        Literal["personal", "prototype"], Field(description="the headline predictor")
    ] = "personal"

    def problems(self, setting: Setting) -> list[str]:
        """Refuse a block that a model does not have, and features of different sizes."""
        found, sizes = [], {}
        for label in sorted({c.model for c in setting.clients}):
            allowed = setting.book.blocks(label)[:-1]
            if self.block and self.block not in allowed:
                found.append(
                    f"strategy.block = {self.block!r}: model {label!r} does not have such a block "
                    f"before its head (allowed: {', '.join(allowed)})"
                )
            else:
                block = self.block or allowed[-1]
                sizes[label] = setting.book.make(label).feature_size(setting.task, block)
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{label}: {size}" for label, size in sizes.items())
            found.append(
                "clients have different architectures whose features differ in size "
                f"({listed}), so their prototypes cannot be averaged; make them equal, name "
                "another strategy.block, or use a strategy that shares soft labels (fd)"
            )
        return found

    def init(self, setting: Setting, rng: Rng) -> Arrays:
        return {}

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        return prefixed(KIND, select(state, KIND))

    def local_update(self, client: Client, received: Arrays) -> Update:
        model = client.model(select(client.state, "model"))
        block = self.block or model.block_names[-1]
        terms: list[Term] = [Supervised()]
        taught = select(received, KIND)
        if self.lam and taught:
            known = targets(taught, "features", client.task.classes, client.device)
            terms.append(FeatureMatch(known, block, self.lam))
        result = client.fit(model, terms)
        client.state.update(prefixed("model", to_arrays(model)))
        arrays = self._said(client, model, block)
        return Update(arrays, self._judged(client, model, received), loss_metrics(result.losses))

    def _said(self, client: Client, model: BlockNet, block: str) -> Arrays:
        _, features = infer(model, client.data.train.x, (block,))
        values = {"features": features[block]}
        return prefixed(KIND, summarise(client, values, self.weighting != "uniform"))

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        block = self.block or setting.book.blocks(client.model)[-2]
        size = setting.book.make(client.model).feature_size(setting.task, block)
        fields, counted = {"features": size}, self.weighting != "uniform"
        return (Table(KIND, setting.task.classes, fields, counted=counted),)

    def alone(self, setting: Setting) -> list[str]:
        if self.weighting != "paper":
            return []
        return [
            "strategy.weighting = 'paper' divides by how many clients hold a class, each of which "
            "it reads; set strategy.weighting = 'uniform'"
        ]

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        state = remember(state, uploads, KIND)
        said = tables(state, "features")
        by = "uniform" if self.weighting == "uniform" else "examples"
        fused = lesson(said, "features", setting.task.classes, by)
        if self.weighting == "paper" and fused:
            held = np.bincount(np.concatenate([t.labels for t in said.values()]))
            fused["features"] = fused["features"] / held[fused["labels"]][:, None].astype("float32")
        return {**state, **prefixed(KIND, fused)}, {}

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        return self._judged(client, client.model(select(client.state, "model")), received)

    def _judged(self, client: Client, model: BlockNet, received: Arrays) -> Predictor:
        """Return both predictors; as long as there is no prototype the network answers for both."""
        taught = select(received, KIND)
        if not taught:
            alone = personal(model)
            # Who is compared by prototypes has to be judged before there is one, too.
            named = ("personal",) if self.predict == "personal" else ("personal", "prototype")
            return lambda x: dict.fromkeys(named, alone(x)["personal"])
        block = self.block or model.block_names[-1]
        known = targets(taught, "features", client.task.classes, client.device)
        model.eval()

        def predict(x: Tensor) -> dict[str, Tensor]:
            logits, features = model.forward_with_features(x, (block,))
            near = nearest(features[block], known.probs, known.mask)
            return {"personal": logits, "prototype": near}

        return predict


def nearest(features: Tensor, prototypes: Tensor, known: Tensor) -> Tensor:
    """Return ``-||h - c||^2`` as logits (B, C): the nearest prototype is the answer.

    ``features`` (B, d), ``prototypes`` (C, d), ``known`` (C,). Classes without a prototype lie
    ``FAR`` below the worst known one, so that they are never chosen and the loss stays finite.
    """
    mode = "donot_use_mm_for_euclid_dist"
    scores = -torch.cdist(features, prototypes, compute_mode=mode).square()
    worst = scores[:, known].amin(1, keepdim=True)
    return torch.where(known, scores, worst - FAR)
