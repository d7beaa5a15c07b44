"""What data-free methods share that make inputs on the server: the generator's options and memory.

A method composes the losses of ``clients/synthesis.py`` and says when the generator and the student
take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from fedkd.clients.client import Client, Update
from fedkd.clients.synthesis import GeneratorTraining
from fedkd.distill.generator import filled, input_generator
from fedkd.models.base import BlockNet
from fedkd.options import Count, NonNegative, Positive, options
from fedkd.privacy.payload import Histogram, Payload
from fedkd.rng import Rng
from fedkd.strategies.base import Setting
from fedkd.strategies.server_distillation import ServerDistillation
from fedkd.types import Arrays, ClientInfo, Upload

COUNTS = "counts/labels"
"""What a client uploads beside its weights: training examples by class, int32 (C,)."""


@options
class DataFree(ServerDistillation):
    """Distillation on the server, on inputs that a label-conditional generator makes.

    Clients upload weights and their label counts: labels are asked for in proportion to what the
    participants hold, so that a class that nobody holds is never made.
    """

    noise: Annotated[Count, Field(description="size of the generator's noise")] = 64
    generator_width: Annotated[Count, Field(description="channels of the generator")] = 16
    generator_lr: Annotated[Positive, Field(description="learning rate of the generator")] = 1e-3
    generator_batch_size: Annotated[Count, Field(description="samples a step of the generator")] = (
        64
    )
    fidelity_weight: Annotated[
        NonNegative, Field(description="weight of the teachers' cross-entropy with the label")
    ] = 1.0

    def sends_counts(self) -> bool:
        """Return whether clients upload how many examples of each class they hold."""
        return self.server_steps > 0

    def local_update(self, client: Client, received: Arrays) -> Update:
        update = super().local_update(client, received)
        if not self.sends_counts():
            return update
        arrays = {**update.arrays, **label_counts_of(client)}
        return Update(arrays, update.predictor, update.metrics)

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        weights = super().declare(received, client, round_, setting) or ()
        counts = Histogram(COUNTS, setting.task.classes)
        return (*weights, counts) if self.sends_counts() else weights

    def generator(self, setting: Setting, rng: Rng, weights: Arrays | None = None) -> BlockNet:
        """Return the generator with ``weights``; what they do not hold is drawn from ``rng``."""
        with torch.device("meta"):
            made = input_generator(self.noise, setting.task, self.generator_width)
        return filled(made, rng, weights).to(setting.device)

    def generator_training(self, steps: int) -> GeneratorTraining:
        """Return how the generator is trained."""
        return GeneratorTraining(
            steps=steps,
            batch_size=self.generator_batch_size,
            optimizer="adam",
            lr=self.generator_lr,
        )

    def label_weights(self, uploads: Sequence[Upload], setting: Setting) -> torch.Tensor:
        """Return how many examples of each class the participants hold, float32 (C,)."""
        counts = [u.arrays[COUNTS] for u in uploads if COUNTS in u.arrays]
        total = np.sum(counts, axis=0) if counts else np.ones(setting.task.classes)
        return torch.from_numpy(np.asarray(total, dtype=np.float32)).to(setting.device)


def label_counts_of(client: Client) -> Arrays:
    """Return a client's label counts as it uploads them: ``counts/labels``, int32 (C,).

    Noised under example-level privacy.
    """
    y = client.data.train.y
    if client.release is not None:
        return {COUNTS: client.release.histogram(y)}
    counts = np.bincount(y.cpu().numpy(), minlength=client.task.classes)
    return {COUNTS: counts.astype(np.int32)}
