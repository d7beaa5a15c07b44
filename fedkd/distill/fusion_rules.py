"""How the answers of several teachers become one soft target: fusion rules by name.

Every server distillation takes any of them. A rule is differentiable in the logits, since
generators are trained through the ensemble; what a student is taught is detached by its caller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.options import options
from fedkd.registry import Registry


class Fusion(ABC):
    """A rule that fuses the logits of K teachers, (K, B, C), into probabilities (B, C).

    ``temperature`` T softens each teacher or their mean. ``shares`` (K, C) holds for each class
    what part of its examples each teacher has seen (:func:`label_shares`), ``labels`` (B,) the
    class that an input was made for, where it was; rules that do not need them ignore them.
    """

    @abstractmethod
    def __call__(
        self,
        logits: Tensor,
        temperature: float,
        shares: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return the fused probabilities, (B, C); every row sums to 1."""


fusions: Registry[type[Fusion]] = Registry("fusion rule", "fedkd.distill.fusion_rules", "fusions")


@fusions.register("mean-logits")
@options
class MeanLogits(Fusion):
    """Mean of the logits, then softmax: ``softmax(mean_k z_k / T)``, a product of experts.

    One confident teacher can outvote many. Source: Lin et al., FedDF, NeurIPS 2020, algorithm 1.
    """

    def __call__(
        self,
        logits: Tensor,
        temperature: float,
        shares: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        return functional.softmax(mean_over(logits) / temperature, dim=1)


@fusions.register("mean-probs")
@options
class MeanProbabilities(Fusion):
    """Mean of the probabilities: ``mean_k softmax(z_k / T)``, a mixture where all count alike.

    Source: Itahara et al., DS-FL, 2020 (before sharpening).
    """

    def __call__(
        self,
        logits: Tensor,
        temperature: float,
        shares: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        return mean_over(_softened(logits, temperature))


@fusions.register("class-counts")
@options
class ClassCounts(Fusion):
    """Teachers count by the examples of a class that they have seen.

    ``p = sum_k a_ky softmax(z_k / T)`` with ``a_ky = n_ky / sum_k n_ky``, y the label that the
    input was made for (Zhang et al., FedFTG, CVPR 2022). Where an input has no label, each class is
    weighted on its own and the result normalised: ``p_c ~ sum_k a_kc softmax(z_k / T)_c`` (our
    extension; under strong skew it did harm in our measurements, since a client is surest of the
    classes that it holds, whatever it sees). Without counts it is mean-probs.
    """

    def __call__(
        self,
        logits: Tensor,
        temperature: float,
        shares: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        probs = _softened(logits, temperature)
        if shares is None:
            return mean_over(probs)
        if labels is not None:
            return (probs * shares[:, labels, None]).sum(0)
        return _normalised((probs * shares[:, None, :]).sum(0))


@fusions.register("entropy")
@options
class EntropyWeights(Fusion):
    """Sure teachers count more: weights ``softmax_k(-H_k)`` of the entropy of each answer, in nats.

    ``p = sum_k w_k(x) softmax(z_k / T)``; H_k is taken at temperature 1, so T softens the answer
    and not the trust. Equally sure teachers give mean-probs. Our choice of weights.
    """

    def __call__(
        self,
        logits: Tensor,
        temperature: float,
        shares: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        logp = functional.log_softmax(logits, dim=2)
        weights = functional.softmax((logp.exp() * logp).sum(2), dim=0)
        return (_softened(logits, temperature) * weights[:, :, None]).sum(0)


@fusions.register("variance")
@options
class VarianceWeights(Fusion):
    """Weights in proportion to the variance of a teacher's logits over the classes, a confidence.

    ``z = sum_k w_k(x) z_k``, ``w_k = Var_c(z_k) / sum_j Var_c(z_j)``, then ``softmax(z / T)``.
    Source: the idea of Cho et al., Fed-ET, 2022 (read in notes only; their variance is that of the
    model's output). Teachers without any variance count alike.
    """

    def __call__(
        self,
        logits: Tensor,
        temperature: float,
        shares: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        variance = logits.var(dim=2, unbiased=False) + torch.finfo(logits.dtype).eps
        weights = variance / variance.sum(0)
        return functional.softmax((logits * weights[:, :, None]).sum(0) / temperature, dim=1)


@fusions.register("median")
@options
class Median(Fusion):
    """Median over the teachers of each class's probability, normalised: one liar changes little.

    With an even number of teachers it is the mean of the two in the middle, so that two teachers
    give mean-probs.
    """

    def __call__(
        self,
        logits: Tensor,
        temperature: float,
        shares: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        ordered = _softened(logits, temperature).sort(dim=0).values
        low, high = (len(ordered) - 1) // 2, len(ordered) // 2
        return _normalised((ordered[low] + ordered[high]) / 2)


def label_shares(counts: Tensor) -> Tensor:
    """Return ``a_kc = n_kc / sum_k n_kc`` of label counts (K, C).

    A class that nobody holds gives every teacher the same share, 1/K: nobody knows it better.

    >>> label_shares(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    tensor([[0.7500, 0.5000],
            [0.2500, 0.5000]])
    """
    total = counts.sum(0)
    uniform = torch.full_like(counts, 1 / len(counts))
    return torch.where(total > 0, counts / total.clamp_min(1e-12), uniform)


def mean_over(values: Tensor) -> Tensor:
    """Return the mean over teachers, in double precision: equal teachers give exactly that one."""
    return values.double().mean(0).to(values.dtype)


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return functional.softmax(logits / temperature, dim=2)


def _normalised(values: Tensor) -> Tensor:
    return values / values.sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
