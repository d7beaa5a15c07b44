"""Canaries of a run: secrets, holders and coins, drawn apart so that each can be varied alone.

Other coins plant another half of the same canaries in the same places: flipping one coin changes
one canary and nothing else, which is what audits with one run rest on.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkd.data.dataset import Dataset
from fedkd.data.federated import Planted
from fedkd.errors import ConfigError, DataError
from fedkd.privacy.canaries.images import Reserve, mislabelled, random_images, reserve
from fedkd.privacy.canaries.options import Canaries
from fedkd.privacy.canaries.secrets import (
    check_kind,
    draw_texts,
    enumerate_space,
    secrets_wanted,
    space_of,
    text_rows,
)
from fedkd.rng import Rng

__all__ = ["CanarySet", "Reserve", "draw", "enumerate_space", "reserve"]

Holders = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class CanarySet:
    """m canaries, levels ascending whatever their order in the options, and N references.

    Attributes:
        options: what was asked for.
        x: the canaries as rows of a data set, ``(m, ...)``.
        y: their labels, int64 ``(m,)``; 0 for text.
        repetitions: level of each, int64 ``(m,)``.
        inside: which were planted, bool ``(m,)``.
        holders: for each the clients that hold it, or would: those of tails too.
        reference_x: secrets that are never planted, ``(N, ...)``.
        reference_y: their labels, int64 ``(N,)``.
        texts: what is planted, for reading; "" for images.
        space: |R|, the number of secrets there are; infinity for images.
        sizes: training examples of each client, without canaries.
        rng: addresses the examples that canaries replace.
    """

    options: Canaries
    x: np.ndarray
    y: np.ndarray
    repetitions: np.ndarray
    inside: np.ndarray
    holders: Holders
    reference_x: np.ndarray
    reference_y: np.ndarray
    texts: tuple[str, ...]
    space: float
    sizes: tuple[int, ...]
    rng: Rng

    @property
    def copies(self) -> np.ndarray:
        """Rows that each canary has over all its holders, if inside: int64 ``(m,)``."""
        share = self.options.share
        if not share:
            return self.repetitions * self.options.clients
        rows = [sum(_replaced(share, self.sizes[k]) for k in who) for who in self.holders]
        return np.array(rows, dtype=np.int64)

    @property
    def changed(self) -> np.ndarray:
        """Rows added or removed by a coin: int64 ``(m,)``, the group of example-level privacy.

        Its copies; twice as many where each of them replaces an example.
        """
        return self.copies * (2 if self.options.share else 1)

    def planted(self, client: int, own: int) -> Planted | None:
        """Return what a client with ``own`` training examples gets; none where it gets nothing.

        Rows are in the order of the canaries, copies adjacent. With ``share`` p each canary has
        ``max(1, round(p own))`` rows and pushes out as many examples. These are set aside for
        canaries of tails too, so that no coin moves what another canary replaces.

        Raises:
            DataError: with ``share``, the client had another number of examples when drawn.
        """
        held = [i for i, who in enumerate(self.holders) if client in who]
        chosen = [i for i in held if self.inside[i]]
        if not chosen:
            return None
        copies, instead = self.repetitions[chosen], np.zeros(0, dtype=np.int64)
        if self.options.share:
            if own != self.sizes[client]:
                raise DataError(
                    f"canaries: client {client} has {own} training examples, but had "
                    f"{self.sizes[client]} when the canaries were drawn; draw them for its data"
                )
            each = _replaced(self.options.share, own)
            order = self.rng.child("instead", client).numpy().permutation(own)
            places = order[: each * len(held)].reshape(len(held), each)
            instead = np.sort(places[[i in chosen for i in held]].ravel())
            copies = np.full(len(chosen), each)
        rows = np.repeat(np.array(chosen), copies)
        return Planted(self.x[rows], self.y[rows], instead)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with any canary, coin, holder or reference."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (
            self.x,
            self.y,
            self.repetitions,
            self.inside,
            self.reference_x,
            self.reference_y,
        ):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        digest.update(f"{self.holders}{self.copies.tolist()}".encode())
        return digest.hexdigest()

    def report(self) -> dict[str, Any]:
        """Return what was planted where, as JSON: short, without the arrays."""
        text = self.options.kind == "text"
        copies = self.copies
        canaries = [
            {
                "number": i,
                "level": int(self.repetitions[i]),
                "copies": int(copies[i]),
                "inside": bool(self.inside[i]),
                "holders": list(self.holders[i]),
                **({"text": self.texts[i]} if text else {"label": int(self.y[i])}),
            }
            for i in range(len(self.y))
        ]
        finite = math.isfinite(self.space)
        return {
            "kind": self.options.kind,
            "count": len(canaries),
            "inside": int(self.inside.sum()),
            "references": len(self.reference_y),
            "space_bits": math.log2(self.space) if finite else "inf",
            "share": self.options.share,
            "digest": self.digest(),
            "canaries": canaries,
        }


def draw(
    options: Canaries,
    dataset: Dataset,
    reserve: Reserve | None,
    sizes: Sequence[int],
    rng: Rng,
    coins: Rng,
) -> CanarySet:
    """Draw the canaries of a run.

    Secrets are numbered, canaries first (levels ascending), then references; secret i of ``rng`` is
    the same for any number of references and any order of levels. Each canary has
    ``options.clients`` holders, no client more than one canary more than another. A canary is
    planted where its own fair coin, of ``coins``, falls on heads; nothing else depends on those.

    Args:
        options: what to plant.
        dataset: the training data, a reserve taken out.
        reserve: what :func:`reserve` took for mislabelled canaries.
        sizes: training examples of each client; 0 is allowed.
        rng: addresses secrets, holders and what is replaced.
        coins: addresses the coins.

    Raises:
        ConfigError: there are no canaries to draw, or the pattern is refused or has too few texts.
        DataError: the data cannot hold these canaries, there are too few clients or examples, or
            all coins fell on tails.
    """
    check_kind(options, dataset)
    m, wanted = secrets_wanted(options)
    holders = _holders(options, m, len(sizes), rng.child("holders"))
    if options.share:
        _check_share(options, holders, sizes)
    x, y, texts, space = _secrets(options, dataset, reserve, wanted, rng.child("secrets"))
    return CanarySet(
        options=options,
        x=x[:m],
        y=y[:m],
        repetitions=np.repeat(np.array(sorted(options.repetitions)), options.count),
        inside=_inside(options, m, coins),
        holders=holders,
        reference_x=x[m:],
        reference_y=y[m:],
        texts=texts[:m],
        space=space,
        sizes=tuple(int(n) for n in sizes),
        rng=rng,
    )


def _secrets(
    options: Canaries, dataset: Dataset, taken: Reserve | None, wanted: int, rng: Rng
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], float]:
    if options.kind == "text":
        texts, size = draw_texts(options, wanted, rng)
        rows = text_rows(texts, dataset)
        return rows, np.zeros(wanted, dtype=np.int64), tuple(texts), space_of(size)
    if options.kind == "random-image":
        x, y = random_images(dataset, wanted, rng)
    elif taken is None or len(taken.y) != wanted:
        found = "none" if taken is None else len(taken.y)
        raise DataError(
            f'canaries.kind = "mislabelled" needs a reserve of {wanted} examples (given: {found}); '
            "take it with reserve(), of the same options, before the data are divided"
        )
    else:
        x, y = mislabelled(taken, dataset.classes, rng)
    return x, y, ("",) * wanted, math.inf


def _inside(options: Canaries, m: int, coins: Rng) -> np.ndarray:
    if not options.coin:
        return np.ones(m, dtype=bool)
    inside = np.array([coins.child("coin", i).uniform() < 0.5 for i in range(m)])
    if not inside.any():
        raise DataError(
            f"canaries: the coins of all {m} canaries fell on tails, so none is planted; choose "
            "another seed, raise canaries.count, or set canaries.coin = false to plant them all"
        )
    return inside


def _holders(options: Canaries, m: int, clients: int, rng: Rng) -> Holders:
    """Give each canary to those clients that hold fewest, equal ones in random order."""
    if options.clients > clients:
        raise DataError(
            f"canaries.clients = {options.clients}: there are {clients} clients, and each holds a "
            f"canary once; set it to at most {clients}, or raise clients.count"
        )
    held, holders = np.zeros(clients, dtype=np.int64), []
    for i in range(m):
        order = np.lexsort((rng.child(i).numpy().random(clients), held))
        chosen = np.sort(order[: options.clients])
        held[chosen] += 1
        holders.append(tuple(chosen.tolist()))
    return tuple(holders)


def _replaced(share: float, own: int) -> int:
    """Return how many of its own examples a client gives up for one canary."""
    return max(1, round(share * own))


def _check_share(options: Canaries, holders: Holders, sizes: Sequence[int]) -> None:
    if options.repetitions != (1,):
        raise ConfigError(
            f"canaries.share = {options.share} replaces examples in place of copies, so "
            f"repetitions = {list(options.repetitions)} would say nothing; set repetitions = [1]"
        )
    held = Counter(client for who in holders for client in who)
    if all(n * _replaced(options.share, sizes[k]) <= sizes[k] for k, n in held.items()):
        return
    # Of n examples and h canaries each may replace n // h, so any share up to (n // h) / n fits.
    largest = {k: sizes[k] // n / sizes[k] if sizes[k] else 0.0 for k, n in held.items()}
    worst = min(largest, key=lambda k: (largest[k], k))
    allowed = math.floor(largest[worst] * 1e6) / 1e6
    fix = f"lower canaries.share to at most {allowed:g}" if allowed else "no share fits"
    raise DataError(
        f"canaries.share = {options.share}: client {worst} holds {held[worst]} canaries, each in "
        f"place of {_replaced(options.share, sizes[worst])} of its {sizes[worst]} training "
        f"examples, which are too few; {fix}; or lower canaries.count or canaries.clients, or add "
        "copies instead (share = 0)"
    )
