"""The registry of models, apart from the models so that each of them can import it.

A model is an options class with ``build(task)``, which returns the structure of a network; its
numbers come from :func:`fedkd.models.base.build`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkd.registry import Registry

if TYPE_CHECKING:
    from fedkd.models.base import Model

models: Registry[type[Model]] = Registry("model", "fedkd.models", "models")
