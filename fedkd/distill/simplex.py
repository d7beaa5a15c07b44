"""The Euclidean projection onto the probability simplex: what makes noised soft targets targets.

It looks at nothing but what was released, so it is post-processing and costs no privacy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(values: Tensor) -> Tensor:
    """Return the nearest distribution to each row of ``values`` (..., C), in L2.

    ``max(v_c - theta, 0)`` with the theta of a row such that it sums to 1. A row that is a
    distribution stays as it is, but for rounding.
    Source: Duchi et al., Efficient Projections onto the l1-Ball, ICML 2008, figure 1.

    >>> project(torch.tensor([[0.75, 0.75, -1.0], [0.25, 0.5, 0.25]]))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.2500, 0.5000, 0.2500]])
    """
    ordered = values.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype)
    # The largest always counts, so that there is a theta for every finite row.
    kept = (ordered * rank > excess).sum(-1, keepdim=True).clamp_min(1)
    theta = excess.gather(-1, kept - 1) / kept.to(values.dtype)
    return (values - theta).clamp_min(0)
