"""The registries of data sources and partitions, apart from them so that each can import them.

A source is an options class with ``load`` and ``missing``; a partition is an options class with
``split``. A drop-in file needs nothing else than one of these and the decorator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkd.registry import Registry

if TYPE_CHECKING:
    from fedkd.data.dataset import Source
    from fedkd.data.partition import Scheme

sources: Registry[type[Source]] = Registry("data source", "fedkd.data", "sources")
partitions: Registry[type[Scheme]] = Registry("partition", "fedkd.data", "partitions")
