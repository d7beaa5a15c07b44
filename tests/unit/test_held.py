"""Arrays that travel without bytes are snapshots, and Flower's to everybody who looks at them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkd.engine import held
from fedkd.engine.codec import Encoded, decode, encode
from fedkd.engine.flower_private import wire_bytes
from fedkd.engine.grid import copied
from fedkd.engine.held import HeldArray, shared, stored_bytes
from fedkd.engine.ledger import Ledger

DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int64", "bool", "complex64", ">f4"]


def sent(array, **options):
    return encode({"x": array}, **options)["x"]


def fortran():
    return np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.fixture
def written(monkeypatch):
    """Return the list of arrays that were made into bytes."""
    made = []
    real = held.to_npy
    monkeypatch.setattr(held, "to_npy", lambda array: made.append(array) or real(array))
    return made


def test_an_array_given_away_crosses_the_grid_without_a_byte_being_made(written):
    arrays = {"model/w": np.ones((3, 4), np.float32), "model/b": np.zeros(4, np.float32)}
    content = RecordDict({"arrays": encode(arrays, own=True)})
    ledger = Ledger()
    ledger.add(1, "train", "up", content)
    copies = copy.deepcopy([copy.copy(a) for a in content["arrays"].values()])
    assert decode(content["arrays"])["model/w"] is copies[0].held
    assert copies[0].held.base is arrays["model/w"], "the very memory"
    assert written == []
    assert ledger.totals().wire == len(recorddict_to_proto(content).SerializeToString())
    assert len(written) == 2


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0))),
    st.booleans(),
)
def test_bytes_and_their_number_are_those_of_flower(array, own):
    flowers = Array(array)
    ours = sent(array.copy(), own=own)
    assert stored_bytes(ours) == len(flowers.data)
    assert ours.data == flowers.data
    assert ours == flowers and flowers == ours
    assert ours.object_id == flowers.object_id
    assert ours.children.keys() == flowers.children.keys()
    assert ours.held.strides == flowers.numpy().strides


@pytest.mark.parametrize("own", [False, True])
def test_what_was_sent_cannot_be_changed_by_a_view_of_its_sender(own):
    memory = np.zeros(8)
    frozen = memory[2:5]
    frozen.flags.writeable = False
    tensor = torch.zeros(3)
    stack = np.zeros((2, 3))
    views = {"v": memory[2:5], "f": frozen, "t": tensor.numpy(), "s": stack[1], "r": stack.T}
    record = encode(views, own=own)
    memory += 1
    tensor += 1
    stack += 1
    assert all(not array.any() for array in decode(record).values())
    assert sent(memory, own=False).held.base is not memory


def test_without_being_given_away_an_array_stays_its_senders():
    mine = np.zeros(3)
    there = decode(encode({"x": mine}))["x"]
    mine += 1
    assert there.tolist() == [0, 0, 0]


def test_an_array_given_away_is_read_only_from_then_on():
    mine = np.zeros(3)
    there = decode(encode({"x": mine}, own=True))["x"]
    with pytest.raises(ValueError, match="read-only"):
        mine += 1
    for array in (there, there[:2]):
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def test_what_nobody_can_write_to_is_shared_and_sent_on_as_it_is():
    received = decode(encode({"x": np.arange(4.0)}))["x"]
    again = decode(encode({"x": received}))["x"]
    kept = decode(encode({"x": np.arange(4.0)}, own=True))["x"]
    assert np.shares_memory(again, received)
    assert np.shares_memory(decode(encode({"x": kept}, own=True))["x"], kept)


def test_flowers_reader_gets_a_copy_of_its_own():
    ours = sent(np.arange(3.0))
    theirs = ours.numpy()
    theirs += 1
    assert ours.numpy().tolist() == [0, 1, 2]
    weights = ArrayRecord({"w": ours}).to_torch_state_dict()
    weights["w"] += 1
    assert ours.held.tolist() == [0, 1, 2]


def test_setting_a_field_changes_this_array_alone_and_makes_it_flowers():
    ours = sent(np.arange(3.0), own=True)
    other = copy.copy(ours)
    before = other.object_id
    new = Array(np.zeros(2))
    ours.data, ours.shape = new.data, new.shape
    assert ours.held is None
    assert ours.numpy().tolist() == [0, 0]
    assert ours == new and stored_bytes(ours) == len(new.data)
    assert (other.held.tolist(), other.object_id) == ([0, 1, 2], before)
    assert decode(ArrayRecord({"x": new}))["x"].tolist() == [0, 0]
    assert pickle.loads(pickle.dumps(ours)) == new


def test_records_survive_protobuf_and_equality():
    content = RecordDict({"a": encode({"w": np.arange(3.0), "f": fortran()}, own=True)})
    again = recorddict_from_proto(recorddict_to_proto(content))
    assert again == content and content == again
    assert again["a"].object_id == content["a"].object_id
    assert content["a"]["w"] != content["a"]["f"]
    assert content["a"]["w"] != 3


@pytest.mark.parametrize("protocol", [2, 5])
def test_it_pickles_as_its_array(protocol):
    ours = sent(fortran(), own=True)
    buffers: list = []
    out = {"buffer_callback": buffers.append} if protocol == 5 else {}
    data = pickle.dumps([ours, copy.copy(ours)], protocol=protocol, **out)
    first, second = pickle.loads(data, buffers=buffers)
    assert type(first) is HeldArray and first == ours
    assert first.held.strides == ours.held.strides
    assert np.shares_memory(first.held, second.held)
    assert not first.held.flags.writeable


def test_a_flower_array_is_shared_without_a_copy():
    flowers = Array(fortran())
    ours = shared(flowers)
    assert ours == flowers and ours.data is flowers.data
    assert ours.numpy().strides == flowers.numpy().strides
    ours.data = b""
    assert flowers.data
    strange = Array("float32", (1,), "torch", b"1234")
    assert type(shared(strange)) is Array and shared(strange) == strange
    assert shared(sent(np.ones(2))).held.tolist() == [1, 1]


def test_wire_bytes_do_not_depend_on_who_made_the_array():
    arrays = {"model/w": np.zeros((30, 5), np.float32), "model/n": np.array(3), "f": fortran()}
    flowers = RecordDict({"a": ArrayRecord({k: Array(v) for k, v in arrays.items()})})
    assert wire_bytes(RecordDict({"a": encode(arrays)})) == wire_bytes(flowers)


def test_what_is_encoded_for_one_client_alone_is_not_kept():
    encoded, everybodys = Encoded(), np.zeros(5)
    made = []
    for k in range(20):
        own = np.full(5, float(k))
        record = encode({"shared": everybodys, "own": own}, encoded)
        assert decode(record)["own"][0] == k
        made.append(weakref.ref(record["own"].held))
        del own, record
    gc.collect()
    assert [ref for ref in made if ref() is not None] == []
    assert len(encoded._made) == 1
    assert encoded.get(everybodys) is encode({"x": everybodys}, encoded)["x"]


def npy(descr, shape, values, pad=0):
    """Return the bytes of another writer of the format, who fills its header up differently."""
    fields = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    head = fields.encode() + b" " * pad + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + values


FOREIGN = {
    "legacy Parameters": Array("", (), "numpy.ndarray", Array(np.zeros((3, 4))).data),
    "another shape": Array("float64", (12,), "numpy.ndarray", Array(np.zeros((3, 4))).data),
    "another header": Array("float32", (2,), "numpy.ndarray", npy("<f4", (2,), bytes(8), 3)),
    "bytes behind": Array("float32", (2,), "numpy.ndarray", Array(np.zeros(2, "f4")).data + b"x"),
    "truncated": Array("float32", (2,), "numpy.ndarray", Array(np.zeros(2, "f4")).data[:-3]),
    "only a header": Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY\x01\x00"),
    "no header": Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY\x01\x00\x05\x00(((("),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_wrote_crosses_the_grid_unchanged(name):
    array = FOREIGN[name]
    content = RecordDict({"a": ArrayRecord({"x": array})})
    crossed = copied(content)
    got = crossed["a"]["x"]
    assert type(got) is Array and got is not array
    assert (got.dtype, got.shape, got.data) == (array.dtype, array.shape, array.data)
    assert wire_bytes(crossed) == recorddict_to_proto(content).ByteSize()


def test_known_bytes_are_counted_as_they_are():
    data = npy("<f4", (2,), bytes(8), 3)
    assert stored_bytes(HeldArray(held.from_npy(data), data)) == len(data)
