import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data.dataset import Dataset, stratified_order
from fedkd.data.images import normalise
from fedkd.data.registries import sources
from fedkd.errors import ConfigError, DataError
from fedkd.options import build
from fedkd.rng import Rng


@pytest.fixture(scope="module")
def digits():
    return sources.get("digits")().load()


def arrays(**changes):
    rng = Rng(0).numpy()
    made = {
        "train_x": rng.random((12, 1, 4, 4)).astype(np.float32),
        "train_y": np.arange(12) % 3,
        "test_x": rng.random((6, 1, 4, 4)).astype(np.float32),
        "test_y": np.arange(6) % 3,
    }
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


def npz(tmp_path, options=(), **changes):
    np.savez(tmp_path / "mine.npz", **arrays(**changes))
    values = {"path": str(tmp_path / "mine.npz"), **dict(options)}
    return build(sources.get("npz"), values)


def test_every_source_has_a_summary_and_the_limits():
    images = ["cifar10", "cifar100", "cinic10", "digits", "fashion-mnist", "femnist"]
    assert sources.names() == [*images, "npz", "pydoc-topics", "shakespeare"]
    for name in sources.names():
        assert len(sources.summary(name)) > 20
        with pytest.raises(ConfigError, match="limit = -1"):
            build(sources.get(name), {"limit": -1, "path": "x"} if name == "npz" else {"limit": -1})


def test_digits_are_all_there_split_in_proportion_and_normalised(digits):
    assert digits.train_x.shape == (1437, 1, 8, 8)
    assert digits.test_x.shape == (360, 1, 8, 8)
    assert digits.task().input_shape == (1, 8, 8)
    assert digits.task().classes == 10
    together = np.concatenate([digits.train_x, digits.test_x])
    assert abs(together.mean()) < 1e-3 and abs(together.std() - 1) < 1e-3
    assert np.ptp(np.bincount(digits.test_y)) <= 2
    assert sources.get("digits")().missing() == ""


def test_a_limit_keeps_classes_in_proportion_and_the_official_split(digits):
    small = sources.get("digits")(limit=200, test_limit=50).load()
    smaller = sources.get("digits")(limit=100, test_limit=50).load()
    assert (len(small.train_y), len(small.test_y)) == (200, 50)
    assert np.abs(np.bincount(small.train_y) - 20).max() <= 1
    rows = [{x.tobytes() for x in d.train_x} for d in (smaller, small, digits)]
    assert rows[0] < rows[1] < rows[2]
    assert {x.tobytes() for x in small.test_x} < {x.tobytes() for x in digits.test_x}
    assert sources.get("digits")(limit=10**6).load().fingerprint() == digits.fingerprint()


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    part=st.floats(0, 1),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_prefixes_of_the_stratified_order_are_proportional(counts, seed, part):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = stratified_order(labels, Rng(seed))
    assert np.array_equal(np.sort(order), np.arange(len(labels)))
    length = round(part * len(labels))
    prefix = np.bincount(labels[order[:length]], minlength=len(counts))
    assert np.abs(prefix - length * np.array(counts) / len(labels)).max() <= 1 + 1e-9


def test_the_fingerprint_notices_everything(digits):
    base = Dataset("a", *[digits.train_x[:5], digits.train_y[:5]] * 2, 10)
    brighter = digits.train_x[:5].copy()
    brighter[3, 0, 2, 2] += 1e-3
    owned = np.arange(5)
    others = [
        Dataset("a", brighter, digits.train_y[:5], digits.train_x[:5], digits.train_y[:5], 10),
        Dataset(
            "a",
            digits.train_x[:5],
            digits.train_y[5:10],
            *[digits.train_x[:5], digits.train_y[:5]],
            10,
        ),
        Dataset("a", *[digits.train_x[:5][::-1], digits.train_y[:5][::-1]] * 2, 10),
        Dataset("a", *[digits.train_x[:5], digits.train_y[:5]] * 2, 10, (), owned, owned),
    ]
    same = Dataset("b", *[digits.train_x[:5].copy(), digits.train_y[:5]] * 2, 10)
    assert same.fingerprint() == base.fingerprint()
    assert len({base.fingerprint(), *(d.fingerprint() for d in others)}) == 5


