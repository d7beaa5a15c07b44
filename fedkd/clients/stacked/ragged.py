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
from fedkd.data.federated import Drawn, Split
from fedkd.rng import Rng


@dataclass
class Step:
    """One step, the ``number``-th, of the ``active`` first clients, K of them, on B rows each.

    ``x`` (K, B, ...) is a buffer that the next step overwrites; ``y`` (K, B, ...) and ``index``
    (K, B) count through the union of the stack's data; ``counts`` (K,) are real rows. Of ``real``
    (K, B) False marks padding, a copy of another row of the client; None: there is none.
    ``shares`` (K, B) is what a row counts in its client's mean, nothing if it is padding.
    """

    number: int
    active: int
    x: Tensor
    y: Tensor
    index: Tensor
    counts: Tensor
    real: Tensor | None
    shares: Tensor

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
        y, edges, union = self.y, np.array(self.first), self.union
        counts, cuts = self.counts.numpy(), np.diff(edges).tolist()
        widths = np.maximum.reduceat(counts, edges[:-1]).clip(1).tolist()
        least = np.minimum.reduceat(counts, edges[:-1]).tolist()
        every = (union, self.real.to(y.device), self.counts.to(y.device), self.shares)
        tables = zip(*(table.split(cuts) for table in every), strict=True)
        # Labels are fetched at once; rows of text are as large as inputs, so each when needed.
        labels = self.labels.split(cuts) if y.dim() == 1 else None
        fetch = _gather(self, union, cuts)
        full = self.positions.shape[1]
        for s, (index, real, count, shares) in enumerate(tables):
            active, width = cuts[s], widths[s]
            wanted = index if labels is None else labels[s]
            chosen = (index, real, shares, wanted)
            if width < full:
                chosen = tuple(table[:, :width] for table in chosen)
            own, kept, share, target = chosen
            x = fetch(s, active, width)
            if labels is None:
                target = y.index_select(0, own.flatten()).view(*own.shape, *y.shape[1:])
            padded = least[s] < width
            yield Step(s, active, x, target, own, count, kept if padded else None, share)

    @cached_property
    def y(self) -> Tensor:
        """The labels of the union of the stack's data."""
        return torch.cat([split.y for split in self.data])

    @cached_property
    def labels(self) -> Tensor:
        """The label of each example (R, B), where it has one."""
        return self.y[self.union]

    @cached_property
    def union(self) -> Tensor:
        """Where an example stands in the union of the stack's data (R, B), on its device."""
        return self.positions.to(self.offsets.device) + self.offsets[self.lanes][:, None]

    @cached_property
    def real(self) -> Tensor:
        """Which examples are no padding (R, B)."""
        return torch.arange(self.positions.shape[1]) < self.counts[:, None]

    @cached_property
    def shares(self) -> Tensor:
        """What an example counts in its client's mean of a step (R, B)."""
        like = self.data[0].like
        kind = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        return (self.real.to(kind) / self.counts.clamp_min(1)[:, None]).to(like.device)


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


def _gather(plan: Plan, union: Tensor, cuts: list[int]) -> Callable[[int, int, int], Tensor]:
    """Return what fetches x (K, B, ...) of a step, its clients and rows, into one buffer.

    Rows of one table are fetched from there. Other clients' data lie apart; to join them would cost
    a copy of it all, which is more than a step has to move. On another device than the CPU a call a
    client costs more than that copy.
    """
    data, like, full = plan.data, plan.data[0].like, plan.positions.shape[1]
    shape = like.shape[1:]
    buffer = like.new_empty(len(data) * full, *shape)
    flat, whole = buffer.flatten(1), dict[tuple[int, int], tuple[Tensor, Tensor]]()

    def room(active: int, width: int) -> tuple[Tensor, Tensor]:
        if (active, width) not in whole:
            n = active * width
            whole[active, width] = flat[:n], buffer[:n].view(active, width, *shape)
        return whole[active, width]

    table, where = _table(data), union
    if table is not None:
        index = [d.rows.index for d in data if isinstance(d, Drawn) and d.rows is not None]
        where = torch.from_numpy(np.concatenate(index))[union]
    elif like.device.type != "cpu":
        table = torch.cat([split.x for split in data])
    if table is not None:
        source, steps = table.flatten(1), where.split(cuts)

        def at_once(step: int, active: int, width: int) -> Tensor:
            rows, shaped = room(active, width)
            own = steps[step] if width == full else steps[step][:, :width]
            torch.index_select(source, 0, own.reshape(-1), out=rows)
            return shaped

        return at_once
    xs, positions = [split.x for split in data], plan.positions
    wanted, first = positions.unbind(0), plan.first

    def one_by_one(step: int, active: int, width: int) -> Tensor:
        shaped = room(active, width)[1]
        chosen = wanted[first[step] : first[step] + active]
        if width < full:
            chosen = positions[first[step] : first[step] + active, :width].unbind(0)
        outs = shaped.unbind(0)
        for x, local, out in zip(xs, chosen, outs, strict=False):
            torch.index_select(x, 0, local, out=out)
        return shaped

    return one_by_one


def _table(data: list[Split]) -> Tensor | None:
    """Return the table of which all ``data`` are rows; None: there is none."""
    # A subclass may do something to its rows.
    rows = [split.rows if type(split) is Drawn else None for split in data]
    tables = [None if own is None else own.table for own in rows]
    return tables[0] if all(table is tables[0] for table in tables) else None
