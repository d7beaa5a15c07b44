"""Two operations that ``vmap`` cannot do, or only in a loop, written out in ones that it can.

They are exchanged while a stacked network runs, in this thread alone; models stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class WrittenOut(TorchFunctionMode):
    """Within this context, group norms and attention are the sums and products that they are."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.group_norm:
            func = group_norm
        elif func is functional.scaled_dot_product_attention:
            func = attention
        return func(*args, **(kwargs or {}))


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return what ``torch.nn.functional.group_norm`` does for x (B, C, ...)."""
    groups = x.reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(groups, -1, correction=0, keepdim=True)
    found = ((groups - mean) * (variance + eps).rsqrt()).reshape(x.shape)
    column = (-1, *[1] * (x.dim() - 2))
    found = found if weight is None else found * weight.view(column)
    return found if bias is None else found + bias.view(column)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return ``softmax(q k^T / sqrt(d) + mask) v``, as ``scaled_dot_product_attention`` does.

    Raises:
        NotImplementedError: dropout or grouped queries are asked for.
    """
    if dropout_p or enable_gqa:
        raise NotImplementedError("attention with dropout or grouped queries is not written out")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
