"""Initial parameters drawn from addressed streams instead of torch's global generator.

Layers are made on the ``meta`` device, which draws nothing, and filled here: the same address
gives the same network whatever ran before, in any order and any number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fedkd.errors import ConfigError
from fedkd.rng import Rng

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@torch.no_grad()
def initialise(net: nn.Module, rng: Rng) -> None:
    """Fill every parameter of ``net`` from the stream ``rng.child(<parameter name>)``.

    - linear and convolutional layers, weight and bias: uniform in ``±1/sqrt(fan_in)``, torch's
      default (He et al., ICCV 2015, with slope sqrt(5));
    - normalisation: weight 1, bias 0;
    - embeddings and parameters of classes outside ``torch.nn`` (positions, tokens): normal with
      standard deviation 0.02, truncated (Dosovitskiy et al., ICLR 2021).

    Numbers are drawn in float32 and logical order, so precision and memory format do not matter.
    What is on the ``meta`` device gets memory on the CPU: ``to_empty`` would do it by way of
    torch's symbolic shapes, which import SymPy for most of a second.

    Raises:
        ConfigError: a layer of torch that is none of these.
    """
    for prefix, module in net.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{key}" if prefix else key
            values = _draw(module, key, parameter.shape, rng.child(name))
            if parameter.is_meta:
                made = nn.Parameter(values.to(parameter.dtype), parameter.requires_grad)
                setattr(module, key, made)
            else:
                parameter.copy_(values)


def _draw(module: nn.Module, key: str, shape: torch.Size, rng: Rng) -> torch.Tensor:
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    if isinstance(module, _NORMS):
        return values.fill_(1.0 if key == "weight" else 0.0)
    if isinstance(module, nn.Linear | _ConvNd):
        bound = 1 / math.sqrt(module.weight[0].numel())
        return values.uniform_(-bound, bound, generator=rng.torch())
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Embedding):
        raise ConfigError(
            f"no initial values are known for a layer of type {type(module).__name__}; use "
            "Linear, Conv, GroupNorm, LayerNorm, RMSNorm or Embedding, or a class of your own"
        )
    return nn.init.trunc_normal_(values, std=0.02, generator=rng.torch())
