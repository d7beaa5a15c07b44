"""Which examples each client of a stack sees in each step: many ragged fits as one regular one.

Clients stand in the order of their steps, most first, so that those still at work are a prefix of
the stack, and only the last batch of an epoch is padded. Batches are the very ones of ``fit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedkd.clients.dp_sgd import rate_of, steps_of
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.rng import Rng


@dataclass
class Step:
    """One step of the ``active`` first clients of the stack, K of them, on B rows each.

    ``x`` (K, B, ...) is a buffer that the next step overwrites; ``y`` (K, B, ...) and ``index``
    (K, B) count through the union of the stack's data; ``counts`` (K,) are real rows. Of ``real``
    (K, B) False marks padding, a copy of another row of the client; None: there is none.
    """

    active: int
    x: Tensor
    y: Tensor
    index: Tensor
    counts: Tensor
    real: Tensor | None

    def shares(self, like: Tensor) -> Tensor:
        """Return what a row counts in its client's mean (K, B), in the type of ``like``."""
        real = torch.ones_like(self.index, dtype=torch.bool) if self.real is None else self.real
        return real.to(like.dtype) / self.counts.clamp_min(1)[:, None]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over each client's real rows (K,) of values (K, B); 0 without rows."""
        if self.real is None:
            return values.mean(1)
        kept = torch.where(self.real, values, torch.zeros_like(values))
        return kept.sum(1) / self.counts.clamp_min(1)


