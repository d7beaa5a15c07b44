"""Uploads in ascending order of clients, in whatever order the replies come.

Floating-point sums depend on their order. Where replies come in that order, as in this process,
each upload is handed on at once and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedkd.types import Upload


class Intake:
    """Hands each upload of a cohort to ``take``; what came too early waits for its turn."""

    def __init__(self, cohort: Sequence[int], take: Callable[[Upload], None]) -> None:
        self.taken = 0
        self._take = take
        self._turns = sorted(cohort, reverse=True)
        self._waiting: dict[int, Upload | None] = {}

    def answered(self, client: int, upload: Upload | None) -> None:
        """Note a client's answer; None: it failed, or its upload was lost."""
        self._waiting[client] = upload
        while self._turns and self._turns[-1] in self._waiting:
            self._hand_on(self._turns.pop())

    def close(self) -> None:
        """Hand on what still waits: it waits for clients that never answered."""
        for client in sorted(self._waiting):
            self._hand_on(client)

    def _hand_on(self, client: int) -> None:
        upload = self._waiting.pop(client)
        if upload is not None:
            self.taken += 1
            self._take(upload)
