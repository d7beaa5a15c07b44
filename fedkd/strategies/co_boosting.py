"""Co-Boosting: the generated samples and the ensemble's weights make each other better in turns."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkd.clients.chunk import CHUNK
from fedkd.clients.synthesis import Samples
from fedkd.clients.transfer import Ensemble
from fedkd.options import NonNegative, Ratio, options
from fedkd.rng import Rng
from fedkd.strategies.base import Setting, strategies
from fedkd.strategies.dense import Dense

ODS_TEMPERATURE = 4.0
"""Softens the ensemble before its output is diversified, as the released code does."""


@strategies.register("co-boosting")
@options
class CoBoosting(Dense):
    """DENSE with hard, diversified samples and a re-weighted ensemble (a reconstruction).

    (a) The generator's fidelity is weighted by ``(1 - p_y)^hard``. Before students learn in epoch
    e, (b) the bank is moved to ``x + eta R sign(grad_x u^T softmax(D(x) / 4))``, R the range of
    inputs, u uniform in (-1, 1)^C for each sample, and (c) the ensemble's weights, a mean of 1,
    become ``w <- clip(w - mu decay^e sign(grad_w CE(D_w(x), y)), 0, 1)`` as shares that sum to 1.
    Limits: ``hard = eta = mu = 0`` is DENSE bit for bit.
    Source: Dai et al., Enhancing One-Shot Federated Learning Through Data and Ensemble Co-Boosting,
    ICLR 2024, and its released code.
    """

    source = "Dai et al., ICLR 2024, and its released code"
    evidence = "reconstruction"

    hard: Annotated[
        NonNegative, Field(description="power of 1 - p_y in the fidelity; 0 weighs all alike")
    ] = 1.0
    eta: Annotated[
        NonNegative, Field(description="step that diversifies inputs, as a part of their range")
    ] = 0.0314
    mu: Annotated[
        NonNegative, Field(description="step of the teachers' shares; 0 keeps them alike")
    ] = 0.01
    decay: Annotated[Ratio, Field(description="factor of mu from epoch to epoch")] = 0.99

    def hardness(self) -> float:
        return self.hard

    def lesson(
        self, bank: Samples, ensemble: Ensemble, epoch: int, setting: Setting, rng: Rng
    ) -> Samples:
        if self.eta:
            bank = diversified(bank, ensemble, self.eta, setting.task.bounds, rng)
        if self.mu:
            # Shares change what is made of the teachers' answers, never these: one pass serves both
            # the new shares and the students' targets.
            bank = Samples(bank.x, bank.y, answers_to(bank, ensemble))
            ensemble.weights = reweighted(ensemble, bank, self.mu * self.decay**epoch)
        return bank


def diversified(
    samples: Samples, ensemble: Ensemble, eta: float, bounds: tuple[float, float], rng: Rng
) -> Samples:
    """Return samples moved so that the ensemble's answer changes in a random direction.

    ``clip(x + eta (high - low) sign(grad_x u^T D(x)))`` with u ~ U(-1, 1)^C for each sample and D
    the fused probabilities at temperature 4. Source: Tashiro et al., Diversity can be Transferred:
    Output Diversification for White- and Black-box Attacks, NeurIPS 2020.
    """
    low, high = bounds
    moved = []
    chunks = zip(samples.x.split(CHUNK), samples.y.split(CHUNK), strict=True)
    for i, (part, labels) in enumerate(chunks):
        x = part.detach().requires_grad_(True)
        probs = ensemble.probs(x, ODS_TEMPERATURE, labels)
        u = torch.rand(probs.shape, generator=rng.child(i).torch()).to(probs.device) * 2 - 1
        (gradient,) = torch.autograd.grad((u * probs).sum(), x)
        step = eta * (high - low) * gradient.sign()
        moved.append((x.detach() + step).clamp(low, high))
    return Samples(torch.cat(moved), samples.y)


def answers_to(samples: Samples, ensemble: Ensemble) -> Tensor:
    """Return the teachers' logits (K, n, C) for ``samples``, computed if they are not known."""
    return ensemble.answers(samples.x) if samples.answers is None else samples.answers


def reweighted(ensemble: Ensemble, samples: Samples, step: float) -> Tensor:
    """Return the teachers' weights (K,), a mean of 1, after a signed step against cross-entropy.

    As shares ``a = w / K``: ``a <- clip(a - step sign(grad_a CE(D_a(x), y)), 0, 1)``, scaled to
    sum to 1. The gradient is that of the scaled shares, ``g_k - sum_j a_j g_j``: larger logits of
    everybody are no merit of anybody. Where nothing would be left, the weights stay.
    """
    k, logits = len(ensemble.teachers), answers_to(samples, ensemble)
    old = ensemble.weights if ensemble.weights is not None else logits.new_ones(k)
    shares = (old / k).requires_grad_(True)
    scaled = Ensemble(ensemble.teachers, ensemble.fusion, ensemble.shares, shares / shares.mean())
    probs = scaled.fuse(logits, 1.0, samples.y)
    tiny = torch.finfo(probs.dtype).tiny
    loss = functional.nll_loss(probs.clamp_min(tiny).log(), samples.y)
    (gradient,) = torch.autograd.grad(loss, shares)
    stepped = (shares.detach() - step * gradient.sign()).clamp(0, 1)
    return stepped / stepped.mean() if bool((stepped > 0).any()) else old
