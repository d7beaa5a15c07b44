"""FedHKD: federated averaging beside which class means of features and soft predictions travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from fedkd.clients.class_terms import FeatureMatch, HeadOnClasses, head_inputs
from fedkd.clients.client import Client, Update, personal
from fedkd.clients.guided import guide_of
from fedkd.clients.heads import infer, soften
from fedkd.clients.local import Term
from fedkd.clients.terms import Supervised
from fedkd.distill.chosen import Chosen, ChosenPolicies, chosen, learns, named, problems_of
from fedkd.models.base import HEAD, BlockNet
from fedkd.options import NonNegative, Positive, options
from fedkd.privacy.payload import Payload, Table
from fedkd.strategies.averaging import ModelAveraging, loss_metrics
from fedkd.strategies.base import Setting, strategies
from fedkd.strategies.class_exchange import PROBS, lesson, remember, summarise, tables, targets
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select

KIND = "prototypes"


@strategies.register("fedhkd")
@options
class FedHKD(ModelAveraging):
    """FedAvg with hyper-knowledge, mean features and soft predictions by class (a reconstruction).

    ``CE(f(x), y) + lam mean_c T^2 D(Q_c || softmax(g(H_c) / T)) + gamma ||h(x) - H_y||^2 / d``

    with the head g, the features h (d,) before it, and the global class means H, Q over the
    clients that hold the class. No noise is added: nothing about privacy is claimed. Limits:
    lam = gamma = 0 is FedAvg bit for bit.
    Source: Chen et al., The Best of Both Worlds: Accurate Global and Personalized Models through
    Federated Learning with Data-Free Hyper-Knowledge Distillation, ICLR 2023.
    """

    source = "Chen et al., ICLR 2023, arXiv:2301.08968"
    evidence = "reconstruction"

    lam: Annotated[
        NonNegative, Field(description="weight of the head's distillation on global features")
    ] = 0.05
    gamma: Annotated[
        NonNegative, Field(description="weight of the distance to global features")
    ] = 0.05
    objective: Annotated[Chosen, Field(description="distillation objective, see fedkd list")] = "kl"
    policies: Annotated[
        ChosenPolicies, Field(description="target policies, one after another, see fedkd list")
    ] = None
    temperature: Annotated[Positive, Field(description="T of the soft predictions")] = 0.5
    label_weighting: Annotated[
        Literal["uniform", "examples"],
        Field(description="weights of clients in a class mean; examples sends their numbers"),
    ] = "examples"

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        return found + problems_of(self.objective, guided=self.policies, offers=())

    def coupled(self) -> list[str]:
        # What policies make of classes mixes no examples; only what is trained gets their noise.
        trained = [p for p in self.policies or () if self.lam and learns(p)]
        return [
            *super().coupled(),
            *(
                f"strategy.policies = {named(p)!r} is trained along "
                "with the network, so it would get noise that hides nobody; use 'temperature', or "
                "privacy.unit = 'client'"
                for p in trained
            ),
        ]

    def fields(self) -> tuple[str, ...]:
        """Return what travels by class: features, and soft predictions where ``lam`` is not 0."""
        if not (self.lam or self.gamma):
            return ()
        return ("features", "probs") if self.lam else ("features",)

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        weights = self.judging(state, client, round_, setting)
        return {**weights, **prefixed(KIND, select(state, KIND))}

    def judging(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        return super().broadcast(state, client, round_, setting)

    def terms(self, client: Client, model: BlockNet, received: Arrays) -> list[Term]:
        terms: list[Term] = [Supervised()]
        taught = select(received, KIND)
        if not taught:
            return terms
        if self.lam:
            features, probs = (
                torch.from_numpy(taught[field].copy()).to(client.device)
                for field in ("features", "probs")
            )
            inputs = head_inputs(model, client.task, features)
            objective, head = chosen(self.objective), model.get_submodule(HEAD)
            labels = torch.from_numpy(taught["labels"].astype(np.int64)).to(client.device)
            term = HeadOnClasses(
                head,
                inputs,
                probs,
                objective,
                self.temperature,
                self.lam,
                guide=guide_of(self.policies, client),
                labels=labels,
            )
            terms.append(term)
        if self.gamma:
            known = targets(taught, "features", client.task.classes, client.device)
            terms.append(FeatureMatch(known, model.block_names[-1], self.gamma))
        return terms

    def local_update(self, client: Client, received: Arrays) -> Update:
        model = self.start(client, received)
        result = client.fit(model, self.terms(client, model, received))
        arrays = {**self.finish(client, model), **self._said(client, model)}
        return Update(arrays, personal(model), loss_metrics(result.losses))

    def _said(self, client: Client, model: BlockNet) -> Arrays:
        if not self.fields():
            return {}
        block = model.block_names[-1]
        logits, features = infer(model, client.data.train.x, (block,))
        known = {"features": features[block], "probs": soften(logits, self.temperature)}
        values = {field: known[field] for field in self.fields()}
        return prefixed(KIND, summarise(client, values, self.label_weighting == "examples"))

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        weights = super().declare(received, client, round_, setting) or ()
        if not self.fields():
            return weights
        classes, book = setting.task.classes, setting.book
        last = book.blocks(client.model)[-2]
        sizes = {
            "features": book.make(client.model).feature_size(setting.task, last),
            "probs": classes,
        }
        fields = {field: sizes[field] for field in self.fields()}
        counted = self.label_weighting == "examples"
        return (*weights, Table(KIND, classes, fields, PROBS & set(fields), counted))

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        state, metrics = super().aggregate(state, uploads, round_, setting)
        state = remember(state, uploads, KIND)
        for field in self.fields():
            said, classes = tables(state, field), setting.task.classes
            state = {
                **state,
                **prefixed(KIND, lesson(said, field, classes, self.label_weighting)),
            }
        return state, metrics
