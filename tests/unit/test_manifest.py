import json

import numpy as np
import pytest

from fedkd.data.manifest import load, save
from fedkd.data.partition import divide
from fedkd.data.registries import partitions, sources
from fedkd.errors import DataError
from fedkd.rng import Rng


@pytest.fixture(scope="module")
def digits():
    return sources.get("digits")().load()


@pytest.fixture
def written(digits, tmp_path):
    scheme = partitions.get("rotation")(max_degrees=20)
    partition = divide(digits, scheme, 4, Rng(5), "rotation")
    path = tmp_path / "splits" / "partition.json"
    save(partition, digits, path)
    return partition, path


def change(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def test_round_trip(written, digits):
    partition, path = written
    again = load(path, digits)
    for name in ("train", "test"):
        pairs = zip(getattr(partition, name), getattr(again, name), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert again.degrees == partition.degrees
    assert (again.name, again.seed) == ("rotation", 5)
    assert dict(again.options) == {"max_degrees": 20.0}
    assert [f.name for f in path.parent.iterdir()] == ["partition.json"]


def test_other_data_are_refused(written):
    other = sources.get("digits")(limit=500).load()
    with pytest.raises(DataError, match=r"made for other data.*train 1437.*this is.*train 500"):
        load(written[1], other)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schema": 99}, "schema 99; this version reads 1"),
        ({"train": [[0, 1], [1], [2], [3]]}, "example 1 is given 2 times"),
        ({"train": [[0], [10**6], [2], [3]]}, "index 1000000 does not exist"),
        ({"train": [[0], [-1], [2], [3]]}, "index -1 does not exist"),
        ({"train": [[0], [1], [2], [3]]}, "belong to no client"),
        ({"train": [["a"], [1], [2], [3]]}, "damaged"),
        ({"train": [[0.5], [1], [2], [3]]}, "damaged"),
        ({"train": 3}, "damaged"),
        ({"clients": 5}, "says 5 clients and lists 4"),
        ({"degrees": [0.0]}, "have to agree"),
        ({"degrees": ["x"] * 4}, "damaged"),
        ({"options": []}, "options is no object"),
    ],
)
def test_damage_is_named(written, digits, values, words):
    change(written[1], **values)
    with pytest.raises(DataError, match=words) as caught:
        load(written[1], digits)
    assert str(written[1]) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot read"), ("[]", "no JSON object"), ("{}", "schema, dataset")]
)
def test_other_files_are_refused(tmp_path, digits, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        load(path, digits)
    with pytest.raises(DataError, match="cannot read"):
        load(tmp_path / "none.json", digits)
