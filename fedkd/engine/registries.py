"""The registry of executors, apart from them so that a drop-in can import it without a cycle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkd.registry import Registry

if TYPE_CHECKING:
    from fedkd.engine.executors import Executor

executors: Registry[type[Executor]] = Registry("executor", "fedkd.engine.executors", "executors")
