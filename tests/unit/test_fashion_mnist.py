import gzip
import struct

import numpy as np
import pytest

from fedkd.data import fashion_mnist, hub
from fedkd.data.fashion_mnist import FILES, SYSTEM
from fedkd.data.idx import read_idx
from fedkd.data.registries import sources
from fedkd.errors import DataError
from fedkd.rng import Rng


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write(folder, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    rng = Rng(0).numpy()
    arrays = [
        rng.integers(0, 256, (20, 28, 28)),
        np.arange(20) % 10,
        rng.integers(0, 256, (10, 28, 28)),
        np.arange(10) % 10,
    ]
    for name, array in zip(FILES, arrays, strict=True):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Neither Debian's files nor FEDKD_DATA, nor a network."""
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "system")
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr(hub, "reachable", lambda url: False)
    return tmp_path


@pytest.mark.parametrize("zipped", [True, False])
def test_files_are_read_bit_by_bit(tmp_path, zipped):
    images, labels, _, test_labels = write(tmp_path, zipped)
    source = sources.get("fashion-mnist")(folder=str(tmp_path))
    data = source.load()
    assert source.missing() == ""
    assert data.train_x.shape == (20, 1, 28, 28)
    assert np.allclose(data.train_x[:, 0], (images / 255 - 0.2860) / 0.3530, atol=1e-5)
    assert data.train_y.tolist() == labels.tolist()
    assert data.test_y.tolist() == test_labels.tolist()
    assert data.class_names[9] == "Ankle boot"


def test_the_places_are_searched_in_order(nowhere, monkeypatch):
    source = sources.get("fashion-mnist")()
    assert "apt-get install dataset-fashion-mnist" in source.missing()
    write(nowhere / "system")
    assert source.missing() == ""
    write(nowhere / "mine" / "fashion-mnist", zipped=False)
    monkeypatch.setenv("FEDKD_DATA", str(nowhere / "mine"))
    (nowhere / "system" / f"{FILES[0]}.gz").write_bytes(b"")
    assert len(source.load().train_y) == 20


def test_when_there_is_nothing_the_error_lists_the_ways_out(nowhere):
    with pytest.raises(DataError, match=r"fashion-mnist.*folder.*apt-get install"):
        sources.get("fashion-mnist")().load()


def test_a_wrong_folder_is_refused(tmp_path, nowhere):
    with pytest.raises(DataError, match="no folder"):
        sources.get("fashion-mnist")(folder=str(tmp_path / "none")).load()
    empty = sources.get("fashion-mnist")(folder=str(tmp_path))
    with pytest.raises(DataError, match="lacks some of the IDX files train-images"):
        empty.load()
    assert "lacks" in empty.missing()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "starts with nothing, expected 00000803"),
        (idx(np.zeros(5)), "starts with 00000801, expected 00000803"),
        (b"\x00\x00\x0d\x03" + bytes(20), "starts with 00000d03"),
        (b"<html>not found</html>", "is no IDX file"),
        (idx(np.zeros((2, 3, 4)))[:-1], "damaged or truncated"),
        (idx(np.zeros((2, 3, 4)))[:9], "damaged or truncated"),
        (idx(np.zeros((2, 3, 4))) + b"x", "asks for 40"),
        (gzip.compress(idx(np.zeros((2, 3, 4))), mtime=0)[:-9], "cannot read"),
        (b"\x1f\x8b\x08garbage", "cannot read"),
    ],
    # Bytes as names of tests would hold the time of compression, and differ between workers.
    ids=["empty", "labels", "type", "html", "short", "header", "long", "gzip cut", "gzip garbage"],
)
def test_damaged_files_are_refused(tmp_path, content, words):
    file = tmp_path / "images"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_idx(file, 3)
    assert str(file) in str(caught.value)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / f"{FILES[1]}.gz").write_bytes(gzip.compress(idx(np.zeros(19))))
    with pytest.raises(DataError, match=r"20 images and .* 19 labels"):
        sources.get("fashion-mnist")(folder=str(tmp_path)).load()


@pytest.mark.skipif(not SYSTEM.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_files():
    data = sources.get("fashion-mnist")(folder=str(SYSTEM)).load()
    assert data.train_x.shape == (60000, 1, 28, 28)
    assert np.bincount(data.train_y).tolist() == [6000] * 10
    assert np.bincount(data.test_y).tolist() == [1000] * 10
    assert abs(data.train_x.mean()) < 1e-3 and abs(data.train_x.std() - 1) < 1e-3
