"""Methods that keep one end of the network personal: FedPer and LG-FedAvg."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from fedkd.options import Count, options
from fedkd.strategies.averaging import ModelAveraging
from fedkd.strategies.base import strategies
from fedkd.strategies.schedule import LayerSchedule


@strategies.register("fedper")
@options
class FedPer(ModelAveraging):
    """The body is averaged, the last layers stay personal.

    Limits: ``personal_layers`` = 1 keeps the classifier only; all blocks would be local-only.
    Source: Arivazhagan et al., Federated Learning with Personalization Layers, arXiv:1912.00818.
    """

    source = "Arivazhagan et al., arXiv:1912.00818, section 3"
    sequences = True

    personal_layers: Annotated[
        Count, Field(description="blocks from the head down kept personal")
    ] = 1

    def schedule(self, blocks: Sequence[str]) -> LayerSchedule:
        return LayerSchedule.always(blocks[: max(1, len(blocks) - self.personal_layers)])


@strategies.register("lg-fedavg")
@options
class LgFedAvg(ModelAveraging):
    """One end of the network is averaged, the other stays personal; which end is said explicitly.

    The paper learns local representations and shares the upper layers (``shared = "head-end"``);
    its released CIFAR code shares the convolutions instead (``"input-end"``). Limits: all blocks
    shared is FedAvg.
    Source: Liang et al., Think Locally, Act Globally, arXiv:2001.01523, algorithm 1.
    """

    source = "Liang et al., arXiv:2001.01523, algorithm 1"
    sequences = True

    shared: Annotated[
        Literal["head-end", "input-end"], Field(description="which end of the network is averaged")
    ] = "head-end"
    shared_layers: Annotated[Count, Field(description="how many blocks from that end")] = 2

    def schedule(self, blocks: Sequence[str]) -> LayerSchedule:
        n = min(self.shared_layers, len(blocks))
        return LayerSchedule.always(blocks[-n:] if self.shared == "head-end" else blocks[:n])
