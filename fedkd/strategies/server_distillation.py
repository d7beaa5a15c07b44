"""What all methods share that distil on the server: options, teachers, and one student each.

After averaging, the uploaded networks become frozen teachers, and each global network learns from
all of them together; methods differ in the inputs that they learn on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedkd.clients.guided import Guide, guide
from fedkd.clients.training import Training
from fedkd.clients.transfer import Ensemble
from fedkd.distill.chosen import Chosen, ChosenPolicies, chosen, problems_of, retempering
from fedkd.distill.fusion_rules import fusions, label_shares
from fedkd.distill.objectives.base import Objective, Temperature
from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.options import Count, NotNegative, Positive, options
from fedkd.rng import Rng, stream
from fedkd.strategies.base import Setting
from fedkd.strategies.grouped import GroupedAveraging
from fedkd.types import Arrays, Metrics, Upload, prefixed, select


@options
class ServerDistillation(GroupedAveraging):
    """FedAvg, then ``server_steps`` steps of distillation from the ensemble of uploaded networks.

    ``w <- w - eta grad T^2 D(fuse_k softmax(f(w_k, x) / T) || softmax(f(w, x) / T))``. Limits:
    ``server_steps = 0`` is FedAvg bit for bit. Clients may have different architectures.
    """

    fusion: Annotated[
        str, Field(description="how teachers' answers are fused, see fedkd list fusions")
    ] = "mean-logits"
    objective: Annotated[Chosen, Field(description="distillation objective, see fedkd list")] = "kl"
    policies: Annotated[
        ChosenPolicies, Field(description="target policies, one after another, see fedkd list")
    ] = None
    temperature: Annotated[Positive, Field(description="T of student and teachers")] = 1.0
    server_steps: Annotated[
        NotNegative, Field(description="steps of the student a round; 0 is FedAvg")
    ] = 100
    server_batch_size: Annotated[Count, Field(description="inputs a step of the student")] = 64
    server_optimizer: Annotated[
        Literal["sgd", "adam"], Field(description="optimizer of the student")
    ] = "adam"
    server_momentum: Annotated[
        float, Field(ge=0, lt=1, description="momentum of the student's sgd")
    ] = 0.0
    server_lr: Annotated[Positive, Field(description="learning rate of the student")] = 1e-3

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        try:
            fusions.get(self.fusion)
        except ConfigError as error:
            found.append(f"strategy.fusion: {error}")
        if setting.swing is not None:
            found += retempering(self.policies)
        return found + problems_of(
            self.objective, guided=self.policies, offers=frozenset({"branches", "teachers"})
        )

    def alone(self, setting: Setting) -> list[str]:
        if not self.server_steps:
            return super().alone(setting)
        return [
            "its ensemble is made of every client's network by itself; set privacy.trust = 'local' "
            "(each client noises its own), or use a strategy that averages (fedavg, fedgkd)"
        ]

    def criterion(self) -> Objective:
        """Return the distillation objective."""
        return chosen(self.objective)

    def guide(self, round_: int, setting: Setting, steps: int | None = None) -> Guide | None:
        """Return the policies of a fit in a round; they begin anew in each."""
        steps = self.server_steps if steps is None else steps
        return guide(self.policies, round_, setting.rounds, steps, device=setting.device)

    def listening(
        self,
        by: Guide | None,
        ensemble: Ensemble,
        x: Tensor,
        at: Temperature,
        answers: Tensor | None = None,
    ) -> Guide | None:
        """Return a guide that knows what each teacher says of inputs x, where a policy asks."""
        if by is not None and "teachers" in by.needs:
            by.teachers = ensemble.each(x, at, answers)
        return by

    def student_training(self, steps: int | None = None) -> Training:
        """Return how the student is trained."""
        return Training(
            steps=self.server_steps if steps is None else steps,
            batch_size=self.server_batch_size,
            optimizer=self.server_optimizer,
            momentum=self.server_momentum,
            lr=self.server_lr,
        )

    def ensemble(self, uploads: Sequence[Upload], setting: Setting) -> Ensemble:
        """Return the uploaded networks of clients with examples as frozen teachers.

        A client without examples sends back what it was sent: it has nothing to teach. Where
        nobody has any, all are taken.
        """
        chosen = [u for u in uploads if u.client.examples] or list(uploads)
        teachers = [
            setting.book.make(u.client.model, select(u.arrays, "model"), device=setting.device)
            for u in chosen
        ]
        counts = [u.arrays["counts/labels"] for u in chosen if "counts/labels" in u.arrays]
        shares = None
        if len(counts) == len(chosen):
            shares = label_shares(torch.tensor([c.tolist() for c in counts]).float())
            shares = shares.to(setting.device)
        return Ensemble(teachers, fusions.get(self.fusion)(), shares)

    def student(self, label: str, state: Arrays, setting: Setting) -> BlockNet:
        """Return the global network of an architecture, as it stands after averaging."""
        weights = select(state, self.place(label, setting))
        return setting.book.make(label, weights, device=setting.device)

    def stream(self, setting: Setting, round_: int, *purpose: str | int) -> Rng:
        """Return the server's stream for a purpose in a round."""
        return stream(setting.seed, "server", *purpose, round_)

    @abstractmethod
    def distil(
        self,
        state: Arrays,
        students: dict[str, BlockNet],
        uploads: Sequence[Upload],
        round_: int,
        setting: Setting,
    ) -> tuple[Arrays, Metrics]:
        """Teach the ``students`` (by architecture) in place; return what else the server keeps."""

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        state, metrics = super().aggregate(state, uploads, round_, setting)
        if not self.server_steps:
            return state, metrics
        students = {k: self.student(k, state, setting) for k in self.labels(setting)}
        kept, more = self.distil(state, students, uploads, round_, setting)
        taught: Arrays = {}
        for label, student in students.items():
            taught.update(prefixed(self.place(label, setting), to_arrays(student)))
        return {**state, **kept, **taught}, {**metrics, **more}
