"""DENSE: one round is enough where the server can make the inputs that it distils on.

Each batch has a generator of its own; the student learns on a bank of the last ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedkd.clients.chunk import CHUNK
from fedkd.clients.client import Client, Update
from fedkd.clients.guided import Guide
from fedkd.clients.local import Term
from fedkd.clients.synthesis import (
    Answers,
    BestBatch,
    Boundary,
    Fidelity,
    MatchedStatistics,
    Samples,
    codes_for,
    joined,
    train_generator,
)
from fedkd.clients.transfer import Ensemble, agreed, frozen, transfer
from fedkd.models.base import BlockNet
from fedkd.options import Count, NonNegative, Positive, options
from fedkd.privacy.payload import Payload
from fedkd.rng import Rng
from fedkd.strategies.base import Setting, strategies
from fedkd.strategies.data_free import DataFree
from fedkd.strategies.expected import Expected, Form, Group, of_payload
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and variance (d,) of the pooled features of each block."""


@strategies.register("dense")
@options
class Dense(DataFree):
    """Data-free one-shot federation on generated batches (a reconstruction).

    Each of ``synthesis_epochs`` trains a fresh generator and its noise for ``generator_steps`` on
    ``a CE(D(x), y) - b 1[s != t] KL(D || f_S) + c statistics`` (D: the ensemble, f_S: the student,
    s and t the classes that they name), banks the batch that this was lowest on, and takes its
    share of ``server_steps`` steps of ``T^2 KL(D || f_S)`` on the bank. Labels are uniform over
    the classes that some participant holds. Limits: ``server_steps = 0`` is FedAvg bit for bit; one
    client teaches the average what it already is. One-shot is ``rounds = 1``.
    Source: Zhang et al., DENSE: Data-Free One-Shot Federated Learning, NeurIPS 2022, and its
    released code.
    """

    source = "Zhang et al., NeurIPS 2022, and its released code"
    evidence = "reconstruction"

    temperature: Annotated[Positive, Field(description="T of student and teachers")] = 4.0
    server_steps: Annotated[
        int, Field(ge=0, description="steps of the student a round, all epochs; 0 is FedAvg")
    ] = 200
    generator_lr: Annotated[Positive, Field(description="learning rate of the generator")] = 1e-2
    synthesis_epochs: Annotated[
        Count, Field(description="fresh generators a round, each followed by distillation")
    ] = 10
    generator_steps: Annotated[Count, Field(description="steps of each fresh generator")] = 30
    bank_size: Annotated[
        Count, Field(description="generated batches that are kept, the oldest forgotten first")
    ] = 20
    boundary_weight: Annotated[
        NonNegative, Field(description="weight of samples between student and ensemble")
    ] = 1.0
    statistics_weight: Annotated[
        NonNegative,
        Field(description="weight of the clients' feature statistics; 0 sends none"),
    ] = 0.0
    statistics_blocks: Annotated[
        Literal["last", "all"], Field(description="blocks before the head whose features count")
    ] = "last"
    student_start: Annotated[
        Literal["average", "fresh"],
        Field(description="what the student starts from: the average, or initial weights"),
    ] = "average"

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        if not (self.fidelity_weight or self.boundary_weight or self.statistics_weight):
            found.append(
                "the generator has nothing to learn: strategy.fidelity_weight, boundary_weight and "
                "statistics_weight are all 0; set one of them above 0"
            )
        return found

    def local_update(self, client: Client, received: Arrays) -> Update:
        update = super().local_update(client, received)
        # A client without examples has no statistics; zeros would pull the generator to them.
        if not (self.statistics_weight and self.server_steps and len(client.data.train)):
            return update
        model = client.model(select(update.arrays, "model"))
        found = feature_statistics(model, client.data.train.x, self.blocks(model))
        return Update({**update.arrays, **found}, update.predictor, update.metrics)

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        """Nothing is declared of feature statistics: no mechanism bounds them."""
        if self.statistics_weight and self.server_steps:
            return None
        return super().declare(received, client, round_, setting)

    def uploads(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Expected | None:
        """Return weights and label counts, and of clients with examples feature statistics."""
        groups = of_payload(super().declare(received, client, round_, setting) or ())
        if not (self.statistics_weight and self.server_steps):
            return groups
        model, forms = setting.book.make(client.model), dict[str, Form]()
        for block in self.blocks(model):
            shape = (model.feature_size(setting.task, block),)
            forms[f"statistics/{block}/mean"] = Form("float32", shape)
            forms[f"statistics/{block}/variance"] = Form("float32", shape, low=0)
        return (*groups, Group((forms,), of_examples=True))

    def blocks(self, model: BlockNet) -> tuple[str, ...]:
        """Return the blocks whose statistics travel."""
        return model.block_names if self.statistics_blocks == "all" else model.block_names[-1:]

    def hardness(self) -> float:
        """Return the power that weighs samples by how hard they are for the ensemble."""
        return 0.0

    def lesson(
        self, bank: Samples, ensemble: Ensemble, epoch: int, setting: Setting, rng: Rng
    ) -> Samples:
        """Return the inputs that students learn on; may change the weights of ``ensemble``."""
        return bank

    def student(self, label: str, state: Arrays, setting: Setting) -> BlockNet:
        if self.student_start == "fresh":
            return setting.book.make(label, device=setting.device)
        return super().student(label, state, setting)

    def distil(
        self,
        state: Arrays,
        students: dict[str, BlockNet],
        uploads: Sequence[Upload],
        round_: int,
        setting: Setting,
    ) -> tuple[Arrays, Metrics]:
        ensemble = self.ensemble(uploads, setting)
        matched = self.matched(ensemble, uploads, setting)
        guides = {k: self.guide(round_, setting) for k in students}
        bank: list[Samples] = []
        metrics: Metrics = {}
        for epoch in range(self.synthesis_epochs):
            rng = self.stream(setting, round_, "synthesis", epoch)
            best = self.best_batch(ensemble, students, matched)
            self.synthesise(best, students, self.label_weights(uploads, setting), setting, rng)
            if best.samples is not None:
                bank = [*bank, best.samples][-self.bank_size :]
            for name, value in best.losses.items():
                key = f"server/generator/{name}"
                metrics[key] = metrics.get(key, 0.0) + value / self.synthesis_epochs
            lesson = self.lesson(joined(bank), ensemble, epoch, setting, rng.child("lesson"))
            last = round_ == setting.rounds and epoch == self.synthesis_epochs - 1
            metrics.update(self.teach(students, lesson, ensemble, epoch, rng, guides, last))
        return {}, metrics

    def best_batch(
        self, ensemble: Ensemble, students: Mapping[str, BlockNet], matched: Sequence[Statistics]
    ) -> BestBatch:
        """Return the losses of a generator, which keep the best batch."""
        answers = Answers(ensemble)
        terms: list[Term] = []
        if self.fidelity_weight:
            terms.append(Fidelity(answers, self.fidelity_weight, self.hardness()))
        if self.boundary_weight:
            share = self.boundary_weight / len(students)
            terms += [Boundary(answers, student, share) for student in students.values()]
        if self.statistics_weight:
            terms.append(MatchedStatistics(ensemble.teachers, matched, self.statistics_weight))
        return BestBatch(terms, answers)

    def synthesise(
        self,
        best: BestBatch,
        students: Mapping[str, BlockNet],
        counts: Tensor,
        setting: Setting,
        rng: Rng,
    ) -> None:
        """Train a fresh generator and its noise on ``best``, which keeps the best batch."""
        held = (counts > 0).to(counts.dtype)
        codes = codes_for(
            self.generator_batch_size, self.noise, held, rng.child("codes"), learned=True
        )
        generator = self.generator(setting, rng.child("weights"))
        training = self.generator_training(self.generator_steps)
        with ExitStack() as stack:
            for student in students.values():
                stack.enter_context(frozen(student))
            train_generator(generator, codes, [best], training, rng.child("batches"))

    def teach(
        self,
        students: Mapping[str, BlockNet],
        lesson: Samples,
        ensemble: Ensemble,
        epoch: int,
        rng: Rng,
        guides: Mapping[str, Guide | None],
        last: bool = False,
    ) -> Metrics:
        """Take this epoch's share of ``server_steps`` steps on the samples of a ``lesson``.

        ``last``: there are no further ones in the run, so that it is said how students agree.
        """
        ends = [self.server_steps * e // self.synthesis_epochs for e in (epoch, epoch + 1)]
        steps = ends[1] - ends[0]
        if not steps:
            return {}
        probs = ensemble.targets(lesson.x, self.temperature, lesson.y, lesson.answers)
        metrics: Metrics = {}
        for label, student in students.items():
            result = transfer(
                student,
                lesson.x,
                probs,
                objective=self.criterion(),
                temperature=self.temperature,
                training=self.student_training(steps),
                rng=rng.child("distil", label),
                labels=lesson.y,
                known=True,
                guide=self.listening(
                    guides[label], ensemble, lesson.x, self.temperature, lesson.answers
                ),
                measure=last,
            )
            metrics[f"server/distil/{label}"] = result.losses["distil"]
            metrics |= agreed(result, label)
        return metrics

    def matched(
        self, ensemble: Ensemble, uploads: Sequence[Upload], setting: Setting
    ) -> list[Statistics]:
        """Return the uploaded statistics of each teacher; empty for those that sent none."""
        chosen = [u for u in uploads if u.client.examples] or list(uploads)
        return [read_statistics(u.arrays, setting.device) for u in chosen]


def feature_statistics(model: BlockNet, x: Tensor, blocks: Sequence[str]) -> Arrays:
    """Return mean and variance of the pooled features of ``blocks`` over all of x (n, ...).

    ``statistics/<block>/mean`` and ``statistics/<block>/variance``, float32 (d,) each; the variance
    divides by n, so that one example has variance 0.
    """
    model.eval()
    with torch.no_grad():
        parts = [model.forward_with_features(part, blocks)[1] for part in x.split(CHUNK)]
    found: Arrays = {}
    for block in blocks:
        h = torch.cat([part[block] for part in parts])
        values = {"mean": h.mean(0), "variance": h.var(0, unbiased=False)}
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        found.update(prefixed(f"statistics/{block}", arrays))
    return found


def read_statistics(arrays: Arrays, device: torch.device | str) -> Statistics:
    """Return the statistics in an upload by block, as tensors on ``device``."""
    sent = select(arrays, "statistics")
    blocks = dict.fromkeys(key.rsplit("/", 1)[0] for key in sent)
    return {
        block: (
            torch.tensor(sent[f"{block}/mean"], device=device),
            torch.tensor(sent[f"{block}/variance"], device=device),
        )
        for block in blocks
    }
