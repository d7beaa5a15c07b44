"""A network as a sequence of named blocks and a head: what a layer schedule or a cut refers to.

Federated methods share, freeze, drop and distil *blocks*. Here a block is a direct child of the
network, so a parameter's block is the first part of its name, and features can be read behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.errors import ConfigError, unknown
from fedkd.models.initial import initialise
from fedkd.models.registries import models
from fedkd.options import build as build_options
from fedkd.rng import Rng
from fedkd.types import Task

HEAD = "head"
POOLED = 4


def block_of(key: str) -> str:
    """Return the block that a parameter belongs to: its name up to the first dot.

    >>> block_of("stage1.conv1.weight")
    'stage1'
    """
    return key.split(".", 1)[0]


def pool(hidden: Tensor) -> Tensor:
    """Make features of moderate size of what a block returns: ``(batch, ...) -> (batch, d)``.

    Maps ``(batch, channels, height, width)`` are averaged over a grid of 4x4 cells (a side below 4
    stays as it is) and flattened; tokens ``(batch, tokens, width)`` are averaged over tokens;
    vectors stay. The grid keeps where something is, which one average over the map would lose.

    >>> pool(torch.zeros(2, 3, 14, 14)).shape, pool(torch.zeros(2, 3, 2, 9)).shape
    (torch.Size([2, 48]), torch.Size([2, 24]))
    >>> pool(torch.zeros(2, 49, 64)).shape, pool(torch.zeros(2, 128)).shape
    (torch.Size([2, 64]), torch.Size([2, 128]))
    """
    if hidden.dim() == 3:
        return hidden.mean(1)
    if hidden.dim() == 4:
        height, width = hidden.shape[2:]
        if max(height, width) > POOLED:
            cells = (min(height, POOLED), min(width, POOLED))
            hidden = functional.adaptive_avg_pool2d(hidden, cells)
    return hidden.flatten(1)


class BlockNet(nn.Module):
    """A sequence of named blocks and a head, in this order; each one is a direct child.

    Attributes:
        block_names: the blocks without the head, from shallow to deep.
        names: all of them, ``"head"`` last.

    Raises:
        ConfigError: there is no block, or a block's name cannot be the name of a child.

    >>> net = BlockNet({"fc1": nn.Linear(4, 3)}, nn.Linear(3, 2))
    >>> net.names, sorted(net.state_dict())
    (('fc1', 'head'), ['fc1.bias', 'fc1.weight', 'head.bias', 'head.weight'])
    """

    def __init__(self, blocks: Mapping[str, nn.Module], head: nn.Module) -> None:
        super().__init__()
        if not blocks:
            raise ConfigError("a BlockNet needs at least one block before its head; add one")
        self.block_names = tuple(blocks)
        self.names = (*self.block_names, HEAD)
        for name, block in blocks.items():
            if name == HEAD:
                raise ConfigError(f"a block cannot be named {HEAD!r}: that is the last layer")
            try:
                self.add_module(name, block)
            except KeyError as error:
                raise ConfigError(f"a block cannot be named {name!r}: {error.args[0]}") from None
        self.add_module(HEAD, head)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)``; of text one row a token, ``(batch, L, classes)``."""
        for _, block in self._sequence():
            x = block(x)
        return x

    def forward_with_features(
        self, x: Tensor, at: Collection[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and, by block, the :func:`pool`-ed features behind each block in ``at``.

        The features of ``"head"`` are the logits. One pass serves all; gradients flow through.

        Raises:
            ConfigError: the network has no such block.
        """
        self._check(at)
        found = {}
        for name, block in self._sequence():
            x = block(x)
            if name in at:
                found[name] = pool(x)
        return x, found

    def raw_features(self, x: Tensor, at: str) -> Tensor:
        """Return what block ``at`` returns, as it is; deeper blocks are not computed.

        Raises:
            ConfigError: the network has no such block.
        """
        self._check([at])
        for name, block in self._sequence():
            x = block(x)
            if name == at:
                break
        return x

    def features(self, x: Tensor, at: str) -> Tensor:
        """Return the :func:`pool`-ed features behind block ``at``; deeper blocks are not computed.

        Raises:
            ConfigError: the network has no such block.
        """
        return pool(self.raw_features(x, at))

    def feature_size(self, task: Task, at: str) -> int:
        """Return the number of features behind block ``at`` for inputs of ``task``.

        Raises:
            ConfigError: the network has no such block.
        """
        like = next(self.parameters())
        with torch.no_grad():
            return self.features(like.new_zeros(1, *task.input_shape), at).shape[1]

    def up_to(self, at: str, head: nn.Module) -> BlockNet:
        """Return the network of the blocks up to ``at`` and ``head``, on the same parameters.

        Raises:
            ConfigError: there is no such block before the head.
        """
        last = self._cut(at)
        return BlockNet({n: self.get_submodule(n) for n in self.block_names[:last]}, head)

    def behind(self, at: str) -> BlockNet:
        """Return the network from :meth:`raw_features` of ``at`` on, on the same parameters.

        ``net.behind(at)(net.raw_features(x, at)) == net(x)``. In it ``at`` is the identity; deeper
        blocks and the head keep their names, so its weights are some of this network's.

        Raises:
            ConfigError: there is no such block before the head.
        """
        first = self._cut(at)
        deeper = {n: self.get_submodule(n) for n in self.block_names[first:]}
        return BlockNet({at: nn.Identity(), **deeper}, self.get_submodule(HEAD))

    def _cut(self, at: str) -> int:
        if at not in self.block_names:
            raise unknown("block", at, self.block_names)
        return self.block_names.index(at) + 1

    def _sequence(self) -> list[tuple[str, nn.Module]]:
        # In every step of every client: a look into the table costs less than get_submodule.
        children = self._modules
        return [(name, children[name]) for name in self.names]  # type: ignore[misc]

    def _check(self, at: Collection[str]) -> None:
        for name in at:
            if name not in self.names:
                raise unknown("block", name, self.names)


class Model(Protocol):
    """What a registered model offers: options that know how to build the structure."""

    def build(self, task: Task) -> BlockNet:
        """Return the network's structure for ``task``; :func:`build` fills in the numbers.

        Raises:
            ConfigError: the task's input does not fit.
        """


def build(
    name: str, options: Mapping[str, Any], task: Task, rng: Rng, where: str = "model"
) -> BlockNet:
    """Make the network ``name`` with ``options``, its parameters drawn from ``rng``.

    Every parameter has its own stream ``rng.child(<parameter name>)``, so equal addresses give
    bit-identical networks, and torch's global generator is neither read nor advanced. The
    network lies on the CPU; kernels are in ``channels_last`` format, which is the faster one, but
    see :func:`row_major` for DP-SGD.

    Args:
        where: the place of ``options`` in the configuration, for messages.

    Raises:
        ConfigError: unknown model or option, or the task's input does not fit the model.
    """
    model = build_options(models.get(name), options, where)
    with torch.device("meta"):
        net = model.build(task)
    _check_private(name, net)
    initialise(net, rng)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def row_major(net: BlockNet) -> BlockNet:
    """Put the kernels of ``net`` in torch's contiguous format, in place: needed for Opacus's hooks.

    The convolution sampler of Opacus 1.6 reads strides as if maps were contiguous, so per-example
    gradients of a ``channels_last`` network are *silently wrong* (its ``functorch`` samplers are
    right in both formats). Inputs must be row-major too, by ``x.to(memory_format=
    torch.contiguous_format)``: ``x.contiguous()`` leaves maps of one channel as they are.
    Values do not change.
    """
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return net


def images(task: Task, model: str, least: int) -> tuple[int, int, int]:
    """Return channels, height and width of the task's images.

    Raises:
        ConfigError: the inputs are no images, or one side has fewer than ``least`` pixels.
    """
    if task.sequence:
        raise ConfigError(
            f"model {model!r} needs images, and an input of task {task.name!r} is a row of text; "
            "use model 'gpt-tiny' or 'lstm'"
        )
    if len(task.input_shape) != 3:
        raise ConfigError(
            f"model {model!r} needs images (channels, height, width), but an input of task "
            f"{task.name!r} has the shape {task.input_shape}; use model 'mlp'"
        )
    channels, height, width = task.input_shape
    if min(height, width) < least:
        raise ConfigError(
            f"model {model!r} needs images of at least {least}x{least} pixels, but task "
            f"{task.name!r} has {height}x{width}; use model 'cnn' or 'mlp'"
        )
    return channels, height, width


def _check_private(name: str, net: BlockNet) -> None:
    """Refuse state that is no parameter, or is used twice: DP-SGD cannot account for it."""
    for key, _ in net.named_buffers():
        raise ConfigError(
            f"model {name!r} has the buffer {key!r}, which no aggregation or privacy mechanism "
            "covers; use GroupNorm or LayerNorm in place of BatchNorm"
        )
    unique = {key for key, _ in net.named_parameters()}
    for key, _ in net.named_parameters(remove_duplicate=False):
        if key not in unique:
            raise ConfigError(
                f"model {name!r} uses one parameter twice, the second time as {key!r}, so its "
                "gradient for one example is undefined under DP-SGD; give each layer its own"
            )
