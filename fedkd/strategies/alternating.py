"""Data-free fine-tuning round after round: generator and student take turns after averaging.

FedFTG and DFRD differ in what the generator is trained for and in who else makes samples; the
turns, the optimizers that outlast a turn, and the generator kept between rounds are the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from fedkd.clients.guided import Guide
from fedkd.clients.local import FitResult, Term
from fedkd.clients.synthesis import Answers, Samples, codes_for, sample, train_generator
from fedkd.clients.training import Training
from fedkd.clients.transfer import Ensemble, agreed, frozen, transfer
from fedkd.distill.generator import Codes
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.options import Count, options
from fedkd.rng import Rng, stream
from fedkd.strategies.base import Setting
from fedkd.strategies.data_free import DataFree
from fedkd.types import Arrays, Metrics, Upload, prefixed, select

Lot = tuple[Samples, torch.Tensor]
"""Samples and the fused answers to them."""


class Continued(Training):
    """A training whose optimizer goes on from call to call, for networks that take turns.

    The loop makes a fresh optimizer each time; with turns of a few steps that would take the
    averages from Adam, and momentum from sgd.
    """

    optimizer_in_use: torch.optim.Optimizer

    def __init__(self, training: Training, network: nn.Module) -> None:
        super().__init__(**asdict(training))
        made = training.make(list(network.parameters()), training.lr)
        object.__setattr__(self, "optimizer_in_use", made)

    def make(self, parameters: object, lr: float) -> torch.optim.Optimizer:
        """Return the one optimizer, with what it remembers."""
        return self.optimizer_in_use


@options
class Alternating(DataFree):
    """``server_steps`` steps of the student a round, ``student_steps`` after each of the generator.

    One turn is ``generator_steps`` steps of the generator on its terms, the students held, and then
    up to ``student_steps`` steps of each student on samples never seen before. The generator is
    kept on the server from round to round and never travels. ``server_steps = 0`` is FedAvg bit for
    bit.

    ``replay`` is not in the papers: a turn of the generator costs many turns of the student, and
    with ``replay = m`` only every m-th has one. The samples of one turn and the fused answers to
    them are kept, ``student_steps * server_batch_size`` of them for each student; ``replay = 1`` is
    the published method bit for bit.
    """

    fusion: Annotated[
        str, Field(description="how teachers' answers are fused, see fedkd list fusions")
    ] = "class-counts"
    student_steps: Annotated[
        Count, Field(description="steps of the student a turn; server_steps counts them all")
    ] = 5
    generator_steps: Annotated[Count, Field(description="steps of the generator a turn")] = 1
    replay: Annotated[
        Count | None,
        Field(
            description="turns of the student on the same samples, the teachers' answers kept, "
            "before the generator has its next; none: new ones in each turn, as published"
        ),
    ] = None

    @abstractmethod
    def generator_terms(
        self, answers: Answers, codes: Codes, students: Sequence[BlockNet]
    ) -> list[Term]:
        """Return what the generator is trained for; ``students`` are held constant."""

    def makers(
        self, generator: BlockNet, state: Arrays, setting: Setting
    ) -> list[tuple[float, BlockNet]]:
        """Return who makes what share of the student's samples; shares sum to 1."""
        return [(1.0, generator)]

    def remembered(self, state: Arrays, generator: BlockNet) -> Arrays:
        """Return what the server keeps of the round beside the global networks."""
        return prefixed("generator", to_arrays(generator))

    def distil(
        self,
        state: Arrays,
        students: dict[str, BlockNet],
        uploads: Sequence[Upload],
        round_: int,
        setting: Setting,
    ) -> tuple[Arrays, Metrics]:
        if not any(u.client.examples for u in uploads):
            return {}, {}  # Nobody has seen anything: their answers are the student's own.
        labels = self.label_weights(uploads, setting)
        ensemble = self.ensemble(uploads, setting)
        start = stream(setting.seed, "server", "generator")
        generator = self.generator(setting, start, select(state, "generator"))
        makers = self.makers(generator, state, setting)
        making = Continued(self.generator_training(self.generator_steps), generator)
        # No number of steps: a turn is one pass over as many samples as it has steps for.
        learning = {k: Continued(self.student_training(0), s) for k, s in students.items()}
        guides = {k: self.guide(round_, setting) for k in students}
        losses: dict[str, list[float]] = {}
        bank: dict[str, Lot] = {}
        for turn, first in enumerate(range(0, self.server_steps, self.student_steps)):
            steps = min(self.student_steps, self.server_steps - first)
            rng, found = self.stream(setting, round_, "turn", turn), dict[str, float]()
            if turn % (self.replay or 1) == 0:
                bank = {}
                found = self._make(generator, making, ensemble, students, labels, rng)
            for label, student in students.items():
                own, n = rng.child("student", label), steps * self.server_batch_size
                if label not in bank:
                    made = self._samples(n, makers, labels, own.child("samples"))
                    bank[label] = made, ensemble.targets(made.x, self.temperature, made.y)
                last = round_ == setting.rounds and first + steps == self.server_steps
                by = self.listening(guides[label], ensemble, bank[label][0].x, self.temperature)
                result = self._teach(student, bank[label], n, learning[label], own, by, last)
                found[f"distil/{label}"] = result.losses["distil"]
                losses |= {name: [value] for name, value in agreed(result, label).items()}
            for name, loss in found.items():
                losses.setdefault(f"server/{name}", []).append(loss)
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        return self.remembered(state, generator), means

    def _make(
        self,
        generator: BlockNet,
        training: Training,
        ensemble: Ensemble,
        students: dict[str, BlockNet],
        labels: torch.Tensor,
        rng: Rng,
    ) -> dict[str, float]:
        """Give the generator its turn, in place; return its losses."""
        n = self.generator_steps * self.generator_batch_size
        codes = codes_for(n, self.noise, labels, rng.child("codes"))
        with ExitStack() as held:
            networks = [held.enter_context(frozen(s)) for s in students.values()]
            terms = self.generator_terms(Answers(ensemble), codes, networks)
            result = train_generator(generator, codes, terms, training, rng.child("generator"))
        return result.losses

    def _samples(
        self, n: int, makers: list[tuple[float, BlockNet]], labels: torch.Tensor, rng: Rng
    ) -> Samples:
        """Return n samples of labels in proportion to ``labels`` (C,)."""
        parts, left, mass = [], n, 1.0
        for i, (share, maker) in enumerate(makers):
            size = round(left * share / mass)
            left, mass = left - size, mass - share
            if size:
                parts.append(sample(maker, codes_for(size, self.noise, labels, rng.child(i))))
        return Samples(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))

    def _teach(
        self,
        student: BlockNet,
        lot: Lot,
        n: int,
        training: Training,
        rng: Rng,
        guide: Guide | None,
        last: bool,
    ) -> FitResult:
        """Give a student its turn in place, one pass over the first n of a lot."""
        made, probs = lot
        return transfer(
            student,
            made.x[:n],
            probs[:n],
            objective=self.criterion(),
            temperature=self.temperature,
            training=training,
            rng=rng,
            labels=made.y[:n],
            known=True,
            guide=guide,
            measure=last,
        )
