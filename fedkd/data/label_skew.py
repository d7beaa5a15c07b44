"""Partitions in which clients hold different classes: Dirichlet, pathological, shards.

Label skew is the kind of heterogeneity that most federated papers measure; the three schemes are
the three in common use, made to end and to refuse what cannot be done.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from fedkd.data.apportion import apportion, check_request, settle
from fedkd.data.partition import Scheme, deal
from fedkd.data.registries import partitions
from fedkd.errors import ConfigError
from fedkd.options import Count, options
from fedkd.rng import Rng

Concentration = Annotated[
    float,
    Field(gt=0, le=1e9, description="concentration: small is skewed, large is even (0.1 to 100)"),
]
MinExamples = Annotated[
    int, Field(ge=1, description="every client gets at least so many training examples")
]
AllowEmpty = Annotated[
    bool, Field(description="let clients be empty; min_examples is then not enforced")
]


@partitions.register("dirichlet")
@options
class Dirichlet(Scheme):
    r"""Label skew: each class is divided over the clients by Dirichlet proportions.

    For each class c independently :math:`p_c \sim \mathrm{Dir}_K(\alpha, ..., \alpha)`, and client
    k gets the share :math:`p_{ck}` of its examples (Yurochkin et al., ICML 2019, section 4). Sizes
    differ. With ``balanced`` each client has the same size (up to one example) and its own class
    mixture :math:`q_k \sim \mathrm{Dir}(\alpha C \pi)`, pi being the class frequencies (Hsu, Qi and
    Brown, arXiv:1909.06335, whose alpha is C times ours); clients choose in random order, and a
    class that is used up is replaced by what is left, so the last ones choose less freely.

    Limits: alpha -> inf gives everybody the same class mixture; alpha -> 0 gives each class to one
    client (each client one class if balanced).
    """

    alpha: Concentration = 0.5
    balanced: Annotated[bool, Field(description="give all clients the same number")] = False
    min_examples: MinExamples = 10
    allow_empty: AllowEmpty = False

    def split(
        self, labels: np.ndarray, clients: int, rng: Rng, ids: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Divide the examples; see :meth:`Scheme.split`."""
        minimum = 0 if self.allow_empty else self.min_examples
        check_request(len(labels), clients, minimum)
        totals = np.bincount(labels)
        draw = self._mixtures if self.balanced else self._shares
        counts = settle(lambda r: draw(totals, clients, r), minimum, rng.child("counts"))
        return deal(labels, counts, rng.child("deal"))

    def _shares(self, totals: np.ndarray, clients: int, rng: Rng) -> np.ndarray:
        counts = np.zeros((clients, len(totals)), dtype=np.int64)
        generator = rng.numpy()
        for c, total in enumerate(totals):
            shares = dirichlet(np.full(clients, self.alpha), generator)
            counts[:, c] = apportion(shares, int(total), rng.child("round", c))
        return counts

    def _mixtures(self, totals: np.ndarray, clients: int, rng: Rng) -> np.ndarray:
        generator = rng.numpy()
        left = totals.astype(np.int64)
        prior = left / left.sum()
        present = prior > 0
        size, extra = divmod(int(left.sum()), clients)
        counts = np.zeros((clients, len(totals)), dtype=np.int64)
        for place, k in enumerate(generator.permutation(clients)):
            mixture = np.zeros(len(totals))
            weights = self.alpha * prior[present] * present.sum()
            mixture[present] = dirichlet(weights, generator)
            need = size + (place < extra)
            while need > 0:
                # Each pass satisfies the client or uses up a class, so there are few of them.
                wanted = np.where(left > 0, mixture, 0.0)
                wanted = wanted if wanted.sum() > 0 else left.astype(float)
                taken = np.minimum(apportion(wanted, need, rng.child("round", place, need)), left)
                counts[k] += taken
                left = left - taken
                need -= int(taken.sum())
        return counts


