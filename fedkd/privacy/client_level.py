"""Client-level differential privacy: the server learns a noisy sum, whatever one client sends.

A round is one Gaussian release of all that clients upload, the count of adaptive clipping included:
its parts share one noise multiplier z, because they are taken from one sampled cohort. Everything
that a strategy makes of the released arrays is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from fedkd.errors import ConfigError
from fedkd.privacy.accounting import effective, joint
from fedkd.privacy.knowledge import knowledge_coder
from fedkd.privacy.options import Privacy
from fedkd.privacy.payload import Part, Payload, Weights
from fedkd.privacy.weights import Coder, WeightsCoder, weights_coder
from fedkd.rng import Rng
from fedkd.types import Arrays

NORMS = (1e-100, 1e100)


@runtime_checkable
class Releasing(Protocol):
    """A coder that adds noise by itself, where what is spent depends on what is answered."""

    def release_sum(
        self, total: np.ndarray, noise_multiplier: float, expected: float, rng: Rng
    ) -> tuple[Arrays, float]:
        """Return the released arrays and the multiplier of the release that they were."""
        ...

    def worst(self, noise_multiplier: float) -> float:
        """Return the smallest multiplier that ``release_sum`` can come to."""
        ...


@dataclass(frozen=True)
class Released:
    """One round's release.

    ``arrays`` stand for the upload of one client. ``multiplier`` is that of the one Gaussian
    mechanism that the whole round was, in units of the sensitivity under the options' adjacency
    (halved for replace-one already): what an accountant takes. ``unclipped`` is the sum over
    clients of ``b - 1/2`` (b = 1: not clipped) without noise: only for
    :meth:`ClientLevel.next_norm`, never for a log.
    """

    arrays: Arrays
    multiplier: float
    unclipped: float


class ClientLevel:
    """DP-FedAvg: ``(sum_k clip(x_k) + N(0, (z C)^2 I)) / n``, n the expected cohort.

    The parts j of a payload get ``z_j`` with ``sum_j z_j^-2 = z^-2``; noise multiplier 0 adds
    nothing and claims nothing. McMahan, Ramage, Talwar and Zhang, ICLR 2018, Algorithm 1; adaptive
    clipping: Andrew, Thakkar, McMahan and Ramaswamy, "Differentially private learning with adaptive
    clipping", NeurIPS 2021, Algorithm 1 and Theorem 1.

    Raises:
        ConfigError: the noise multiplier is no finite number >= 0, or adaptive clipping is asked
            for where its noisy count cannot be had.
    """

    def __init__(self, options: Privacy, noise_multiplier: float) -> None:
        if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
            raise ConfigError(
                f"the noise multiplier is {noise_multiplier}; it must be finite and 0 or more"
            )
        clipping = options.clipping
        if clipping.mode == "adaptive" and options.trust == "local":
            raise ConfigError(
                "privacy.clipping.mode = 'adaptive' counts unclipped clients on the server, which "
                "privacy.trust = 'local' does not trust; use 'flat' or 'per-layer'"
            )
        if clipping.mode == "adaptive" and math.isinf(clipping.norm):
            raise ConfigError(
                "privacy.clipping.norm = inf cannot adapt; give a finite norm to start from"
            )
        self._options = options
        self._noise = float(noise_multiplier)

    def multipliers(self, payload: Payload, expected: float) -> list[float]:
        """Return ``z_j`` of each part: weights get 1 - share of ``z^-2``, others share the rest.

        Adaptive clipping's count takes ``(2 sigma_b)^-2`` of ``z^-2`` first: each client moves it
        by ``b - 1/2``, so its sensitivity is 1/2 (Andrew et al., Theorem 1).

        Raises:
            ConfigError: the payload has several parts of weights, nothing is left for a part, or
                noise is asked for weights that are not clipped.
        """
        shares = self._shares(payload)
        z = self._noise
        if self._counts(payload) and z > 0:
            count = 2 * self._count_noise(expected)
            if z >= count:
                raise ConfigError(
                    f"the count of adaptive clipping alone has noise multiplier {count:.4g}, which "
                    f"is not above the round's {z:.4g}; give privacy.clipping.count_noise > "
                    f"{z / 2:.4g} (such as {z:.4g}: a quarter of the budget), or mode = 'flat'"
                )
            z = (z**-2 - count**-2) ** -0.5
        return [z / math.sqrt(share) for share in shares]

    def worst(self, payload: Payload) -> float:
        """Return the smallest multiplier that a release of ``payload`` can come to, for any data.

        In units of the sensitivity under the options' adjacency, as :class:`Released` has it.
        """
        if not payload:
            return math.inf
        parts = []
        for part, share in zip(payload, self._shares(payload), strict=True):
            coder, z = self._coder(part, 1.0), self._noise / math.sqrt(share)
            parts.append(coder.worst(z) if isinstance(coder, Releasing) else z)
        return self._effective([min(self._noise, joint(*parts))])

    def release(
        self,
        uploads: Sequence[Arrays],
        payload: Payload,
        expected: float,
        norm: float,
        rng: Rng,
        canaries: Sequence[Arrays] = (),
    ) -> Released:
        """Return the noisy average of ``uploads`` over ``expected`` clients, part by part.

        Sums run in the given order. No uploads at all release noise just the same; an upload
        without arrays is as no upload, and a payload without parts releases nothing and costs
        nothing. ``rng`` is the round's own; its noise is used once. ``canaries`` are summed as
        uploads are, but adaptive clipping does not follow them: they are as long as its norm.

        Raises:
            ConfigError: as :meth:`multipliers`. RunError: an upload is not finite.
        """
        counts, arrays, unclipped = self._counts(payload), Arrays(), 0.0
        spent = [2 * self._count_noise(expected)] if counts else []
        for j, (part, z) in enumerate(
            zip(payload, self.multipliers(payload, expected), strict=True)
        ):
            coder = self._coder(part, norm)
            total = np.zeros_like(coder.encode({}))
            for upload in (*uploads, *canaries):
                total += coder.encode(upload)
            if counts and isinstance(coder, WeightsCoder):
                unclipped = sum(coder.vote(upload) for upload in uploads)
            made, paid = _noised(coder, total, z, expected, rng.child("noise", j))
            arrays.update(made)
            spent.append(paid)
        return Released(arrays, self._effective(spent), unclipped)

    def check(self, arrays: Arrays, payload: Payload, norm: float) -> None:
        """Raise what :meth:`release` would raise on this one upload, before it is summed.

        Raises:
            RunError: an array of another shape, not finite, or not what it was declared to be.
        """
        for part in payload:
            self._coder(part, norm).encode(arrays)

    def next_norm(self, norm: float, unclipped: float, expected: float, rng: Rng) -> float:
        """Return the clipping norm of the next round, ``C exp(-rate (b~ - quantile))``.

        ``b~ = 1/2 + (unclipped + N(0, sigma_b^2)) / expected`` is the noisy share of unclipped
        clients: where too many are unclipped, C shrinks. ``unclipped`` is that of
        :class:`Released`. Other modes of clipping keep ``norm``.
        """
        clipping = self._options.clipping
        if clipping.mode != "adaptive":
            return norm
        noise = self._count_noise(expected) * float(rng.child("count").numpy().standard_normal())
        share = 0.5 + (unclipped + noise) / expected
        exponent = math.log(norm) - clipping.rate * (share - clipping.quantile)
        low, high = NORMS
        return math.exp(min(max(exponent, math.log(low)), math.log(high)))

    def privatise(self, arrays: Arrays, payload: Payload, norm: float, rng: Rng) -> Arrays:
        """Return what a client sends to a server that it does not trust: clipped, with noise.

        ``rng`` is this client's own in this round. The server knows who sent it, so that nothing is
        gained by sampling: the client pays the multiplier :meth:`worst` at rate 1.
        """
        made: Arrays = {}
        for j, (part, z) in enumerate(zip(payload, self.multipliers(payload, 1.0), strict=True)):
            coder = self._coder(part, norm)
            vector = coder.encode(arrays)
            made.update(_noised(coder, vector, z, 1.0, rng.child("noise", j))[0])
        return made

    def _shares(self, payload: Payload) -> list[float]:
        """Return the share of each part in ``z^-2``; they sum to 1."""
        clipping, beside = self._options.clipping, self._options.release.share
        weights = [isinstance(part, Weights) for part in payload]
        if sum(weights) > 1:
            raise ConfigError(
                f"a payload has {sum(weights)} parts of weights, but privacy.clipping.norm bounds "
                "a client's whole update; describe all weights as one part"
            )
        if any(weights) and math.isinf(clipping.norm) and self._noise > 0:
            raise _unbounded()
        others = len(payload) - sum(weights)
        if not any(weights) or not others:
            return [1 / len(payload) for _ in payload]
        if beside == 1:
            raise ConfigError(
                "privacy.release.share = 1 leaves no budget for weights, which this strategy "
                "uploads too; give a share below 1"
            )
        return [1 - beside if one else beside / others for one in weights]

    def _counts(self, payload: Payload) -> bool:
        weights = any(isinstance(part, Weights) for part in payload)
        return weights and self._options.clipping.mode == "adaptive"

    def _coder(self, part: Part, norm: float) -> Coder:
        if isinstance(part, Weights):
            return weights_coder(part, self._options.clipping, norm)
        return knowledge_coder(part, self._options.release)

    def _count_noise(self, expected: float) -> float:
        given = self._options.clipping.count_noise
        return expected / 20 if given is None else given

    def _effective(self, multipliers: Sequence[float]) -> float:
        return effective(joint(*multipliers), self._options.adjacency)


def _noised(
    coder: Coder, total: np.ndarray, z: float, expected: float, rng: Rng
) -> tuple[Arrays, float]:
    """Return the release of one part's sum and the multiplier that it was."""
    if isinstance(coder, Releasing):
        return coder.release_sum(total, z, expected, rng)
    std = z * coder.bound if z > 0 else 0.0
    if math.isinf(std):
        raise _unbounded()
    if std > 0:
        total = total + std * rng.numpy().standard_normal(total.shape)
    return coder.decode(total, expected, std), z


def _unbounded() -> ConfigError:
    return ConfigError(
        "privacy.clipping.norm = inf bounds nothing, so no noise hides a client; give a finite "
        "norm, or noise_multiplier = 0, which claims nothing"
    )