@dataclass(frozen=True)
class Plan:
    """All steps of a stack, in order: ``for step in plan``.

    ``order`` has the stack's clients as positions in what was given; ``data``, ``steps`` and
    ``examples`` (seen, in all steps) follow the stack, ``offsets`` are where its clients begin in
    the union. ``positions`` (R, B) are the examples of client k in step s in row ``first[s] + k``,
    counted within the client's data; ``counts`` (R,) of them are real.
    """

    order: list[int]
    data: list[Split]
    steps: list[int]
    examples: list[int]
    offsets: Tensor
    first: list[int]
    positions: Tensor
    counts: Tensor

    @cached_property
    def lanes(self) -> Tensor:
        """Whose a row of ``positions`` is (R,): the client's place in the stack."""
        edges = np.array(self.first)
        return torch.from_numpy(np.arange(edges[-1]) - np.repeat(edges[:-1], np.diff(edges)))

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps. What can be done for all of them at once is: they may be small."""
        y = torch.cat([split.y for split in self.data])
        edges = np.array(self.first)
        union = self.positions.to(y.device) + self.offsets[self.lanes][:, None]
        places = torch.arange(self.positions.shape[1])
        real = (places < self.counts[:, None]).to(y.device)
        counts, cuts = self.counts.numpy(), np.diff(edges).tolist()
        widths = np.maximum.reduceat(counts, edges[:-1]).clip(1).tolist()
        least = np.minimum.reduceat(counts, edges[:-1]).tolist()
        # Labels are fetched at once; rows of text are as large as inputs, so each when needed.
        labels = y[union].split(cuts) if y.dim() == 1 else None
        tallies = self.counts.to(y.device).split(cuts)
        tables = zip(union.split(cuts), real.split(cuts), tallies, strict=True)
        fetch = _gather(self.data, self.positions)
        full = self.positions.shape[1]
        for s, (wide, mask, count) in enumerate(tables):
            active, width = cuts[s], widths[s]
            index, kept = wide, mask
            if width < full:
                index, kept = wide[:, :width], mask[:, :width]
            x = fetch(self.first[s], active, width, index)
            if labels is None:
                own = y.index_select(0, index.flatten()).view(*index.shape, *y.shape[1:])
            else:
                own = labels[s] if width == full else labels[s][:, :width]
            yield Step(active, x, own, index, count, kept if least[s] < width else None)


def epochs(data: Sequence[Split], training: Training, rngs: Sequence[Rng]) -> Plan:
    """Return the plan of plain training: permutations of ``rng.child("epoch", e)``, cut up."""
    size = training.batch_size

    def table(split: Split, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        n, steps = len(split), steps_of(training, len(split))
        per_epoch = -(-n // size)
        counts = np.full(per_epoch, size)
        counts[-1] = n - size * (per_epoch - 1)
        found = []
        for epoch in range(-(-steps // per_epoch)):
            order = torch.randperm(n, generator=rng.child("epoch", epoch).torch()).numpy()
            # Padding repeats a row of its own batch: where that is finite, so is the padding.
            padded = np.pad(order, (0, per_epoch * size - n), mode="edge")
            found.append(padded.reshape(per_epoch, size))
        return np.concatenate(found)[:steps], np.tile(counts, len(found))[:steps]

    return _plan(data, rngs, table)


def poisson(data: Sequence[Split], training: Training, rngs: Sequence[Rng]) -> Plan:
    """Return the plan of DP-SGD: the coins of ``rng.child("poisson", s)``; batches may be empty."""

    def table(split: Split, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        n, rate = len(split), rate_of(training, len(split))
        drawn = [
            (rng.child("poisson", step).numpy().random(n) < rate).nonzero()[0]
            for step in range(steps_of(training, n))
        ]
        counts = np.array([len(batch) for batch in drawn])
        positions = np.zeros((len(drawn), max(1, int(counts.max()))), dtype=np.int64)
        for row, batch in zip(positions, drawn, strict=True):
            row[: len(batch)] = batch
            row[len(batch) :] = batch[0] if len(batch) else 0
        return positions, counts

    return _plan(data, rngs, table)


def _plan(
    data: Sequence[Split],
    rngs: Sequence[Rng],
    table: Callable[[Split, Rng], tuple[np.ndarray, np.ndarray]],
) -> Plan:
    tables = [table(split, rng) for split, rng in zip(data, rngs, strict=True)]
    order = sorted(range(len(tables)), key=lambda i: -len(tables[i][1]))
    tables = [tables[i] for i in order]
    steps = np.array([len(counts) for _, counts in tables])
    active = np.searchsorted(-steps, -np.arange(steps[0]), side="left")
    first = np.concatenate([[0], np.cumsum(active)])
    width = max(positions.shape[1] for positions, _ in tables)
    positions = np.zeros((first[-1], width), dtype=np.int64)
    counts = np.zeros(first[-1], dtype=np.int64)
    for k, (own, real) in enumerate(tables):
        rows = first[: len(own)] + k
        positions[rows, : own.shape[1]] = own
        positions[rows, own.shape[1] :] = own[:, -1:]
        counts[rows] = real
    sizes = np.array([len(data[i]) for i in order])
    device = data[0].y.device
    return Plan(
        order=order,
        data=[data[i] for i in order],
        steps=steps.tolist(),
        examples=[int(real.sum()) for _, real in tables],
        offsets=torch.from_numpy(np.cumsum(sizes) - sizes).to(device),
        first=first.tolist(),
        positions=torch.from_numpy(positions),
        counts=torch.from_numpy(counts),
    )


def _gather(data: list[Split], positions: Tensor) -> Callable[[int, int, int, Tensor], Tensor]:
    """Return what fetches x (K, B, ...) of K clients, whose ``positions`` begin in some row.

    Clients' data lie apart; to join them would cost a copy of it all, which is more than a step
    has to move. On another device than the CPU a call a client costs more than that copy.
    """
    like = data[0].x
    rows, shape = positions.shape[1], like.shape[1:]
    buffer = like.new_empty(len(data) * rows, *shape)
    if like.device.type != "cpu":
        joined = torch.cat([split.x for split in data])

        def at_once(row: int, active: int, width: int, index: Tensor) -> Tensor:
            out = buffer[: active * width]
            torch.index_select(joined, 0, index.flatten(), out=out)
            return out.view(active, width, *shape)

        return at_once
    xs, wanted = [split.x for split in data], positions.unbind(0)
    outs: dict[int, tuple[Tensor, ...]] = {}
    whole: dict[tuple[int, int], Tensor] = {}

    def one_by_one(row: int, active: int, width: int, index: Tensor) -> Tensor:
        if width not in outs:
            outs[width] = buffer[: len(data) * width].split(width)
        if (active, width) not in whole:
            whole[active, width] = buffer[: active * width].view(active, width, *shape)
        chosen = wanted[row : row + active]
        if width < rows:
            chosen = positions[row : row + active, :width].unbind(0)
        for x, local, out in zip(xs, chosen, outs[width], strict=False):
            torch.index_select(x, 0, local, out=out)
        return whole[active, width]

    return one_by_one
