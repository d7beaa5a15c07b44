from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedkd.engine.codec import encode
from fedkd.engine.flower_private import wire_bytes
from fedkd.engine.ledger import Ledger, tensor_bytes
from fedkd.errors import CheckpointError

MODEL = {"model/w": np.zeros((4, 5), np.float32), "model/n": np.array(3)}
SOFT = {"soft_labels/output": np.zeros((10, 3), np.float16)}

CONTENTS = {
    "empty": RecordDict(),
    "empty records": RecordDict({"a": ArrayRecord(), "m": MetricRecord(), "c": ConfigRecord()}),
    "arrays": RecordDict({"arrays": encode({**MODEL, **SOFT})}),
    "empty name": RecordDict({"": encode({"": np.zeros(0)})}),
    "unicode": RecordDict({"é" * 70: encode({"ü/😀": np.zeros(3)})}),
    "large": RecordDict({"arrays": encode({"model/w": np.zeros(70_000)})}),
    "no data": RecordDict({"arrays": ArrayRecord({"x": Array("float32", (0,), "other", b"")})}),
    "mixed": RecordDict(
        {
            "config": ConfigRecord({"lr": 0.1, "on": True, "names": ["a", "b"], "raw": b"12"}),
            "arrays": encode(MODEL),
            "metrics": MetricRecord({"num-examples": 12, "loss": [0.5, 1.5]}),
            "none": ConfigRecord({"list": []}),
        }
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_wire_bytes_are_the_serialised_size(name: str) -> None:
    content = CONTENTS[name]
    assert wire_bytes(content) == len(recorddict_to_proto(content).SerializeToString())


def test_counts_are_kept_apart_by_round_phase_direction_and_kind() -> None:
    ledger = Ledger()
    for _ in range(3):
        ledger.add(1, "train", "down", RecordDict({"arrays": encode(MODEL)}))
    ledger.add(1, "train", "up", RecordDict({"arrays": encode(SOFT)}))
    ledger.add(2, "query.logits", "up", RecordDict({"metrics": MetricRecord({"x": 1.0})}))

    down = ledger.totals(direction="down")
    assert (down.messages, down.tensors) == (3, {"model": 3 * (80 + 8)})
    assert down.wire == 3 * wire_bytes(RecordDict({"arrays": encode(MODEL)}))
    assert ledger.totals(round=1, phase="train", direction="up").tensors == {"soft_labels": 60}
    assert ledger.totals(phase="query.logits").tensor == 0
    assert ledger.totals(phase="query.logits").wire > 0
    assert ledger.totals().messages == 5
    assert list(ledger.by_round()) == [1, 2]
    assert ledger.by_round()[1]["up"].tensor == 60


def test_state_survives_json() -> None:
    ledger, again = Ledger(), Ledger()
    ledger.add(2, "train", "up", RecordDict({"arrays": encode(MODEL)}))
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert again.state_dict() == ledger.state_dict()
    again.add(2, "train", "up", RecordDict({"arrays": encode(MODEL)}))
    assert again.totals().tensor == 2 * ledger.totals().tensor
    with pytest.raises(CheckpointError, match="ledger"):
        again.load_state_dict([{"round": 1}])


def test_an_unknown_dtype_counts_its_stored_bytes() -> None:
    assert tensor_bytes("bfloat16", (2,), 4) == 4
    ledger = Ledger()
    strange = ArrayRecord({"model/w": Array("bfloat16", (2,), "torch.tensor", b"1234")})
    ledger.add(1, "train", "up", RecordDict({"arrays": strange}))
    assert ledger.totals().tensors == {"model": 4}
