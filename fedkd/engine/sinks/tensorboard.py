"""TensorBoard: event files in the run folder, ``tensorboard --logdir DIR``; no network.

Of torch's writer, which needs the package ``tensorboard`` but not TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from fedkd.engine.sinks.base import Sink, Start, sinks
from fedkd.types import Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@sinks.register("tensorboard")
@final
class TensorBoard(Sink):
    """Event files for TensorBoard, in sinks/tensorboard of the run folder."""

    extra: ClassVar[str] = "tensorboard"

    @classmethod
    def modules(cls) -> tuple[str, ...]:
        return ("tensorboard",)

    def start(self, start: Start) -> str:
        from torch.utils.tensorboard import SummaryWriter

        place = start.folder / "sinks" / "tensorboard"
        # What an interrupted run wrote after its last checkpoint comes once more: hide the first.
        again = place.is_dir() and any(place.iterdir())
        purge = start.first_round if again else None
        self._writer: SummaryWriter = SummaryWriter(str(place), purge_step=purge)
        if start.first_round == 0:
            lines = [f"| {key} | {value} |" for key, value in start.settings.items()]
            self._add("experiment", "\n".join(["| option | value |", "| --- | --- |", *lines]))
            self._describe(start)
        self._writer.flush()
        return str(place)

    def write(self, round_: int, values: Metrics) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round_)
        self._writer.flush()

    def finish(self, final: Metrics | None) -> None:
        for name, value in (final or {}).items():
            self._writer.add_scalar(name, value, 0)
        self._writer.close()

    def _add(self, name: str, text: str) -> None:
        self._writer.add_text(name, text, 0)

    def _describe(self, start: Start) -> None:
        """Write the options for the tab HPARAMS, which compares runs by the headline."""
        from torch.utils.tensorboard.summary import hparams

        settings: dict[str, Any] = dict(start.settings)
        # `add_hparams` would make a run of its own beside this one; this keeps them together.
        for part in hparams(settings, {start.headline: 0.0}):
            self._writer._get_file_writer().add_summary(part)
