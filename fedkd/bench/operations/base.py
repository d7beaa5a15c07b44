"""What a bench asks of work inside one process, such as a step with and without privacy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar


class Operations(ABC):
    """Some operations of one kind, each timed beside ``reference`` in the same process.

    Where they are not ``timed``, what counts are the ``values`` by name that :meth:`facts` has.
    """

    title: ClassVar[str]
    unit: ClassVar[str] = "step"
    reference: ClassVar[str]
    timed: ClassVar[bool] = True

    @abstractmethod
    def start(self, source: str, seed: int) -> None:
        """Get ready, and check that all of them give the right result.

        Args:
            source: where images come from.
            seed: of everything that is drawn.

        Raises:
            DataError: there are no such data here.
            RunError: one of them does other work.
        """

    @abstractmethod
    def steps(self) -> dict[str, Callable[[], None]]:
        """Return what is timed, by name."""

    def facts(self) -> dict[str, Any]:
        """Return what else there is to say: differences of results, bytes."""
        return {}

    def close(self) -> None:  # noqa: B027 there may be nothing to end
        """End all that was started."""
