"""The weights of many clients as stacked tensors, by the parameters that they are the values of.

Networks, and heads or peers beside them, may share parameters within a client; each is there once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedkd.clients.stacked.modules import Joined

Key = tuple[int, ...]
"""The identities of one parameter of each client: whoever has these reads the same weights."""


class Weights:
    """Stacked weights (K, ...) of ``parts``, to which they are bound; the network is the first.

    Attributes:
        members: the clients' own parameters.
        full: the stacked weights.
        trained: those that train, in the order in which one client's optimizer would have them.
        active: how many clients train now, the first of the stack.
    """

    def __init__(self, parts: Sequence[Joined]) -> None:
        self.parts = list(parts)
        self.members: dict[Key, tuple[nn.Parameter, ...]] = {}
        for part in self.parts:
            for members in part.shared.values():
                self.members.setdefault(_key(members), members)
        self.full = {
            key: torch.stack([p.detach() for p in members]) for key, members in self.members.items()
        }
        self.trained = [k for k, ps in self.members.items() if all(p.requires_grad for p in ps)]
        self.active = 0
        self._live: dict[Key, Tensor] = {}

    def apart(self) -> bool:
        """Return whether clients share no parameter, and each trains for all or none."""
        found = [one for key in self.members for one in key]
        even = all(len({p.requires_grad for p in ps}) == 1 for ps in self.members.values())
        return even and len(set(found)) == len(found)

    def trainable(self) -> list[Tensor]:
        """Return all clients' weights (K, ...) that train; changes in place are the clients'."""
        return [self.full[key] for key in self.trained]

    def narrow(self, active: int) -> list[Tensor]:
        """Go on with the first ``active`` clients; return the weights that train, as leaves.

        They are views: a change in place is one of :attr:`full`.
        """
        if active != self.active:
            self._live = {key: w[:active].detach() for key, w in self.full.items()}
            self.active = active
        for key in self.trained:
            self._live[key].requires_grad_()
        self.bind(self._live, active)
        return [self._live[key] for key in self.trained]

    def bind(self, weights: Mapping[Key, Tensor], clients: int | None) -> None:
        """Let all parts compute with ``weights``; see :meth:`Joined.bind`."""
        for part in self.parts:
            part.bind({n: weights[_key(ps)] for n, ps in part.shared.items()}, clients)

    def of_network(self) -> dict[str, Tensor]:
        """Return the active clients' weights of the network (K', ...) by name."""
        return {n: self._live[_key(ps)] for n, ps in self.parts[0].shared.items()}

    @torch.no_grad()
    def hand_back(self) -> Tensor:
        """Copy what was trained into the clients' parameters; return whose is finite (K,)."""
        finite = []
        for key in self.trained:
            stacked = self.full[key]
            finite.append(stacked.isfinite().flatten(1).all(1))
            for own, value in zip(self.members[key], stacked, strict=True):
                own.copy_(value)
        return torch.stack(finite).all(0).cpu()


def _key(members: Sequence[nn.Parameter]) -> Key:
    return tuple(map(id, members))
