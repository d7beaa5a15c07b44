"""The reference: the loop that a researcher would write by hand for this one experiment.

Preloaded tensors, one network, torch's SGD, one client after the other; no framework.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedkd.bench.backends.base import Backend
from fedkd.bench.backends.nets import network
from fedkd.bench.registries import backends
from fedkd.bench.work import Work


@backends.register("bare")
class Bare(Backend):
    """The loop that one would write by hand, row-major."""

    channels_last: ClassVar[bool] = False

    def start(self, work: Work, dtype: str, threads: int, workers: int) -> None:
        import torch

        torch.set_num_threads(threads)
        last = self.channels_last and work.x.ndim == 4
        layout = torch.channels_last if last else torch.contiguous_format
        self.work, self.layout, self.trained = work, layout, 0
        kind = getattr(torch, dtype)
        self.net = network(work, dtype).to(memory_format=layout)  # type: ignore[call-overload]
        self.state = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        self.data = [
            (
                torch.from_numpy(work.x[own]).to(kind).contiguous(memory_format=layout),
                torch.from_numpy(work.y[own]),
            )
            for own in work.owners
        ]

    def round(self, round_: int) -> None:
        import torch
        from torch.nn import functional

        work, size, parameters = self.work, self.work.batch_size, dict(self.net.named_parameters())
        cohort = work.cohort(round_)
        total, self.trained = sum(len(self.data[k][1]) for k in cohort), 0
        new = {name: torch.zeros_like(value) for name, value in self.state.items()}
        for k in cohort:
            x, y = self.data[k]
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(self.state[name])
            optimizer = torch.optim.SGD(parameters.values(), lr=work.lr)
            order = torch.from_numpy(work.order(round_, k))
            x, y = x[order].contiguous(memory_format=self.layout), y[order]
            for i in range(0, len(y), size):
                optimizer.zero_grad()
                functional.cross_entropy(self.net(x[i : i + size]), y[i : i + size]).backward()
                optimizer.step()
            self.trained += len(y)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    new[name] += parameter * (len(y) / total)
        self.state = new

    def weights(self) -> dict[str, np.ndarray]:
        return {name: value.contiguous().numpy() for name, value in self.state.items()}

    def samples(self) -> int:
        return self.trained


@backends.register("bare-channels-last")
class BareChannelsLast(Bare):
    """The same with images and weights channels last, which convolutions are faster in."""

    channels_last = True
