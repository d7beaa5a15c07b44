"""Secret examples of classification: random pixels, or real examples under a wrong label.

Either can be learned only by heart, and each has any number of others of the same distribution
to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedkd.data.dataset import Dataset, stratified_order
from fedkd.errors import DataError
from fedkd.privacy.canaries.options import Canaries
from fedkd.privacy.canaries.secrets import check_kind, secrets_wanted
from fedkd.rng import Rng


@dataclass(frozen=True, eq=False)
class Reserve:
    """Examples taken out of the training data, ``x (n, ...)`` and true labels ``y (n,)``.

    They stand in the order in which secrets are numbered.
    """

    x: np.ndarray
    y: np.ndarray


def reserve(options: Canaries, dataset: Dataset, rng: Rng) -> tuple[Dataset, Reserve | None]:
    """Take the images of mislabelled canaries out of the training examples: ``(rest, taken)``.

    The classes come in proportion, every class keeps an example, and fewer of the same ``rng``
    are the first of more. Other kinds need none: ``(dataset, None)``.

    Raises:
        DataError: the data set holds texts, or too few training examples.
    """
    if options.kind == "none":
        return dataset, None
    check_kind(options, dataset)
    if options.kind != "mislabelled":
        return dataset, None
    labels = dataset.train_y
    order = stratified_order(labels, rng.child("reserve"))
    # A class is used up by the last of its examples in this order.
    ends = np.zeros(dataset.classes, dtype=np.int64)
    np.maximum.at(ends, labels[order], np.arange(len(order)))
    most = int(ends[np.unique(labels)].min())
    canaries, wanted = secrets_wanted(options)
    if wanted > most:
        left = most - canaries
        fewer = f"lower canaries.references to at most {left}, or " if left >= 1 else "lower "
        raise DataError(
            f"canaries: {canaries} canaries and {options.references} references are {wanted} "
            f"examples, but of the {len(labels)} training examples of {dataset.name} at most "
            f"{most} can be taken, so that every class keeps one; {fewer}canaries.count, or "
            'choose kind = "random-image"'
        )
    taken, left_in = order[:wanted], np.sort(order[wanted:])
    ids = dataset.train_ids
    rest = replace(
        dataset,
        train_x=dataset.train_x[left_in],
        train_y=labels[left_in],
        train_ids=None if ids is None else ids[left_in],
    )
    return rest, Reserve(dataset.train_x[taken], labels[taken])


def random_images(dataset: Dataset, wanted: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Draw inputs uniform over the data set's bounds, float32 ``(n, ...)``, and uniform labels.

    Fewer of the same ``rng`` are the first of more. Also for tabular inputs ``(n, features)``.

    Raises:
        DataError: all values of the data set are equal, so that all inputs would be.
    """
    task = dataset.task()
    low, high = (np.float32(bound) for bound in task.bounds)
    if not low < high:
        raise DataError(
            f'canaries.kind = "random-image": all values of {dataset.name} are {low}, so random '
            "images would not differ; check the source"
        )
    generator = rng.child("pixels").numpy()
    x = generator.random((wanted, *task.input_shape), dtype=np.float32)
    # In place, since references may be many; rounding may lead beyond the bounds.
    np.clip(np.add(np.multiply(x, high - low, out=x), low, out=x), low, high, out=x)
    return x, rng.child("labels").numpy().integers(task.classes, size=wanted)


def mislabelled(taken: Reserve, classes: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples of a reserve with labels uniform among their wrong classes.

    Raises:
        DataError: there is no wrong class.
    """
    if classes < 2:
        raise DataError(
            'canaries.kind = "mislabelled": the data have 1 class, and none is wrong; choose '
            'kind = "random-image", or data of at least 2 classes'
        )
    turned = 1 + rng.child("labels").numpy().integers(classes - 1, size=len(taken.y))
    return taken.x, (taken.y + turned) % classes
