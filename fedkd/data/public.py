"""The public pool: examples that the server and all clients hold, for methods that exchange scores.

Taken out of the federation's own training examples it costs private data, which every method of a
comparison then lacks alike; taken from another data set it costs nothing, and has no labels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedkd.data.dataset import Dataset, stratified_order
from fedkd.data.federated import UNLABELLED, Split, as_split
from fedkd.errors import DataError
from fedkd.rng import Rng
from fedkd.types import Task


def take_public(dataset: Dataset, size: int, rng: Rng) -> tuple[Dataset, Split]:
    """Take ``size`` training examples out of a data set: ``(what is left, the pool)``.

    The classes come in proportion, ``size n_c / n`` of class c up to one, and every class keeps an
    example. A smaller pool of the same ``rng`` is contained in a larger one. The pool keeps its
    true labels; the test examples stay as they are.

    Raises:
        DataError: the pool would be empty, or leave a class without any training example.
    """
    labels = dataset.train_y
    order = stratified_order(labels, rng)
    # A class is used up by the last of its examples in this order.
    ends = np.zeros(dataset.classes, dtype=np.int64)
    np.maximum.at(ends, labels[order], np.arange(len(order)))
    most = int(ends[np.unique(labels)].min())
    if not 1 <= size <= most:
        raise DataError(
            f"data.public.size = {size}: allowed with the {len(labels)} training examples of "
            f"{dataset.name} are 1 to {most}, so that every class keeps an example; choose one of "
            f"these, or take the pool from another data.public.source"
        )
    chosen, left = np.sort(order[:size]), np.sort(order[size:])
    ids = dataset.train_ids
    rest = replace(
        dataset,
        train_x=dataset.train_x[left],
        train_y=labels[left],
        train_ids=None if ids is None else ids[left],
    )
    return rest, as_split(dataset.train_x[chosen], labels[chosen], dataset.task())


def foreign_pool(dataset: Dataset, task: Task, size: int, rng: Rng) -> Split:
    """Return ``size`` training examples of another data set, classes in proportion, unlabelled.

    Their labels are -1: its classes need not be the task's.

    Raises:
        DataError: one example has another shape than an input of the task, or there are too few.
    """
    shape = dataset.task().input_shape
    if task.sequence and dataset.class_names != task.class_names:
        raise DataError(
            f"data.public.source {dataset.name!r} has {dataset.classes} tokens, which are not the "
            f"{task.classes} tokens of {task.name!r}; give both sources the same tokenizer"
        )
    if shape != task.input_shape:
        raise DataError(
            f"data.public.source {dataset.name!r} has examples of shape {shape}, but an input of "
            f"{task.name!r} has the shape {task.input_shape}; name a source with inputs of shape "
            f"{task.input_shape}, or leave data.public.source out"
        )
    if not 1 <= size <= len(dataset.train_y):
        raise DataError(
            f"data.public.size = {size}: allowed with {dataset.name!r} are 1 to "
            f"{len(dataset.train_y)}, the number of its training examples"
        )
    chosen = np.sort(stratified_order(dataset.train_y, rng)[:size])
    labels = np.full(size, UNLABELLED, dtype=np.int64)
    return as_split(dataset.train_x[chosen], labels, task)