def test_normalise_uses_one_mean_and_deviation_for_each_channel():
    pixels = np.array([[[[0, 255, 51]]]], np.uint8)
    out = normalise(pixels, (0.5, 0.5, 0.2), (0.5, 0.25, 0.1))
    assert out.shape == (1, 3, 1, 1)
    assert np.allclose(out[0, :, 0, 0], [-1, 2, 0], atol=1e-6)


def test_npz_round_trip(tmp_path):
    owners = np.array(["a", "b"] * 6)
    data = npz(tmp_path, train_ids=owners, test_ids=owners[:6]).load()
    assert data.name == "mine"
    assert data.classes == 3
    assert data.train_ids.tolist() == owners.tolist()
    assert abs(data.train_x.mean()) < 1e-6 and abs(data.train_x.std() - 1) < 1e-5
    raw = npz(tmp_path, {"standardise": False}).load()
    assert np.array_equal(raw.train_x, arrays()["train_x"])


def test_npz_takes_grey_bytes_and_vectors(tmp_path):
    pixels = np.full((12, 4, 4), 255, np.uint8)
    raw = npz(tmp_path, {"standardise": False}, train_x=pixels, test_x=pixels[:6]).load()
    assert raw.train_x.shape == (12, 1, 4, 4)
    assert raw.train_x.max() == 1.0
    constant = npz(tmp_path, train_x=np.ones((12, 7)), test_x=np.ones((6, 7))).load()
    assert constant.task().input_shape == (7,)
    assert not constant.train_x.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_y": None}, "no array 'test_y'.*found: test_x, train_x, train_y"),
        ({"train_y": np.arange(12) / 2}, "train_y holds float64; allowed: whole numbers from 0"),
        ({"train_y": np.arange(12) - 1}, "label -1; allowed: 0 to 10"),
        ({"train_y": np.arange(11)}, r"shape \(11,\).*\(12,\), one label for each row"),
        ({"train_y": np.zeros((12, 1), int)}, r"shape \(12, 1\)"),
        ({"test_x": np.zeros((6, 1, 5, 4))}, r"\(1, 4, 4\) in train_x and \(1, 5, 4\) in test_x"),
        ({"test_x": np.full((6, 1, 4, 4), np.nan)}, "test_x holds NaN or infinite"),
        ({"train_x": np.full((12, 1, 4, 4), np.inf)}, "holds NaN or infinite"),
        ({"train_x": np.zeros((12, 4, 4, 3))}, "channels last.*transpose"),
        ({"train_x": np.zeros(12)}, r"shape \(12,\)"),
        ({"train_x": np.array(["a"] * 12)}, "allowed: numbers"),
        ({"train_ids": np.arange(3)}, r"train_ids has shape \(3,\)"),
        (
            {"test_x": np.zeros((0, 1, 4, 4)), "test_y": np.zeros(0, int)},
            "no example in test_x",
        ),
    ],
)
def test_npz_says_what_is_wrong(tmp_path, changes, words):
    source = npz(tmp_path, {"standardise": "test_x" not in changes}, **changes)
    with np.errstate(all="ignore"), pytest.raises(DataError, match=words):
        source.load()


def test_npz_refuses_objects_and_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="no objects"):
        npz(tmp_path, train_y=np.array([{}] * 12)).load()
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"cannot read.*text\.npz"):
        sources.get("npz")(path=str(tmp_path / "text.npz")).load()
    (tmp_path / "half.npz").write_bytes((tmp_path / "mine.npz").read_bytes()[:300])
    with pytest.raises(DataError, match=r"cannot read.*half\.npz"):
        sources.get("npz")(path=str(tmp_path / "half.npz")).load()
    absent = sources.get("npz")(path=str(tmp_path / "none.npz"))
    assert "none.npz" in absent.missing()
    with pytest.raises(DataError, match="no such file"):
        absent.load()
    with pytest.raises(ConfigError, match="path"):
        build(sources.get("npz"), {})


def test_class_names_have_to_fit():
    x, y = np.zeros((2, 3), np.float32), np.array([0, 1])
    with pytest.raises(DataError, match="1 class names for 2 classes"):
        Dataset("a", x, y, x, y, 2, ("only",))
    with pytest.raises(DataError, match="label 1; allowed: 0 to 0"):
        Dataset("a", x, y, x, y, 1)