@partitions.register("pathological")
@options
class Pathological(Scheme):
    """Label skew: each client holds exactly k classes, divided evenly among their holders.

    Classes are chosen so that all are held by equally many clients, up to one. Limits:
    ``classes_per_client`` = number of classes gives everybody an equal part of each class.

    Raises:
        ConfigError: k exceeds the number of classes; ``clients * k`` is below it, so that some
            class would belong to nobody; or a class has fewer examples than holders.
    """

    classes_per_client: Annotated[
        int, Field(ge=1, description="number of classes that each client holds")
    ] = 2

    def split(
        self, labels: np.ndarray, clients: int, rng: Rng, ids: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Divide the examples; see :meth:`Scheme.split`."""
        check_request(len(labels), clients, 1)
        totals = np.bincount(labels)
        present = np.flatnonzero(totals)
        self._check(len(present), clients)
        holds = np.zeros((clients, len(totals)), dtype=bool)
        generator = rng.child("classes").numpy()
        for k in generator.permutation(clients):
            ties = generator.random(len(present))
            rarest = np.lexsort((ties, holds.sum(0)[present]))[: self.classes_per_client]
            holds[k, present[rarest]] = True
        scarce = np.flatnonzero(totals < holds.sum(0))
        if len(scarce):
            rare = int(scarce[0])
            raise ConfigError(
                f"classes_per_client = {self.classes_per_client} with {clients} clients makes "
                f"{int(holds[:, rare].sum())} of them hold class {rare}, with {int(totals[rare])} "
                f"training examples; lower clients or classes_per_client"
            )
        counts = np.zeros(holds.shape, dtype=np.int64)
        for c in present:
            counts[:, c] = apportion(holds[:, c], int(totals[c]), rng.child("round", int(c)))
        return deal(labels, counts, rng.child("deal"))

    def _check(self, classes: int, clients: int) -> None:
        fewest = -(-classes // clients)
        if not fewest <= self.classes_per_client <= classes:
            reason = (
                f"there are {classes} classes"
                if self.classes_per_client > classes
                else f"{clients} clients have to hold all {classes} classes"
            )
            raise ConfigError(
                f"classes_per_client = {self.classes_per_client}: {reason}; allowed: {fewest} to "
                f"{classes}"
            )


@partitions.register("shards")
@options
class Shards(Scheme):
    """Label skew: examples sorted by class are cut into equal shards and dealt at random.

    Each client gets ``shards_per_client`` of them (McMahan et al., AISTATS 2017, section 3, who use
    2). All clients have the same size, up to ``shards_per_client`` examples, and hold at most about
    ``2 * shards_per_client`` classes. Limits: many shards approach iid.
    """

    shards_per_client: Annotated[Count, Field(description="shards that each client gets")] = 2

    def split(
        self, labels: np.ndarray, clients: int, rng: Rng, ids: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Divide the examples; see :meth:`Scheme.split`."""
        check_request(len(labels), clients, 1)
        shards = clients * self.shards_per_client
        if shards > len(labels):
            raise ConfigError(
                f"shards_per_client = {self.shards_per_client} with {clients} clients makes "
                f"{shards} shards of {len(labels)} training examples; allowed: 1 to "
                f"{len(labels) // clients}"
            )
        ties = rng.child("order").numpy().random(len(labels))
        pieces = np.array_split(np.lexsort((ties, labels)), shards)
        hands = rng.child("deal").numpy().permutation(shards).reshape(clients, -1)
        return [np.sort(np.concatenate([pieces[s] for s in hand])) for hand in hands]


def dirichlet(alpha: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw from a Dirichlet distribution, with its limit where alpha is too small for floats.

    For alpha -> 0 all mass falls on one component, chosen in proportion to alpha.
    """
    with np.errstate(all="ignore"):
        drawn = generator.dirichlet(alpha)
    if np.isfinite(drawn).all() and drawn.sum() > 0:
        return drawn
    corner = np.zeros(len(alpha))
    corner[generator.choice(len(alpha), p=alpha / alpha.sum())] = 1.0
    return corner
