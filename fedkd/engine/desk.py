"""The client's side of a privacy plan: DP-SGD, noised class sums, local noise, its own account."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedkd.clients.client import Client
from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.swing_targets import SwingTargets
from fedkd.engine.guard import check_covered, declared, keys_of, prefixes_of
from fedkd.engine.setup import Prepared
from fedkd.engine.swinging import own
from fedkd.errors import RunError
from fedkd.privacy.accounting import History
from fedkd.privacy.class_sums import noisy_class_means, noisy_histogram
from fedkd.privacy.client_level import ClientLevel
from fedkd.privacy.options import Release
from fedkd.privacy.payload import Histogram, Payload, Table
from fedkd.types import Arrays

HISTORY = "privacy/history"
"""In a client's memory, (R, 3): how often which mechanism ran on its data, merged."""


class Desk:
    """What a client does for privacy in a round; nothing of a client is kept here."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.plan = prepared, prepared.plan
        self.level = ClientLevel(self.plan.options, self.plan.noise_multiplier)
        self.digest = prepared.experiment.digest()
        self._swings: dict[int, tuple[SwingTargets, Tensor]] = {}

    def equip(self, client: Client) -> None:
        """Give a client the mechanisms that its local work has to go through."""
        options = self.plan.options
        self._warm(client)
        if options.unit != "example":
            return
        noise = self.plan.noise[client.info.id]
        if self.plan.sgd:
            client.dp = DpSgd(
                noise_multiplier=noise,
                max_grad_norm=options.dp_sgd.max_grad_norm,
                mode=options.dp_sgd.grad_sample_mode,
                max_physical_batch_size=options.dp_sgd.max_physical_batch_size,
                address=self.digest,
            )
        if self.plan.population.tables:
            client.release = TableRelease(client, options.release, self.digest)

    def _warm(self, client: Client) -> None:
        """Give a client the temperatures of swing distillation; own examples are scored once."""
        swing, setting = self.prepared.swing, self.prepared.setting
        if swing is None:
            return
        client.swing, client.public_temperatures = setting.swing, setting.public_temperatures
        if self.prepared.strategy.swings == "own":
            k = client.info.id
            if k not in self._swings:
                self._swings[k] = own(swing, client.data.train)
            client.swing, client.temperatures = self._swings[k]

    def hand_out(self, client: Client, received: Arrays, arrays: Arrays) -> Arrays:
        """Return what leaves the client: under local noise, its upload with noise.

        Raises:
            RunError: an array that no mechanism covers, or that went past the one that should.
        """
        plan, prepared = self.plan, self.prepared
        if not plan.active or plan.central:
            return arrays
        payload = declared(
            prepared.strategy.declare(received, client.info, client.round, prepared.setting),
            client.round,
        )
        check_covered(arrays, payload, f"client {client.info.id}")
        if not plan.local:
            check_released(client, arrays, payload)
            return arrays
        if not payload:
            return arrays
        norm, rng = plan.options.clipping.norm, client.rng("privacy", self.digest, "local")
        noised = self.level.privatise(arrays, payload, norm, rng)
        client.spent.append((self.level.worst(payload), 1.0, 1))
        return noised

    def book(self, client: Client) -> None:
        """Add what was spent in this round to the client's own account, which it keeps."""
        if client.spent:
            before = client.state.get(HISTORY)
            history = History() if before is None else History.from_rows(before)
            client.state[HISTORY] = history.joined(History(client.spent)).rows()


@dataclass(frozen=True)
class TableRelease:
    """Noised class means and label counts of one client in one round; each release is paid for."""

    client: Client
    options: Release
    address: str
    issued: list[np.ndarray] = field(default_factory=list)
    """The very arrays that were noised and paid for: nothing else of their kind may leave."""

    def means(
        self,
        values: Mapping[str, Tensor],
        y: Tensor,
        *,
        simplex: frozenset[str],
        counted: bool,
        point: str,
    ) -> Arrays:
        """Return ``labels``, fields and ``counts`` of noised sums by noised counts.

        Every class gets noise, so that which classes a client holds does not show.
        """
        table = noisy_class_means(
            {name: value.detach().cpu().numpy() for name, value in values.items()},
            y.cpu().numpy(),
            self.client.task.classes,
            simplex=simplex & set(values),
            release=self.options,
            noise_multiplier=self._pay(),
            rng=self.client.rng("privacy", self.address, "table", point),
            counted=counted,
        )
        self.issued.extend(table.values())
        return table

    def histogram(self, y: Tensor) -> np.ndarray:
        """Return noised numbers of examples by class, int32 (C,)."""
        counts = noisy_histogram(
            y.cpu().numpy(),
            self.client.task.classes,
            noise_multiplier=self._pay(),
            rng=self.client.rng("privacy", self.address, "histogram"),
        )
        self.issued.append(counts)
        return counts

    def _pay(self) -> float:
        noise = float(self.options.noise_multiplier or 0.0)
        self.client.spent.append((noise, 1.0, 1))
        return noise


def check_released(client: Client, arrays: Arrays, payload: Payload) -> None:
    """Refuse class sums and label counts of own examples that were not noised and paid for.

    DP-SGD covers what a network says of public inputs, never what is computed of own data anew.

    Raises:
        RunError: names the array.
    """
    own = tuple(part for part in payload if isinstance(part, Table | Histogram))
    keys, below = keys_of(own), tuple(f"{prefix}/" for prefix in prefixes_of(own))
    issued = client.release.issued if isinstance(client.release, TableRelease) else []
    for key, value in arrays.items():
        if (key in keys or key.startswith(below)) and not any(value is one for one in issued):
            raise RunError(
                f"client {client.info.id} uploads {key!r} of its own examples without the noise of "
                "privacy.release; a strategy has to make it by client.release"
            )
