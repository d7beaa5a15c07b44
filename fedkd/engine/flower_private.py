"""Every private name of Flower that fedkd touches: a new release can break this file only.

Checked on flwr 1.38 (the lowest allowed), 1.41 and 1.42 (the highest).

==================================================  =======  =====================================
private name                                        since    what breaks without it
==================================================  =======  =====================================
``flwr.supercore.task_identity.TaskIdentity``       1.38     ``Message(...)`` raises RuntimeError
 its ``_run_id``, ``_node_id``, ``_task_id``        1.38     (read to put back what was there)
``Metadata.__dict__``: ``_message_id``,             < 1.38   a message without an id cannot be
 ``_run_id``, ``_src_node_id``                               answered; Flower's grids set it so
``flwr.supercore.run.Run.create_empty``             <= 1.38  apps that read ``grid.run``
``flwr.common.serde.array_to_proto``,               < 1.38   the count of wire bytes
 ``recorddict_to_proto``
values of ``flwr.common.constant.ErrorCode``        < 1.38   strategies that look at error codes
==================================================  =======  =====================================

Flower's usage reports: nothing that a ServerApp or a ClientApp runs through in this process sends
any (only Flower's own commands and ``start_server`` do), so the environment is left alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import array_to_proto, recorddict_to_proto
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedkd.errors import RunError

SUPERLINK_NODE_ID = 1
CLIENT_APP_RAISED = 2
NODE_UNAVAILABLE = 5

# Flower's identity of a task belongs to the whole process, so its guard has to as well.
_identity_in_use = threading.Lock()


@contextmanager
def task_identity(run_id: int) -> Iterator[None]:
    """Let this process create Flower messages as the server of run ``run_id``.

    Raises:
        RunError: another simulation is running in this process; the two would share one identity.
    """
    if not _identity_in_use.acquire(blocking=False):
        raise RunError(
            "another simulation is running in this process, and Flower knows one task for each "
            "process: run them one after the other, or each in a process of its own"
        )
    names = ("_run_id", "_node_id", "_task_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    try:
        TaskIdentity.run_id, TaskIdentity.node_id = run_id, SUPERLINK_NODE_ID
        TaskIdentity.task_id = 1
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
        _identity_in_use.release()


@contextmanager
def quiet_flower(verbose: bool = False) -> Iterator[None]:
    """Let Flower's logger speak from WARNING on only, unless ``verbose``; put back at the end."""
    logger = logging.getLogger("flwr")
    before = logger.level
    try:
        if not verbose:
            logger.setLevel(max(before, logging.WARNING))
        yield
    finally:
        logger.setLevel(before)


def stamp(message: Message, message_id: str, run_id: int, src_node_id: int) -> None:
    """Give a message the identity that Flower's SuperLink would give it."""
    message.metadata.__dict__.update(
        _message_id=message_id, _run_id=run_id, _src_node_id=src_node_id
    )


def empty_run(run_id: int) -> Any:
    """Return Flower's description of a run that came from no app bundle."""
    return Run.create_empty(run_id)


def wire_bytes(content: RecordDict) -> int:
    """Return the protobuf size of a message's content without serialising any array.

    Equal to ``len(recorddict_to_proto(content).SerializeToString())``, but in microseconds
    whatever the size of the arrays: a length-delimited field of n bytes takes one tag byte
    (all field numbers are below 16), the varint of n, and n bytes.
    """
    others = RecordDict()
    total = 0
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            total += _field(_named(name, _array_record_bytes(record)))
        else:
            others[name] = record
    return total + int(recorddict_to_proto(others).ByteSize())


def _array_record_bytes(record: ArrayRecord) -> int:
    sizes = ((k, _array_bytes(a.dtype, a.shape, a.stype, len(a.data))) for k, a in record.items())
    return sum(_field(_named(key, size)) for key, size in sizes)


@lru_cache(maxsize=4096)
def _array_bytes(dtype: str, shape: tuple[int, ...], stype: str, data: int) -> int:
    header = array_to_proto(Array(dtype, shape, stype, b"")).ByteSize()
    return int(header) + (_field(data) if data else 0)


def _named(name: str, size: int) -> int:
    key = len(name.encode())
    return (_field(key) if key else 0) + _field(size)


def _field(size: int) -> int:
    return 1 + max(1, (size.bit_length() + 6) // 7) + size
