"""What a generator is trained for: losses as terms, put together by each data-free method.

A generator is trained through the one loop: its "data" are indices of codes, its output stands
where a network's logits otherwise stand (``batch.logits`` is the generated batch), and teachers
and students are frozen, so that gradient reaches the generator alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.clients.local import Batch, FitResult, Term, fit
from fedkd.clients.training import Training
from fedkd.clients.transfer import Ensemble
from fedkd.data.federated import Split
from fedkd.distill.generator import Codes, draw_labels, draw_noise, driven
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.options import options
from fedkd.rng import Rng


@options
class GeneratorTraining(Training):
    """The optimization of a generator: Adam with betas (0.5, 0.999), as is usual for them."""

    def make(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:  # type: ignore[override]
        """Return a fresh optimizer."""
        return torch.optim.Adam(
            parameters, lr=lr, betas=(0.5, 0.999), weight_decay=self.weight_decay
        )


class Answers:
    """The teachers' logits of the batch at hand, computed once for all terms that read them."""

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble
        self._of: Tensor | None = None
        self._logits: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits (K, B, C) for the generated batch ``x``."""
        if self._of is not x or self._logits is None:
            self._of, self._logits = x, self.ensemble.logits(x)
        return self._logits

    def known(self, x: Tensor) -> Tensor | None:
        """Return these logits as constants, if the batch at hand is ``x`` and somebody asked."""
        if self._of is not x or self._logits is None:
            return None
        return self._logits.detach()


class Fidelity(Term):
    """The ensemble should take a sample for its label: ``-(1 - p_y)^hard log p_y``.

    p is the fused prediction at temperature 1, y the label that the sample was made for.
    ``hard = 0`` is DENSE's and FedGen's (eq. 4) cross-entropy; ``hard > 0`` weighs samples by how
    hard they are for the ensemble, the weight held constant (Dai et al., Co-Boosting, ICLR 2024).
    """

    name = "fidelity"

    def __init__(self, answers: Answers, weight: float = 1.0, hard: float = 0.0) -> None:
        self.answers, self.weight, self.hard = answers, weight, hard

    def __call__(self, batch: Batch) -> Tensor:
        probs = self.answers.ensemble.fuse(self.answers(batch.logits), 1.0, batch.y)
        p = probs.gather(1, batch.y[:, None])[:, 0]
        loss = -p.clamp_min(torch.finfo(p.dtype).tiny).log()
        return loss * (1 - p.detach()) ** self.hard if self.hard else loss


class TeacherFidelity(Term):
    """Each teacher should take a sample for its label, as far as it knows the label.

    ``sum_k a_ky CE(z_k, y)`` with ``a_ky`` the shares of :func:`~fedkd.distill.fusion_rules.\
label_shares`. Source: released code of FedGen and FedFTG (per-example weights kept: a mean over
    the batch before weighting, as in one of them, would cancel them).
    """

    name = "fidelity"

    def __init__(self, answers: Answers, weight: float = 1.0) -> None:
        self.answers, self.weight = answers, weight

    def __call__(self, batch: Batch) -> Tensor:
        logits, shares = self.answers(batch.logits), self.answers.ensemble.shares
        k = len(logits)
        y = batch.y.expand(k, -1)
        losses = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        losses = losses.view(k, -1)
        return losses.mean(0) if shares is None else (losses * shares[:, batch.y]).sum(0)


class Boundary(Term):
    """Samples should lie where student and teachers differ in the class that they name.

    ``-1[argmax s != argmax t] KL(t || s)``: t is the fused prediction, s that of the
    frozen student. Source: Zhang et al., DENSE, NeurIPS 2022.
    """

    name = "boundary"

    def __init__(self, answers: Answers, student: BlockNet, weight: float = 1.0) -> None:
        self.answers, self.student, self.weight = answers, student, weight

    def __call__(self, batch: Batch) -> Tensor:
        teacher = self.answers.ensemble.fuse(self.answers(batch.logits), 1.0, batch.y)
        student = functional.log_softmax(self.student(batch.logits), dim=1)
        differ = (teacher.argmax(1) != student.argmax(1)).to(student.dtype)
        log_teacher = teacher.clamp_min(torch.finfo(teacher.dtype).tiny).log()
        return -differ * (teacher * (log_teacher - student)).sum(1)


class Disagreement(Term):
    """Samples should be hard for the student: ``-sum_k a_ky mean_c |s_c - t_kc|`` of logits.

    Source: released code of Zhang et al., FedFTG, CVPR 2022 (its paper maximises a KL divergence).
    """

    name = "disagreement"

    def __init__(self, answers: Answers, student: BlockNet, weight: float = 1.0) -> None:
        self.answers, self.student, self.weight = answers, student, weight

    def __call__(self, batch: Batch) -> Tensor:
        logits, shares = self.answers(batch.logits), self.answers.ensemble.shares
        gaps = (logits - self.student(batch.logits)).abs().mean(2)
        return -(gaps * shares[:, batch.y]).sum(0) if shares is not None else -gaps.mean(0)


class Diversity(Term):
    """Different noise should make different samples: ``exp(-mean_ij |e_i - e_j|^2 |x_i - x_j|)``.

    Both distances are means over coordinates: squared of the noise e, absolute of the samples x.
    1 where all samples are equal, towards 0 as they spread. Source: Zhu et al., FedGen, ICML 2021,
    and its released code.
    """

    dp = "batch-coupled"
    name = "diversity"

    def __init__(self, codes: Codes, weight: float = 1.0) -> None:
        self.codes, self.weight = codes, weight

    def __call__(self, batch: Batch) -> Tensor:
        noise, made = self.codes.noise[batch.x], batch.logits.flatten(1)
        apart = torch.cdist(noise, noise).square() / noise.shape[1]
        spread = torch.cdist(made, made, p=1.0) / made.shape[1]
        return torch.exp(-(apart.detach() * spread).mean())


class MatchedStatistics(Term):
    """Features of samples should be spread as the clients' are: ``sum_l |mu - mu_l| + |v - v_l|``.

    Where networks have BatchNorm, DENSE reads means and variances off it. Ours have none: clients
    upload mean and variance (d,) of a block's pooled features over their examples, which is matched
    for each teacher with its own statistics. Norms are Euclidean, divided by sqrt(d).
    """

    dp = "batch-coupled"
    name = "statistics"

    def __init__(
        self,
        teachers: Sequence[BlockNet],
        statistics: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
        weight: float = 1.0,
    ) -> None:
        self.pairs = list(zip(teachers, statistics, strict=True))
        self.weight = weight

    def __call__(self, batch: Batch) -> Tensor:
        total = batch.logits.new_zeros(())
        for teacher, by_block in self.pairs:
            _, features = teacher.forward_with_features(batch.logits, list(by_block))
            for block, (mean, variance) in by_block.items():
                h = features[block]
                scale = h.shape[1] ** -0.5
                total = total + scale * (h.mean(0) - mean).norm()
                total = total + scale * (h.var(0, unbiased=False) - variance).norm()
        return total / max(1, len(self.pairs))


@dataclass(frozen=True)
class Samples:
    """Generated examples: inputs or features ``x`` (n, ...) and the labels ``y`` (n,) asked for.

    ``answers`` (K, n, C) are the teachers' logits for ``x``, where they are known already.
    """

    x: Tensor
    y: Tensor
    answers: Tensor | None = None


class BestBatch(Term):
    """The weighted sum of other terms, which keeps the batch that it was lowest on.

    A generator that starts afresh for every batch is judged by what it made, not by where it ended:
    ``samples`` holds that batch, as constants, and ``losses`` what each term was on it, by name.
    What the teachers said of it in ``answers`` is kept with it.
    """

    dp = "batch-coupled"
    name = "generator"

    def __init__(self, terms: Sequence[Term], answers: Answers | None = None) -> None:
        self.terms, self.answers, self.weight = tuple(terms), answers, 1.0
        self.samples: Samples | None = None
        self.losses: dict[str, float] = {}
        self._lowest = float("inf")

    def __call__(self, batch: Batch) -> Tensor:
        losses = [term(batch).mean() for term in self.terms]
        total = torch.stack(
            [loss * term.weight for loss, term in zip(losses, self.terms, strict=True)]
        ).sum()
        value = float(total.detach())
        if self.samples is None or value < self._lowest:
            self._lowest = value
            said = None if self.answers is None else self.answers.known(batch.logits)
            self.samples = Samples(batch.logits.detach().clone(), batch.y, said)
            named = zip(self.terms, losses, strict=True)
            self.losses = {term.name: float(loss.detach()) for term, loss in named}
        return total


def joined(bank: Sequence[Samples]) -> Samples:
    """Return all samples of a bank as one, with the teachers' answers if all have them."""
    said = [s.answers for s in bank if s.answers is not None]
    return Samples(
        torch.cat([s.x for s in bank]),
        torch.cat([s.y for s in bank]),
        torch.cat(said, dim=1) if len(said) == len(bank) else None,
    )


