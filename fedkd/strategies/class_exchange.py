"""Exchange of class knowledge: means by class go up, are remembered and fused, and come back.

What federated distillation, FedProto and FedHKD share. A class that a client does not hold is not
in its table, so it can dilute nothing; all memory of the server is in its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkd.clients.client import Client
from fedkd.distill.fusion import ClassTable, class_means, fuse_classes
from fedkd.distill.targets import ClassTargets
from fedkd.types import Arrays, Upload, prefixed, select

PROBS = frozenset({"probs"})
"""Fields of a table that are probabilities."""
BUFFER = "buffer"
"""Server-side memory, ``buffer/<client>/<field>``: what each client said last; it never travels."""


def summarise(
    client: Client, values: Mapping[str, Tensor], counted: bool, point: str = ""
) -> Arrays:
    """Return the mean of each of ``values`` (n, d) by class: what a client says.

    ``labels`` (P,) int32, the classes that the client's training examples hold; each value under
    its own name, (P, d) float32; ``counts`` (P,) int32 only where ``counted``, since numbers of
    examples need not leave a client otherwise. Nothing for a client without examples. Under
    example-level privacy noised sums by noised counts, for every client alike; ``point`` then tells
    apart what is released of several places in the network.
    """
    arrays: Arrays = {}
    y = client.data.train.y
    if client.release is not None:
        return client.release.means(values, y, simplex=PROBS, counted=counted, point=point)
    if len(y) == 0:
        return arrays
    labels = y.cpu().numpy()
    for name, value in values.items():
        present, means, counts = class_means(value.cpu().numpy(), labels)
        arrays |= {"labels": present, name: means}
        if counted:
            arrays["counts"] = counts
    return arrays


def remember(state: Arrays, uploads: Sequence[Upload], kind: str) -> Arrays:
    """Return the state with what was said below ``kind/`` in place of what was said before.

    One table a client, whatever the number of rounds; a client that said nothing keeps its last.
    """
    for upload in uploads:
        said = select(upload.arrays, kind)
        if said:
            own = f"{BUFFER}/{upload.client.id}"
            state = {k: v for k, v in state.items() if not k.startswith(f"{own}/")}
            state |= prefixed(own, said)
    return state


def tables(state: Arrays, field: str) -> dict[int, ClassTable]:
    """Return what each client said last under ``field``, in ascending order of clients."""
    said = select(state, BUFFER)
    found = {}
    for k in sorted({int(key.split("/")[0]) for key in said}):
        labels = said[f"{k}/labels"]
        uniform = np.ones(len(labels), dtype=np.int32)
        found[k] = ClassTable(labels, said[f"{k}/{field}"], said.get(f"{k}/counts", uniform))
    return found


def lesson(
    said: Mapping[int, ClassTable],
    field: str,
    classes: int,
    weighting: str,
    leave_out: int | None = None,
) -> Arrays:
    """Return the fused table as arrays: ``labels`` (P,) and ``field`` (P, d); {} if there is none.

    Rows are those of the classes that somebody holds (somebody else, with ``leave_out``), whether
    or not the receiver holds them. See :func:`~fedkd.distill.fusion.fuse_classes` for the weights.
    """
    rows, mask = fuse_classes(said, classes, leave_out=leave_out, weighting=weighting)
    known = np.flatnonzero(mask).astype(np.int32)
    return {"labels": known, field: rows[known]} if len(known) else {}


def targets(
    taught: Arrays, field: str, classes: int, device: torch.device | str = "cpu"
) -> ClassTargets:
    """Return a lesson as targets by label: rows (C, d), and a mask (C,) of the classes taught."""
    rows = torch.from_numpy(taught[field].copy()).to(device)
    labels = torch.from_numpy(taught["labels"].astype(np.int64)).to(device)
    table = rows.new_zeros(classes, rows.shape[1])
    mask = torch.zeros(classes, dtype=torch.bool, device=device)
    table[labels], mask[labels] = rows, True
    return ClassTargets(table, mask)
