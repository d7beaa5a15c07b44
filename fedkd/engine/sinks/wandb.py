"""Weights & Biases: offline files in the run folder, or online where the user has logged in.

Nothing leaves the machine unless ``WANDB_MODE`` is set or ``wandb login`` was done; what was
written offline is sent by ``wandb sync`` whenever the user wants.
"""

from __future__ import annotations

import netrc
import os
import uuid
from typing import TYPE_CHECKING, ClassVar, final
from urllib.parse import urlsplit

from fedkd.engine.sinks.base import Sink, Start, sinks
from fedkd.types import Metrics

if TYPE_CHECKING:
    import wandb

PROJECT = "fedkd"
PATIENCE = 30.0
"""Seconds that a server may take to answer at the start."""


@sinks.register("wandb")
@final
class WandB(Sink):
    """Runs of W&B, offline in sinks/wandb of the run folder unless the user has logged in."""

    extra: ClassVar[str] = "wandb"

    @classmethod
    def modules(cls) -> tuple[str, ...]:
        return ("wandb",)

    def start(self, start: Start) -> str:
        import wandb

        place = start.folder / "sinks"
        place.mkdir(parents=True, exist_ok=True)
        known = start.memory.setdefault("id", uuid.uuid4().hex[:16])
        self._run: wandb.Run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=start.name,
            name=start.title,
            id=known,
            resume="allow",
            dir=str(place),
            config={**start.settings, "digest": start.digest},
            mode=None if _wanted() else "offline",
            # Nobody is asked anything, and the progress bar stays ours.
            settings=wandb.Settings(silent=True, console="off", init_timeout=PATIENCE),
        )
        # Rounds that come again after a resume have the same place on this axis.
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")
        return self._run.url or f"{place / 'wandb'} (offline; wandb sync sends them)"

    def write(self, round_: int, values: Metrics) -> None:
        self._run.log({**values, "round": round_})

    def finish(self, final: Metrics | None) -> None:
        self._run.summary.update(final or {})
        self._run.finish(exit_code=1 if final is None else 0)


def _wanted() -> bool:
    """Return whether the user has said where values go: by ``WANDB_MODE``, or by logging in."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        # What `wandb login` writes; only whether there is an entry is looked at.
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
