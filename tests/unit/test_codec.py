from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkd.engine.codec import Encoded, decode, encode
from fedkd.errors import ConfigError

DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int64", "bool", "complex64", ">f4"]
CASES = {
    "0-d": np.array(1.5, np.float32),
    "empty": np.zeros((0, 3), np.int64),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "strided": np.arange(10)[::3],
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
    "special": np.array([np.nan, np.inf, -0.0, 5e-324]),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name: str) -> None:
    array = CASES[name]
    back = decode(encode({"x": array}))["x"]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert back.strides == Array(array).numpy().strides


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0))))
def test_bytes_are_those_of_flower_and_numpy(array: np.ndarray) -> None:
    ours, flowers = encode({"x": array})["x"], Array(array)
    assert (ours.dtype, ours.shape, ours.stype) == (flowers.dtype, flowers.shape, flowers.stype)
    assert ours.data == flowers.data
    assert decode(ArrayRecord({"x": flowers}))["x"].tobytes() == array.tobytes()
    assert ours.numpy().tobytes() == array.tobytes()


def test_order_of_keys_is_kept() -> None:
    keys = ["z/1", "a/2", "m"]
    record = encode({key: np.zeros(1) for key in keys})
    assert list(record) == keys
    assert list(decode(record)) == keys


def test_decoded_arrays_are_read_only() -> None:
    back = decode(encode({"x": np.ones(3)}))["x"]
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 2


def test_cache_encodes_one_array_once_and_decodes_the_same_bytes_once() -> None:
    shared, own = np.arange(4.0), np.arange(4.0)
    sending = Encoded()
    first = encode({"x": shared}, sending)
    second = encode({"y": shared, "z": own}, sending)
    assert first["x"] is second["y"]
    assert first["x"] is not second["z"]

    receiving: dict = {}
    copies = [Array(a.dtype, a.shape, a.stype, a.data) for a in (first["x"], first["x"])]
    views = [decode(ArrayRecord({"x": copy}), receiving)["x"] for copy in copies]
    assert views[0] is views[1]
    assert decode(encode({"x": shared}), receiving)["x"] is not views[0]


def test_cache_outlives_its_arrays_without_mixing_them_up() -> None:
    cache = Encoded()
    records = [encode({"x": np.full(100, float(i))}, cache) for i in range(50)]
    for i, record in enumerate(records):
        assert decode(record)["x"][0] == i


@pytest.mark.parametrize("value", [1.0, [1, 2], np.array([object()])])
def test_what_is_no_numeric_array_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError, match="'head/w'"):
        encode({"head/w": value})  # type: ignore[dict-item]


def test_another_serialisation_is_refused() -> None:
    with pytest.raises(TypeError, match="torch"):
        decode(ArrayRecord({"x": Array("float32", (1,), "torch", b"1234")}))
