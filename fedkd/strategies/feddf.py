"""FedDF: averaging is only the start; the server distils the ensemble into the average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedkd.clients.local import Term
from fedkd.clients.swing_targets import softening
from fedkd.clients.synthesis import (
    Answers,
    Diversity,
    Fidelity,
    codes_for,
    sample,
    train_generator,
)
from fedkd.clients.transfer import Ensemble, agreed, transfer
from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.options import Count, NonNegative, options
from fedkd.strategies.base import Setting, strategies
from fedkd.strategies.data_free import DataFree
from fedkd.types import Arrays, Metrics, Upload, prefixed, select


@strategies.register("feddf")
@options
class FedDF(DataFree):
    """Ensemble distillation for model fusion, on a public pool or on generated inputs.

    ``x_0 = sum_k p_k w_k``, then ``x <- x - eta grad KL(softmax(mean_k f(w_k, d)) || softmax(f(x,
    d)))`` on unlabelled inputs d. With clients of several architectures there is one student for
    each, all taught by the ensemble of everybody. Limits: ``server_steps = 0`` is FedAvg bit for
    bit; one client teaches the average what it already is (sgd stays, adam drifts by rounding).
    Source: Lin et al., Ensemble Distillation for Robust Model Fusion in Federated Learning, NeurIPS
    2020, algorithms 1 and 3; the generator, which the paper takes as given, is trained here.
    """

    source = "Lin et al., NeurIPS 2020, algorithms 1 and 3"
    swings = "public"
    sequences = True

    inputs: Annotated[
        Literal["public", "generator"],
        Field(description="what the student learns on: data.public, or generated inputs"),
    ] = "public"
    generator_steps: Annotated[
        Count, Field(description="steps of the generator a round, under inputs = 'generator'")
    ] = 50
    generated: Annotated[
        Count, Field(description="inputs generated a round, under inputs = 'generator'")
    ] = 1024
    diversity_weight: Annotated[
        NonNegative, Field(description="weight of the generator's diversity term")
    ] = 1.0

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        if setting.task.sequence and (self.inputs == "generator" or self.fusion == "class-counts"):
            found.append(
                "text has no generator and no label counts; set strategy.inputs = 'public' and a "
                "strategy.fusion other than 'class-counts'"
            )
        if self.inputs == "generator" and not (self.fidelity_weight or self.diversity_weight):
            found.append(
                "the generator has nothing to learn: strategy.fidelity_weight and diversity_weight "
                "are both 0; set one of them above 0, or strategy.inputs = 'public'"
            )
        if self.inputs == "generator" and setting.swing is not None:
            found.append(
                "privacy.swing says how private an example of the pool is, but strategy.inputs = "
                "'generator' makes its own; set strategy.inputs = 'public', or privacy.swing.map "
                "= 'off'"
            )
        return found

    def needs_public(self) -> bool:
        return self.server_steps > 0 and self.inputs == "public"

    def sends_counts(self) -> bool:
        needed = self.inputs == "generator" or self.fusion == "class-counts"
        return self.server_steps > 0 and needed

    def distil(
        self,
        state: Arrays,
        students: dict[str, BlockNet],
        uploads: Sequence[Upload],
        round_: int,
        setting: Setting,
    ) -> tuple[Arrays, Metrics]:
        ensemble = self.ensemble(uploads, setting)
        kept: Arrays = {}
        labels: torch.Tensor | None = None
        metrics: Metrics = {}
        if self.inputs == "public":
            if setting.public is None:
                raise ConfigError("strategy 'feddf' needs a public pool; set data.public.size")
            x = setting.public.x.to(setting.device)
        else:
            x, labels, kept, metrics = self._generated(state, ensemble, uploads, round_, setting)
        swing = None
        if self.inputs == "public":
            swing = softening(setting.swing, setting.public_temperatures, device=setting.device)
        at = self.temperature if swing is None else swing.temperatures
        # One pass of the teachers over the inputs serves every step and every student.
        probs = ensemble.targets(x, at, labels)
        if swing is not None:
            probs = swing.of_probs(probs, self.stream(setting, round_, "swing"))
        known = setting.public.y if labels is None and setting.public is not None else None
        if known is not None and (setting.task.sequence or bool((known >= 0).all())):
            # For the reader only: a student can hardly be better than what it is taught.
            hits = (probs.argmax(-1) == known.to(probs.device))[known >= 0].float()
            metrics["server/ensemble_accuracy"] = float(hits.mean())
        for label, student in students.items():
            result = transfer(
                student,
                x,
                probs,
                objective=self.criterion(),
                temperature=at,
                rescale=swing is None or swing.rescale,
                weights=None if swing is None else swing.weights,
                labels=known if setting.task.sequence else labels,
                known=labels is not None,
                guide=self.listening(self.guide(round_, setting), ensemble, x, at),
                training=self.student_training(),
                rng=self.stream(setting, round_, "distil", label),
                measure=round_ == setting.rounds,
            )
            metrics |= agreed(result, label)
            metrics[f"server/distil/{label}"] = sum(result.losses.values())
        return kept, metrics

    def _generated(
        self,
        state: Arrays,
        ensemble: Ensemble,
        uploads: Sequence[Upload],
        round_: int,
        setting: Setting,
    ) -> tuple[torch.Tensor, torch.Tensor, Arrays, Metrics]:
        """Train the generator of the last round on, and return what it makes."""
        rng = self.stream(setting, round_, "generator")
        generator = self.generator(setting, rng.child("init"), select(state, "generator"))
        weights = self.label_weights(uploads, setting)
        count = self.generator_steps * self.generator_batch_size
        codes = codes_for(count, self.noise, weights, rng.child("codes"))
        terms: list[Term] = []
        if self.fidelity_weight:
            terms.append(Fidelity(Answers(ensemble), self.fidelity_weight))
        if self.diversity_weight:
            terms.append(Diversity(codes, self.diversity_weight))
        result = train_generator(
            generator,
            codes,
            terms,
            self.generator_training(self.generator_steps),
            rng.child("train"),
        )
        made = sample(
            generator, codes_for(self.generated, self.noise, weights, rng.child("sample"))
        )
        metrics = {f"server/{name}": value for name, value in result.losses.items()}
        return made.x, made.y, prefixed("generator", to_arrays(generator)), metrics
