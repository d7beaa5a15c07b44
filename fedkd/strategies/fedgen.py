"""FedGen: the server learns a generator of features from clients' heads, clients learn from it.

What one client's head knows of a class reaches clients that never saw the class, as labelled
features just below the head; no input is ever made, and no public data are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from fedkd.clients.client import Client, Update
from fedkd.clients.generated_terms import Generated, GeneratedTargets, feature_shape, reader
from fedkd.clients.guided import guide_of
from fedkd.clients.local import FitResult, Term
from fedkd.clients.synthesis import (
    Answers,
    Diversity,
    Fidelity,
    TeacherFidelity,
    codes_for,
    train_generator,
)
from fedkd.clients.terms import Supervised
from fedkd.clients.training import Training
from fedkd.clients.transfer import Ensemble
from fedkd.distill.chosen import Chosen, ChosenPolicies, chosen, mixing, problems_of
from fedkd.distill.fusion_rules import MeanLogits, label_shares
from fedkd.distill.generator import feature_generator, filled
from fedkd.models.base import HEAD, BlockNet
from fedkd.models.book import ModelBook, to_arrays
from fedkd.options import Count, NonNegative, Positive, Ratio, options
from fedkd.privacy.payload import Histogram, Payload
from fedkd.rng import Rng, stream
from fedkd.strategies.averaging import ModelAveraging
from fedkd.strategies.base import Setting, strategies
from fedkd.strategies.data_free import COUNTS, label_counts_of
from fedkd.strategies.schedule import LayerSchedule
from fedkd.types import Arrays, ClientInfo, Metrics, Task, Upload, prefixed, select

LABELS = "meta/label_counts"
"""Server-side memory, int32 (K, C): the label counts that each client last sent."""
PRIOR = "counts/prior"
"""What clients draw labels from, float32 (C,), summing to 1; it travels beside the generator."""


@strategies.register("fedgen")
@options
class FedGen(ModelAveraging):
    """FedAvg with a generator of features, learned from the clients' heads, as a teacher.

    Server: ``min_G E_y,e CE(softmax(mean_k h_k(G(e, y))), y) + b exp(-diversity)``, h_k the
    participants' heads. Client: ``CE + alpha_t E_y,e CE(h(G(e, y)), y)``, y from the label
    distribution of the whole federation, ``alpha_t = alpha decay^(t - 1)``, from round 2 on.
    Limits: alpha = beta = 0 is FedAvg bit for bit, and nothing else is trained or sent.
    Source: Zhu et al., Data-Free Knowledge Distillation for Heterogeneous Federated Learning, ICML
    2021, eqs. 4 and 5.
    """

    source = "Zhu et al., ICML 2021, eqs. 4 and 5"

    share: Annotated[
        Literal["model", "head"], Field(description="what is averaged; head: the body is personal")
    ] = "model"
    alpha: Annotated[NonNegative, Field(description="weight of generated features at clients")] = (
        10.0
    )
    beta: Annotated[
        NonNegative, Field(description="weight of generated targets, of their code only; 0: none")
    ] = 0.0
    objective: Annotated[Chosen, Field(description="how generated targets are learned")] = "kl"
    policies: Annotated[
        ChosenPolicies, Field(description="target policies, one after another, see fedkd list")
    ] = None
    decay: Annotated[Ratio, Field(description="factor on alpha and beta a round")] = 0.98
    gen_batch_size: Annotated[Count, Field(description="generated features a local step")] = 32
    fidelity: Annotated[
        Literal["ensemble", "teachers"],
        Field(description="generator's loss: of mean logits, or of each head by label share"),
    ] = "ensemble"
    diversity_weight: Annotated[NonNegative, Field(description="b, weight of diversity")] = 1.0
    noise: Annotated[Count, Field(description="size of the generator's noise")] = 32
    generator_hidden: Annotated[Count, Field(description="hidden units of the generator")] = 256
    generator_steps: Annotated[Count, Field(description="steps of the generator a round")] = 50
    generator_batch_size: Annotated[Count, Field(description="samples a step of it")] = 32
    generator_lr: Annotated[Positive, Field(description="its learning rate (Adam)")] = 3e-4
    generator_weight_decay: Annotated[NonNegative, Field(description="its L2 penalty")] = 0.01

    @property
    def active(self) -> bool:
        """Whether clients use a generator at all."""
        return bool(self.alpha or self.beta)

    def schedule(self, blocks: Sequence[str]) -> LayerSchedule:
        return LayerSchedule.always(blocks if self.share == "model" else (HEAD,))

    def coupled(self) -> list[str]:
        found = mixing(self.objective, guided=self.policies) if self.beta else []
        return [*super().coupled(), *found]

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        found += problems_of(self.objective, guided=self.policies, offers=())
        if self.policies and not self.beta:
            found.append(
                "strategy.policies change generated targets, but strategy.beta = 0: there are none;"
                " set strategy.beta above 0, or leave strategy.policies out"
            )
        for label in setting.book.labels if self.active and not found else ():
            if not _readable(setting.book, label):
                found.append(
                    f"the head of model {label!r} reads where in a map something is, so that a "
                    "generated feature vector does not fit; use a model whose head averages maps "
                    "or reads a vector, or set strategy.alpha = strategy.beta = 0"
                )
        return found

    def init(self, setting: Setting, rng: Rng) -> Arrays:
        state = super().init(setting, rng)
        if self.active:
            clients = max(c.id for c in setting.clients) + 1
            state[LABELS] = np.zeros((clients, setting.task.classes), dtype=np.int32)
        return state

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        arrays = super().broadcast(state, client, round_, setting)
        generator = select(state, "generator")
        if not generator:
            return arrays
        counts = state[LABELS].sum(0, dtype=np.float64)
        # Noised counts may all be 0.
        counts = counts if counts.any() else np.ones_like(counts)
        prior = (counts / counts.sum()).astype(np.float32)
        return {**arrays, **prefixed("generator", generator), PRIOR: prior}

    def judging(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        # Nobody predicts with the generator.
        return super().broadcast(state, client, round_, setting)

    def terms(self, client: Client, model: BlockNet, received: Arrays) -> list[Term]:
        terms: list[Term] = [Supervised()]
        weights = select(received, "generator")
        if not weights:
            return terms
        head, rng = reader(model, client.task), client.rng("generated")
        generator = self.generator(model, client.task, rng, weights).to(client.device)
        prior = torch.from_numpy(received[PRIOR].copy()).to(client.device)
        faded = self.decay ** (client.round - 1)
        if self.alpha:
            terms.append(
                Generated(
                    head,
                    generator,
                    prior,
                    noise=self.noise,
                    size=self.gen_batch_size,
                    rng=rng.child("features"),
                    weight=self.alpha * faded,
                )
            )
        if self.beta:
            terms.append(
                GeneratedTargets(
                    head,
                    generator,
                    prior,
                    objective=chosen(self.objective),
                    noise=self.noise,
                    rng=rng.child("targets"),
                    weight=self.beta * faded,
                    guide=guide_of(self.policies, client),
                )
            )
        return terms

    def local_update(self, client: Client, received: Arrays) -> Update:
        update = super().local_update(client, received)
        if not self.active:
            return update
        arrays = {**update.arrays, **label_counts_of(client)}
        return Update(arrays, update.predictor, update.metrics)

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        weights = super().declare(received, client, round_, setting) or ()
        return (*weights, Histogram(COUNTS, setting.task.classes)) if self.active else weights

    def alone(self, setting: Setting) -> list[str]:
        read = ["its generator learns from every client's head by itself"] if self.active else []
        return [*super().alone(setting), *read]

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        known = select(state, "generator")
        state, metrics = super().aggregate(state, uploads, round_, setting)
        if not self.active:
            return state, metrics
        labels = state[LABELS].copy()
        for upload in uploads:
            labels[upload.client.id] = upload.arrays[COUNTS]
        state = {**state, LABELS: labels}
        # A client without examples sends back what it was sent: it has nothing to teach.
        teachers = [u for u in uploads if u.arrays[COUNTS].any()]
        if not teachers:
            return state, metrics
        generator, result = self.learn(known, teachers, round_, setting)
        more = {f"server/{name}": value for name, value in result.losses.items()}
        return {**state, **prefixed("generator", to_arrays(generator))}, {**metrics, **more}

    def generator(self, model: BlockNet, task: Task, rng: Rng, weights: Arrays) -> BlockNet:
        """Return the generator of features for the head of ``model``, with ``weights``."""
        size = math.prod(feature_shape(model, task))
        with torch.device("meta"):
            made = feature_generator(self.noise, task.classes, size, self.generator_hidden)
        return filled(made, rng, weights)

    def learn(
        self, known: Arrays, teachers: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[BlockNet, FitResult]:
        """Train the generator on from its ``known`` weights on the heads of ``teachers``, eq. 4.

        Labels are drawn in proportion to what the teachers hold: a class that none of them knows is
        not asked for in this round.
        """
        rng, device = stream(setting.seed, "server", "generator", round_), setting.device
        networks = [
            setting.book.make(u.client.model, select(u.arrays, "model"), device=device)
            for u in teachers
        ]
        generator = self.generator(networks[0], setting.task, rng.child("initial"), known)
        counts = torch.from_numpy(np.stack([u.arrays[COUNTS] for u in teachers])).float().to(device)
        heads = [reader(network, setting.task) for network in networks]
        answers = Answers(Ensemble(heads, MeanLogits(), label_shares(counts)))
        # As many codes as samples: noise and labels are fresh in every step.
        n = self.generator_steps * self.generator_batch_size
        codes = codes_for(n, self.noise, counts.sum(0), rng.child("codes"))
        ensemble = self.fidelity == "ensemble"
        terms: list[Term] = [Fidelity(answers) if ensemble else TeacherFidelity(answers)]
        if self.diversity_weight:
            terms.append(Diversity(codes, self.diversity_weight))
        training = Training(
            batch_size=self.generator_batch_size,
            optimizer="adam",
            lr=self.generator_lr,
            weight_decay=self.generator_weight_decay,
        )
        generator = generator.to(device)
        return generator, train_generator(generator, codes, terms, training, rng.child("batches"))


def _readable(book: ModelBook, label: str) -> bool:
    """Return whether the head of an architecture takes one feature vector, however shaped."""
    model = book.make(label)
    try:
        with torch.no_grad():
            reader(model, book.task)(torch.zeros(1, math.prod(feature_shape(model, book.task))))
    except RuntimeError:
        return False
    return True