def codes_for(n: int, size: int, weights: Tensor, rng: Rng, *, learned: bool = False) -> Codes:
    """Return n codes: normal noise of ``size`` and labels in proportion to ``weights`` (C,)."""
    labels = draw_labels(n, weights, rng.child("labels")).to(weights.device)
    noise = draw_noise(n, size, rng.child("noise")).to(weights.device)
    return Codes(noise, labels, len(weights), learned=learned)


def train_generator(
    generator: BlockNet,
    codes: Codes,
    terms: Sequence[Term],
    training: Training,
    rng: Rng,
    where: str = "strategy.generator_lr",
) -> FitResult:
    """Train ``generator`` (and ``codes``, if they are learned) in place on the sum of ``terms``.

    One step takes ``training.batch_size`` of the codes; an epoch takes each code once.

    Raises:
        RunError: the generator diverged; the message names the option ``where``.
    """
    index = torch.arange(len(codes.labels), device=codes.labels.device)
    model = driven(codes, generator)
    try:
        return fit(model, Split(index, codes.labels), terms, training, training.lr, rng)
    except RunError:
        raise RunError(
            f"the generator diverged (its loss or weights are not finite); lower {where} (now "
            f"{training.lr:.4g}) or the weights of its losses"
        ) from None


def sample(generator: BlockNet, codes: Codes) -> Samples:
    """Return what ``generator`` makes of all ``codes``, as constants."""
    generator.eval()
    with torch.no_grad():
        index = torch.arange(len(codes.labels), device=codes.labels.device)
        x = torch.cat([generator(codes(part)) for part in index.split(1024)])
    return Samples(x.detach(), codes.labels)
