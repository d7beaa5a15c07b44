"""Partitions that leave the classes alone: iid, quantity skew, feature shift, natural owners.

They are the control (iid) and the kinds of heterogeneity that label skew does not show: clients
of different sizes, clients that see the world differently, and clients as they really are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from fedkd.data.apportion import apportion, check_request, settle
from fedkd.data.dataset import Dataset
from fedkd.data.label_skew import AllowEmpty, Concentration, MinExamples, dirichlet
from fedkd.data.partition import Scheme, own_test
from fedkd.data.registries import partitions
from fedkd.errors import ConfigError, DataError
from fedkd.options import options
from fedkd.rng import Rng


@partitions.register("iid")
@options
class Iid(Scheme):
    """No skew: all examples in random order, cut into equal parts."""

    def split(
        self, labels: np.ndarray, clients: int, rng: Rng, ids: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Divide the examples; see :meth:`Scheme.split`."""
        return even(len(labels), clients, rng)


@partitions.register("quantity")
@options
class Quantity(Scheme):
    r"""Quantity skew: client sizes are Dirichlet proportions, classes are left to chance.

    :math:`s \sim \mathrm{Dir}_K(\alpha)`, and client k gets the share :math:`s_k` of all examples
    (Li et al., ICDE 2022, section 4). Limits: alpha -> inf is iid.
    """

    alpha: Concentration = 0.5
    min_examples: MinExamples = 10
    allow_empty: AllowEmpty = False

    def split(
        self, labels: np.ndarray, clients: int, rng: Rng, ids: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Divide the examples; see :meth:`Scheme.split`."""
        minimum = 0 if self.allow_empty else self.min_examples
        check_request(len(labels), clients, minimum)

        def draw(stream: Rng) -> np.ndarray:
            shares = dirichlet(np.full(clients, self.alpha), stream.numpy())
            return apportion(shares, len(labels), stream.child("round"))[:, None]

        sizes = settle(draw, minimum, rng.child("counts"))[:, 0]
        order = rng.child("order").numpy().permutation(len(labels))
        return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


@partitions.register("rotation")
@options
class Rotation(Scheme):
    """Feature shift: iid parts, but each client sees its images rotated by its own angle.

    The angles are spaced evenly from ``-max_degrees`` to ``max_degrees``; a client's training,
    validation and test images are all rotated. Limits: ``max_degrees`` = 0 is iid.
    """

    max_degrees: Annotated[
        float, Field(ge=0, le=180, description="largest angle, to either side")
    ] = 45.0

    def split(
        self, labels: np.ndarray, clients: int, rng: Rng, ids: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Divide the examples; see :meth:`Scheme.split`."""
        return even(len(labels), clients, rng)

    def degrees(self, clients: int) -> tuple[float, ...]:
        """Return the angle of each client; a single client is not rotated."""
        if clients == 1:
            return (0.0,)
        return tuple(np.linspace(-self.max_degrees, self.max_degrees, clients).tolist())


@partitions.register("natural")
@options
class Natural(Scheme):
    """Natural owners: each client is one owner of the data (writer, speaker, hospital).

    Owners become clients in the order of their ids. With ``group`` clients may be fewer than
    owners: owners in random order are given one by one to the client that has fewest examples.
    Own test data are the owner's own test examples; a client without any borrows one as
    :func:`own_test` says.

    Raises:
        DataError: the data source has no owners.
        ConfigError: there are fewer owners than clients, or more and ``group`` is false.
    """

    group: Annotated[
        bool, Field(description="merge owners where there are more of them than clients")
    ] = False

    def split(
        self, labels: np.ndarray, clients: int, rng: Rng, ids: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Divide the examples; see :meth:`Scheme.split`."""
        if ids is None:
            raise DataError(
                "partition natural needs to know who owns each example, and this data source does "
                "not say; take femnist, shakespeare, an npz file with train_ids, or another "
                "partition"
            )
        owners, owner, sizes = np.unique(ids, return_inverse=True, return_counts=True)
        if clients > len(owners):
            raise ConfigError(
                f"clients = {clients}: the data have {len(owners)} natural owners; allowed: "
                f"1 to {len(owners)}"
            )
        client_of = np.arange(len(owners))
        if clients < len(owners):
            if not self.group:
                raise ConfigError(
                    f"clients = {clients}: the data have {len(owners)} natural owners; set clients "
                    f"to {len(owners)}, or group = true to merge owners"
                )
            client_of = self._merge(sizes, clients, rng)
        client = client_of[owner]
        return [np.flatnonzero(client == k) for k in range(clients)]

    def split_test(self, data: Dataset, train: Sequence[np.ndarray], rng: Rng) -> list[np.ndarray]:
        """Return each client's own test examples: those that its owners own."""
        if data.test_ids is None or data.train_ids is None:
            return own_test(data.train_y, train, data.test_y, rng)
        parts = [
            np.flatnonzero(np.isin(data.test_ids, np.unique(data.train_ids[part])))
            for part in train
        ]
        return borrow(parts, rng)

    def _merge(self, sizes: np.ndarray, clients: int, rng: Rng) -> np.ndarray:
        client_of = np.empty(len(sizes), dtype=np.int64)
        loads = np.zeros(clients, dtype=np.int64)
        for place, who in enumerate(rng.child("merge").numpy().permutation(len(sizes))):
            # The first owners go to one client each, so that none stays empty.
            k = place if place < clients else int(loads.argmin())
            client_of[who] = k
            loads[k] += sizes[who]
        return client_of


def borrow(parts: list[np.ndarray], rng: Rng) -> list[np.ndarray]:
    """Give each empty part one random example of the largest part.

    Raises:
        DataError: there are fewer examples than parts.
    """
    sizes = [len(part) for part in parts]
    if sum(sizes) < len(parts):
        raise DataError(
            f"{sum(sizes)} test examples cannot give each of {len(parts)} clients one of its own; "
            f"lower clients, or raise test_limit"
        )
    for k, size in enumerate(sizes):
        if size == 0:
            giver = int(np.argmax([len(part) for part in parts]))
            place = int(rng.child("borrow", k).numpy().integers(len(parts[giver])))
            parts[k] = parts[giver][place : place + 1]
            parts[giver] = np.delete(parts[giver], place)
    return parts


def even(examples: int, clients: int, rng: Rng) -> list[np.ndarray]:
    """Return random parts of equal size, up to one example."""
    check_request(examples, clients, 1)
    order = rng.child("order").numpy().permutation(examples)
    return [np.sort(part) for part in np.array_split(order, clients)]
