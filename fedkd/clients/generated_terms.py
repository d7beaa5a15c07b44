"""What a client learns from a generator of features: loss terms that draw anew in every step.

The generator is a constant here: gradient reaches the client's head (and, through the second term,
its body), never the generator. Draws come from one addressed stream of the client and count steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.clients.guided import Guide, Led
from fedkd.clients.local import Batch, Compared, Term
from fedkd.clients.synthesis import codes_for, sample
from fedkd.distill.generator import Codes, draw_noise
from fedkd.distill.objectives.base import Objective
from fedkd.models.base import HEAD, BlockNet
from fedkd.rng import Rng
from fedkd.types import Task


def feature_shape(model: BlockNet, task: Task) -> tuple[int, ...]:
    """Return the shape in which the head reads one generated feature vector.

    A vector ``(d,)`` as it is; of a map the channels, as a map of one cell ``(d, 1, 1)``; of tokens
    one token ``(1, d)``. Heads average over cells and tokens, so one stands for all.
    """
    like = next(model.parameters())
    with torch.no_grad():
        raw = model.raw_features(like.new_zeros(1, *task.input_shape), model.block_names[-1])
    if raw.dim() == 4:
        return (raw.shape[1], 1, 1)
    return (1, raw.shape[2]) if raw.dim() == 3 else (raw.shape[1],)


def reader(model: BlockNet, task: Task) -> BlockNet:
    """Return ``features (B, d) -> logits (B, C)``: the head of ``model``, on its own parameters."""
    shaped = nn.Unflatten(1, feature_shape(model, task))
    return BlockNet({"shaped": shaped}, model.get_submodule(HEAD))


class Generated(Term):
    """The head should take a generated feature for its label: ``CE(h(G(e, y)), y)``, y ~ p.

    A mean over ``size`` fresh draws in every step; ``prior`` p (C,) weighs the labels, those of the
    whole federation: that is how a client hears of classes that it does not hold.
    Source: Zhu et al., FedGen, ICML 2021, eq. 5.
    """

    dp = "weights-only"
    name = "generated"

    def __init__(
        self,
        head: BlockNet,
        generator: BlockNet,
        prior: Tensor,
        *,
        noise: int,
        size: int,
        rng: Rng,
        weight: float,
    ) -> None:
        self.head, self.generator, self.prior = head, generator, prior
        self.noise, self.size, self.rng, self.weight = noise, size, rng, weight
        self._step = 0

    def __call__(self, batch: Batch) -> Tensor:
        codes = codes_for(self.size, self.noise, self.prior, self.rng.child(self._step))
        self._step += 1
        made = sample(self.generator, codes)
        return functional.cross_entropy(self.head(made.x), made.y)


class GeneratedTargets(Led):
    """The network should answer as its head does to a feature made for the example's label.

    ``KL(softmax(h(G(e, y))) || softmax(f(x)))``; the target is a constant. An example whose label
    has no weight in ``prior`` (C,) contributes nothing: the generator has never been asked for it.
    Policies, where a ``guide`` leads it, see the examples that contribute, and their labels.
    Source: the released code of Zhu et al., FedGen (not in the paper).
    """

    name = "latent"
    teaches = True

    def __init__(
        self,
        head: BlockNet,
        generator: BlockNet,
        prior: Tensor,
        *,
        objective: Objective,
        noise: int,
        rng: Rng,
        weight: float,
        guide: Guide | None = None,
    ) -> None:
        self.head, self.generator, self.prior = head, generator, prior
        self.objective, self.noise, self.rng, self.weight = objective, noise, rng, weight
        self.dp = objective.dp
        self.led_by(guide)
        self._step = 0

    def __call__(self, batch: Batch) -> Tensor:
        probs, real = self._said(batch)
        if self.guide is None:
            loss = self.taught(self.objective, batch.logits, probs, 1.0, batch.y)
            return torch.where(real, loss, torch.zeros_like(loss))
        if not bool(real.any()):
            return batch.logits.sum(1) * 0.0
        rows = (batch.logits[real], probs[real], 1.0, batch.y[real])
        found = self.taught(self.objective, *rows).to(batch.logits.dtype)
        return batch.logits.new_zeros(len(real)).masked_scatter(real, found)

    def _said(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the head says of features made for a batch, and who has a target."""
        noise = draw_noise(len(batch.y), self.noise, self.rng.child(self._step))
        self._step += 1
        codes = Codes(noise.to(batch.y.device), batch.y, len(self.prior))
        with torch.no_grad():
            probs = functional.softmax(self.head(sample(self.generator, codes).x), dim=1)
        return probs, self.prior[batch.y] > 0

    def compared(self, batch: Batch) -> Compared:
        probs, real = self._said(batch)
        return Compared(batch.logits[real], probs[real])
