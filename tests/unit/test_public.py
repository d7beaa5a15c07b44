"""The public pool: taken out before the data are divided, or from other data; equal for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedkd.config import Component, Data, Experiment, experiment, load
from fedkd.data.dataset import Dataset
from fedkd.data.public import UNLABELLED, foreign_pool, take_public
from fedkd.data.sources import Digits
from fedkd.engine.client_app import ClientSide
from fedkd.engine.setup import load_data, prepare, resolve
from fedkd.errors import ConfigError, DataError
from fedkd.rng import Rng
from fedkd.strategies.base import strategies
from fedkd.strategies.bounds import LocalOnly
from fedkd.types import Task


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Digits(limit=200, test_limit=60).load()


@pytest.fixture
def needy(monkeypatch: pytest.MonkeyPatch) -> type[LocalOnly]:
    monkeypatch.setattr(LocalOnly, "needs_public", lambda self: True)
    return LocalOnly


@pytest.fixture
def letters(tmp_path):
    """Return a file of 30 unrelated images with the shape of digits, and one of wrong shape."""
    files = []
    for name, side in (("letters", 8), ("large", 9)):
        generator = np.random.Generator(np.random.Philox(key=side))
        x = generator.random((30, side, side), dtype=np.float32)
        y = np.arange(30) % 3
        np.savez(tmp_path / name, train_x=x, train_y=y, test_x=x[:3], test_y=y[:3])
        files.append(str(tmp_path / f"{name}.npz"))
    return files


def rows(x) -> list[bytes]:
    return sorted(np.ascontiguousarray(row).tobytes() for row in np.asarray(x))


def test_pool_and_rest_are_the_data_each_example_once(digits):
    rest, pool = take_public(digits, 50, Rng(0))
    assert (len(pool), len(rest.train_y)) == (50, 150)
    assert rows(np.concatenate([rest.train_x, pool.x.numpy()])) == rows(digits.train_x)
    assert rest.test_x is digits.test_x
    share = np.bincount(pool.y, minlength=10) - 50 * np.bincount(digits.train_y) / 200
    assert np.abs(share).max() <= 1
    assert pool.x.dtype == torch.float32 and pool.y.dtype == torch.int64
    assert pool.x.is_contiguous(memory_format=torch.channels_last)


def test_labels_and_owners_stay_with_their_examples(digits):
    owned = Dataset(
        "owned", digits.train_x, digits.train_y, digits.test_x, digits.test_y, 10,
        train_ids=np.arange(200),
    )  # fmt: skip
    rest, pool = take_public(owned, 50, Rng(0))
    assert rest.train_ids is not None
    assert np.array_equal(rest.train_x, digits.train_x[rest.train_ids])
    assert np.array_equal(rest.train_y, digits.train_y[rest.train_ids])
    taken = np.setdiff1d(np.arange(200), rest.train_ids)
    assert np.array_equal(pool.y, digits.train_y[taken])


def test_the_pool_is_addressed_and_nested(digits):
    small, again, other = (take_public(digits, 20, Rng(s))[1] for s in (0, 0, 1))
    large = take_public(digits, 60, Rng(0))[1]
    assert torch.equal(small.x, again.x)
    assert not torch.equal(small.x, other.x)
    assert set(rows(small.x)) <= set(rows(large.x))


def test_every_class_keeps_an_example_and_the_range_is_exact():
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    data = Dataset("rare", x, np.array([0] * 6 + [1, 1]), x, np.array([0] * 8), 3)
    with pytest.raises(DataError, match=r"size = 9: allowed .* are 1 to \d, so that") as error:
        take_public(data, 9, Rng(0))
    most = int(str(error.value).split(" are 1 to ")[1].split(",")[0])
    assert set(take_public(data, most, Rng(0))[0].train_y) == {0, 1}
    for size in (0, most + 1):
        with pytest.raises(DataError, match=f"1 to {most}"):
            take_public(data, size, Rng(0))


def test_a_foreign_pool_has_no_labels_and_must_fit(digits):
    pool = foreign_pool(digits, digits.task(), 30, Rng(0))
    assert len(pool) == 30 and set(pool.y.tolist()) == {UNLABELLED}
    colour = Task(name="colour", input_shape=(3, 32, 32), classes=10)
    with pytest.raises(DataError, match=r"\(1, 8, 8\).*\(3, 32, 32\); name a source"):
        foreign_pool(digits, colour, 30, Rng(0))
    with pytest.raises(DataError, match=r"size = 201: .* 1 to 200"):
        foreign_pool(digits, digits.task(), 201, Rng(0))


def test_all_strategies_of_one_seed_have_one_pool_and_clients_hold_none_of_it(tiny):
    first, second, other = (
        prepare(tiny(strategy, {"data.public.size": 40, "seed": seed}))
        for strategy, seed in (("fedavg", 0), ("ditto", 0), ("fedavg", 1))
    )
    pools = [p.setting.public for p in (first, second, other)]
    assert torch.equal(pools[0].x, pools[1].x) and torch.equal(pools[0].y, pools[1].y)
    assert not torch.equal(pools[0].x, pools[2].x)
    assert first.federation.dataset.fingerprint() == second.federation.dataset.fingerprint()
    whole = first.federation.pooled()
    held = rows(torch.cat([whole.train.x, whole.validation.x]))
    assert len(held) == 120
    assert len(rows(pools[0].x) + held) == 160 and not set(rows(pools[0].x)) & set(held)


def test_without_a_pool_nothing_changes(tiny):
    plain, zero = prepare(tiny("fedavg")), prepare(tiny("fedavg", {"data.public.size": 0}))
    assert plain.setting.public is None and zero.setting.public is None
    assert len(plain.federation.dataset.train_y) == 160


def test_a_client_is_given_the_pool(tiny):
    from flwr.app import Context, RecordDict

    prepared = prepare(tiny("fedavg", {"data.public.size": 40}))
    context = Context(1, 1, {"partition-id": 2}, RecordDict(), {})
    assert ClientSide(prepared).client(context, 1).public is prepared.setting.public


def test_a_strategy_that_needs_a_pool_is_refused_without(tiny, needy):
    with pytest.raises(ConfigError, match=r"'local-only' needs a public pool.*size = 500"):
        prepare(tiny("local-only", {"data.public.size": 0}))
    assert len(prepare(tiny("local-only")).setting.public) == 40
    assert not strategies.get("fedavg")().needs_public()


def test_other_data_as_the_pool(tiny, letters):
    good, wrong = ({"name": "npz", "path": path} for path in letters)
    prepared = prepare(tiny("fedavg", {"data.public.size": 12, "data.public.source": good}))
    assert prepared.setting.public.y.tolist() == [-1] * 12
    assert len(prepared.federation.dataset.train_y) == 160
    with pytest.raises(ConfigError, match=r"\(1, 9, 9\).*\(1, 8, 8\)"):
        prepare(tiny("fedavg", {"data.public.size": 12, "data.public.source": wrong}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.public.source": "digits"}, "size = 0; say how many"),
        ({"data.public.size": 9, "data.public.source": "digits"}, "what the clients train on"),
        ({"data.public.size": 9, "data.public.source": "digit"}, "did you mean 'digits'"),
        ({"data.public.size": 160}, "allowed with the 160"),
        ({"data.public.size": -1}, "data.public.size = -1"),
        ({"data.public.size": True}, "data.public.size = True"),
        ({"data.public.source": 3}, "data.public.source = 3: give a name"),
        ({"data.public.sise": 3}, "data.public.sise'; did you mean 'size'"),
    ],
)
def test_what_cannot_be_is_explained(tiny, changes, said):
    with pytest.raises(ConfigError, match=said):
        prepare(tiny("fedavg", changes))


def test_the_pool_reads_back_from_toml(tmp_path, letters):
    assert "source" not in Experiment().table()["data"]["public"]
    named = Component("npz", {"path": letters[0]})
    for public in ({"size": 7}, {"size": 7, "source": named.table()}):
        full = resolve(experiment({"data": {"public": public}}))
        (tmp_path / "config.toml").write_text(full.toml())
        assert resolve(load(tmp_path / "config.toml", ["name=run"])) == full
    assert full.data.public.source.options["limit"] == 0
    assert Data().public.source is None


def test_a_manifest_of_one_seed_serves_another_with_the_same_pool(tiny, tmp_path):
    from fedkd.data import manifest

    one = tiny("fedavg", {"data.public.size": 40, "seed": 3})
    federation, pool = load_data(one)
    manifest.save(federation.partition, federation.dataset, tmp_path / "partition.json")
    again, other = load_data(
        tiny("fedavg", {"data.public.size": 40, "data.manifest": str(tmp_path / "partition.json")})
    )
    assert torch.equal(pool.x, other.x)
    for mine, theirs in zip(federation.partition.train, again.partition.train, strict=True):
        assert np.array_equal(mine, theirs)
    with pytest.raises(DataError, match="made for other data"):
        load_data(tiny("fedavg", {"data.manifest": str(tmp_path / "partition.json")}))
