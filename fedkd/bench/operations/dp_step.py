"""A step of DP-SGD beside a plain one, of the same expected batch, in the one training loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from fedkd.bench.gate import apart
from fedkd.bench.operations.base import Operations
from fedkd.bench.registries import operations
from fedkd.errors import RunError

if TYPE_CHECKING:
    from fedkd.clients.dp_sgd import DpSgd, Mode
    from fedkd.models.base import BlockNet

BATCH, STEPS, NEAR = 64, 20, 1e-5
MODES: dict[str, Mode] = {"ours": "auto", "opacus hooks": "hooks", "opacus ghost": "ghost"}


class DpStep(Operations):
    """DP-SGD on one client, one thread."""

    unit = f"{STEPS} steps of batch {BATCH}"
    reference = "plain"
    model: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    def start(self, source: str, seed: int) -> None:
        import torch

        from fedkd.bench.playing import images
        from fedkd.clients.dp_sgd import poisson
        from fedkd.clients.training import Training
        from fedkd.data.federated import Split, compact
        from fedkd.rng import Rng
        from fedkd.types import Task

        torch.set_num_threads(1)
        self.source = source
        x, y = images(source, BATCH * STEPS)
        self.split = Split(compact(x), y)
        self.task = Task(name=source, input_shape=tuple(x.shape[1:]), classes=10)
        self.training = Training(steps=STEPS, batch_size=BATCH)

        # Poisson batches differ in size; of some streams, that whose sum is nearest to the plain.
        def off(rng: Rng) -> int:
            drawn = poisson(self.split, self.training, rng)
            return abs(sum(len(y) for _, y, _ in drawn) - BATCH * STEPS)

        self.rng = min((Rng(seed, ("bench", i)) for i in range(20)), key=off)
        self.apart = {name: self._apart(mode) for name, mode in MODES.items()}
        for name, difference in self.apart.items():
            if difference > NEAR:
                raise RunError(f"{name}: weights differ from Opacus' by {difference:.2g}")

    def steps(self) -> dict[str, Callable[[], None]]:
        from fedkd.clients.dp_sgd import DpSgd

        modes = {name: DpSgd(1.0, mode=mode) for name, mode in MODES.items()}
        made = {name: partial(self._train, self._net(), dp) for name, dp in modes.items()}
        return {"plain": partial(self._train, self._net(), None), **made}

    def facts(self) -> dict[str, Any]:
        values = {name: {"apart from hooks": value} for name, value in self.apart.items()}
        return {"source": self.source, "examples": len(self.split), "values": values}

    def _train(self, net: BlockNet, dp: DpSgd | None) -> None:
        """Go on training a network: to build one takes as long as steps of a small one."""
        from fedkd.clients.local import fit
        from fedkd.clients.terms import Supervised

        fit(net, self.split, [Supervised()], self.training, 0.01, self.rng, dp)

    def _net(self) -> BlockNet:
        from fedkd.models.base import build
        from fedkd.rng import Rng

        return build(self.model, self.options, self.task, Rng(0))

    def _fitted(self, dp: DpSgd | None) -> BlockNet:
        net = self._net()
        self._train(net, dp)
        return net

    def _apart(self, mode: Mode) -> float:
        """Return how far weights are from those by Opacus' hooks without noise."""
        from fedkd.clients.dp_sgd import DpSgd
        from fedkd.models.book import to_arrays

        one, other = (to_arrays(self._fitted(DpSgd(0.0, mode=m))) for m in (mode, "hooks"))
        return apart(one, other)


@operations.register("dp-step-cnn")
class DpStepCnn(DpStep):
    """A step of DP-SGD beside a plain one: fedkd's CNN."""

    title, model = "DP-SGD beside plain SGD, CNN", "cnn"


@operations.register("dp-step-mlp")
class DpStepMlp(DpStep):
    """A step of DP-SGD beside a plain one: a 784-64-10 perceptron."""

    title, model = "DP-SGD beside plain SGD, perceptron", "mlp"
    options: ClassVar[dict[str, Any]] = {"hidden": (64,)}
