"""The registries of contenders and of operations; their modules are imported when first asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkd.registry import Registry

if TYPE_CHECKING:
    from fedkd.bench.backends.base import Backend
    from fedkd.bench.operations.base import Operations

backends: Registry[type[Backend]] = Registry("backend", "fedkd.bench.backends")
operations: Registry[type[Operations]] = Registry("operation", "fedkd.bench.operations")
