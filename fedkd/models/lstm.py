"""An LSTM that is legal under DP-SGD, and fast there: each of its layers is called once a batch.

Per-example gradients are formed at each call of a layer, so a recurrent layer called at every place
would form as many as there are places. Here states are found first, outside of any layer; then
the layer is called once on all of them, and gets the gradient of all places together.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedkd.models.base import BlockNet
from fedkd.models.registries import models
from fedkd.models.tokens import Embedding, sequences
from fedkd.options import Count, options
from fedkd.types import Task


class States(NamedTuple):
    """What an LSTM went through, place by place: states before the first and after every one.

    ``hidden`` and ``cell`` (L + 1, B, H), ``gates`` (L, B, 4 H): input, forget, candidate and
    output after their nonlinearity; ``squashed`` (L, B, H): tanh of the cell.
    """

    hidden: Tensor
    cell: Tensor
    gates: Tensor
    squashed: Tensor


@torch.no_grad()
def unroll(read: Tensor, weight: Tensor) -> States:
    """Return the states of an LSTM that starts from zero.

    ``z_t = read_t + W h_{t-1}``, ``c_t = s(z^f) c_{t-1} + s(z^i) tanh(z^g)``, ``h_t = s(z^o)
    tanh(c_t)``, s the logistic function; ``read`` (B, L, 4 H) in the order i, f, g, o, ``weight``
    (4 H, H). Source: Hochreiter and Schmidhuber (1997), with forget gates by Gers et al. (2000).
    """
    size = weight.shape[1]
    reads, back = read.transpose(0, 1).contiguous(), weight.to(read.dtype).t()
    length, batch, _ = reads.shape
    hidden, cell = (reads.new_zeros(length + 1, batch, size) for _ in range(2))
    gates, squashed = torch.empty_like(reads), reads.new_empty(length, batch, size)
    for t in range(length):
        z, gate, after = torch.addmm(reads[t], hidden[t], back), gates[t], cell[t + 1]
        torch.sigmoid(z, out=gate)
        i, f, g, o = gate.split(size, 1)
        torch.tanh(z[:, 2 * size : 3 * size], out=g)
        torch.mul(f, cell[t], out=after).addcmul_(i, g)
        torch.tanh(after, out=squashed[t])
        torch.mul(o, squashed[t], out=hidden[t + 1])
    return States(hidden, cell, gates, squashed)


class Backward(torch.autograd.Function):
    """Hands out states that are known already; back through time it goes by the chain rule.

    Both summands of ``z_t`` get the whole gradient at z_t, all places together.
    """

    @staticmethod
    def forward(
        ctx: Any, read: Tensor, recalled: Tensor, weight: Tensor, *states: Tensor
    ) -> Tensor:
        """Return the hidden states (B, L, H)."""
        ctx.save_for_backward(weight, *states)
        return states[0][1:].transpose(0, 1).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient at z (B, L, 4 H), for what was read and for what was recalled."""
        weight, _, cell, gates, squashed = ctx.saved_tensors
        size, weight = weight.shape[1], weight.to(gates.dtype)
        outer = gradients[0].transpose(0, 1).contiguous()
        i, f, g, o = gates.split(size, 2)
        slopes = [g * i * (1 - i), cell[:-1] * f * (1 - f), i * (1 - g * g)]
        inner, outside = torch.stack(slopes, 2), squashed * o * (1 - o)
        leak, at = o * (1 - squashed * squashed), torch.empty_like(gates)
        later = kept = outer.new_zeros(outer.shape[1:])
        for t in reversed(range(len(outer))):
            state = outer[t] + later
            kept = torch.addcmul(kept, state, leak[t])
            parts = at[t].unflatten(1, (4, size))
            torch.mul(inner[t], kept.unsqueeze(1), out=parts[:, :3])
            torch.mul(outside[t], state, out=parts[:, 3])
            later, kept = at[t] @ weight, kept * f[t]
        found = at.transpose(0, 1)
        return found, found, None, None, None, None, None


class Lstm(nn.Module):
    """One layer: ``(batch, places, inputs) -> (batch, places, hidden)``, causal.

    The same function as ``torch.nn.LSTM(inputs, hidden, batch_first=True)`` with ``read`` for its
    ``weight_ih_l0`` and the sum of its biases, and ``recall.weight`` for its ``weight_hh_l0``.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.read = nn.Linear(inputs, 4 * hidden)
        self.recall = nn.Linear(hidden, 4 * hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden state at each place."""
        read, weight = self.read(x), self.recall.weight.detach()
        states = unroll(read, weight)
        if not torch.is_grad_enabled():
            return states.hidden[1:].transpose(0, 1)
        # What this returns is in the states already: the call is for the gradient of the layer.
        recalled = self.recall(states.hidden[:-1].transpose(0, 1))
        found: Tensor = Backward.apply(read, recalled, weight, *states)
        return found


@models.register("lstm")
@options
class LstmModel:
    """LSTM over tokens that predicts the next one; blocks embed, lstm1, lstm2, ..., head.

    About 140,000 parameters with 100 tokens. No buffer, no dropout.
    """

    width: Annotated[Count, Field(description="numbers that a token is turned into")] = 32
    hidden: Annotated[Count, Field(description="units of each layer")] = 96
    depth: Annotated[Count, Field(description="layers, one block each")] = 2

    def build(self, task: Task) -> BlockNet:
        """Return the structure for ``task``; sequences of any length go through.

        Raises:
            ConfigError: the inputs are no sequences of tokens.
        """
        _, vocabulary = sequences(task, "lstm")
        blocks: dict[str, nn.Module] = {"embed": Embedding(vocabulary, self.width)}
        for i in range(1, self.depth + 1):
            blocks[f"lstm{i}"] = Lstm(self.width if i == 1 else self.hidden, self.hidden)
        return BlockNet(blocks, nn.Linear(self.hidden, vocabulary))
