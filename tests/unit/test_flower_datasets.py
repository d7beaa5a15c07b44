"""The image sets of the hub, read from small local files of the same schema, without network."""

import io
import sys

import numpy as np
import pytest

from fedkd.data import hub
from fedkd.data.partition import divide
from fedkd.data.registries import partitions, sources
from fedkd.errors import DataError
from fedkd.rng import Rng

pa = pytest.importorskip("pyarrow", reason="needs the extra fedkd[datasets]")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra fedkd[datasets]")
Image = pytest.importorskip("PIL.Image")


def picture(row, shape):
    """A PNG whose pixels all have the value of the row."""
    mode = "L" if len(shape) == 2 else "RGB"
    out = io.BytesIO()
    Image.fromarray(np.full(shape, row, np.uint8), mode if len(shape) == 2 else None).save(
        out, "PNG"
    )
    return {"bytes": out.getvalue(), "path": None}


def table(columns, images, rows, shape):
    return pa.table({images: [picture(r, shape) for r in rows], **columns})


def cifar(rows, image="img", label="label", classes=10):
    rows = list(rows)
    return table({label: [r % classes for r in rows]}, image, rows, (32, 32, 3))


def test_cifar10_from_parquet_keeps_the_official_split(tmp_path):
    (tmp_path / "data").mkdir()
    parquet.write_table(cifar(range(20)), tmp_path / "data" / "train-00000-of-00002.parquet")
    parquet.write_table(cifar(range(20, 30)), tmp_path / "data" / "train-00001-of-00002.parquet")
    parquet.write_table(cifar(range(100, 110)), tmp_path / "data" / "test-00000-of-00001.parquet")
    data = sources.get("cifar10")(folder=str(tmp_path)).load()
    assert data.train_x.shape == (30, 3, 32, 32)
    assert data.train_y.tolist() == [r % 10 for r in range(30)]
    expected = (np.arange(30) / 255 - 0.4822) / 0.2435
    assert np.allclose(data.train_x[:, 1, 5, 7], expected, atol=1e-5)
    assert np.allclose(data.test_x[:, 0, 0, 0], (np.arange(100, 110) / 255 - 0.4914) / 0.2470)
    assert data.class_names[2] == "bird"
    small = sources.get("cifar10")(folder=str(tmp_path), limit=10).load()
    assert small.train_y.tolist() == list(range(10)) or sorted(small.train_y) == list(range(10))
    assert small.fingerprint() == data.limited(10).fingerprint()


@pytest.mark.parametrize(("label", "classes"), [("fine", 100), ("coarse", 20)])
def test_cifar100_has_two_kinds_of_labels(tmp_path, label, classes):
    rows = list(range(40))
    columns = {"fine_label": [2 * r for r in rows], "coarse_label": [r % 20 for r in rows]}
    for split in ("train", "test"):
        parquet.write_table(table(columns, "img", rows, (32, 32, 3)), tmp_path / f"{split}.parquet")
    data = sources.get("cifar100")(folder=str(tmp_path), label=label).load()
    assert data.classes == classes
    assert data.train_y.tolist() == columns[f"{label}_label"]


def test_cinic10_leaves_validation_aside_unless_asked(tmp_path):
    for split, start in (("train", 0), ("validation", 50), ("test", 100)):
        rows = range(start, start + 10)
        parquet.write_table(cifar(rows, "image"), tmp_path / f"{split}-0.parquet")
    plain = sources.get("cinic10")(folder=str(tmp_path)).load()
    merged = sources.get("cinic10")(folder=str(tmp_path), merge_validation=True).load()
    assert (len(plain.train_y), len(merged.train_y), len(merged.test_y)) == (10, 20, 10)


def femnist_rows(writers=12, each=20):
    rows = list(range(writers * each))
    columns = {
        "writer_id": [f"f{r % writers:04d}_14" for r in rows],
        "hsf_id": [0] * len(rows),
        "character": [(r // writers) % 62 for r in rows],
    }
    return table(columns, "image", [r % 256 for r in rows], (28, 28))


def test_femnist_has_a_fixed_split_of_each_writer_and_natural_clients(tmp_path):
    parquet.write_table(femnist_rows(), tmp_path / "train-00000-of-00001.parquet")
    data = sources.get("femnist")(folder=str(tmp_path)).load()
    again = sources.get("femnist")(folder=str(tmp_path)).load()
    assert data.fingerprint() == again.fingerprint()
    assert data.train_x.shape == (12 * 18, 1, 28, 28)
    assert np.unique(data.test_ids, return_counts=True)[1].tolist() == [2] * 12
    assert data.class_names[10] == "A" and data.class_names[53] == "r"
    made = divide(data, partitions.get("natural")(), 12, Rng(0))
    for train, test in zip(made.train, made.test, strict=True):
        assert len(set(data.train_ids[train])) == 1
        assert set(data.train_ids[train]) == set(data.test_ids[test])


def test_femnist_of_some_writers_is_part_of_all(tmp_path):
    parquet.write_table(femnist_rows(), tmp_path / "train.parquet")
    some = sources.get("femnist")(folder=str(tmp_path), writers=4).load()
    more = sources.get("femnist")(folder=str(tmp_path), writers=6).load()
    assert len(set(some.train_ids)) == 4
    assert set(some.train_ids) == set(some.test_ids) < set(more.train_ids)
    rows = [
        {(i, x.tobytes()) for i, x in zip(d.test_ids, d.test_x, strict=True)} for d in (some, more)
    ]
    assert rows[0] < rows[1]


def test_femnist_without_a_writer_of_two_examples_is_refused(tmp_path):
    parquet.write_table(femnist_rows(writers=5, each=1), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="no writer has two examples"):
        sources.get("femnist")(folder=str(tmp_path)).load()


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_are_read(tmp_path, kind):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        rows = cifar(range(10))
        with pa.OSFile(str(tmp_path / split / "data-00000-of-00001.arrow"), "wb") as sink:
            new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
            with new(sink, rows.schema) as writer:
                writer.write_table(rows)
    assert len(sources.get("cifar10")(folder=str(tmp_path)).load().train_y) == 10


def test_what_the_datasets_library_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra fedkd[datasets]")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    made = datasets.DatasetDict(
        {split: datasets.Dataset(cifar(range(12))).cast(features) for split in ("train", "test")}
    )
    made.save_to_disk(tmp_path / "saved")
    made["train"].to_parquet(tmp_path / "exported" / "train.parquet")
    made["test"].to_parquet(tmp_path / "exported" / "test.parquet")
    saved = sources.get("cifar10")(folder=str(tmp_path / "saved")).load()
    exported = sources.get("cifar10")(folder=str(tmp_path / "exported")).load()
    assert saved.train_y.tolist() == [r % 10 for r in range(12)]
    assert saved.fingerprint() == exported.fingerprint()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            pa.table({"image": [picture(0, (32, 32, 3))], "label": [0]}),
            "no column 'img'.*mean 'image'",
        ),
        (pa.table({"img": [picture(0, (32, 32, 3))], "label": ["cat"]}), "expected class numbers"),
        (pa.table({"img": [{"bytes": None, "path": "x"}], "label": [0]}), "row 0 holds no image"),
        (pa.table({"img": [{"bytes": b"abc"}], "label": [0]}), "row 0 is a damaged image"),
        (pa.table({"img": [picture(0, (28, 28, 3))], "label": [0]}), r"of \(28, 28, 3\); expected"),
        (pa.table({"img": [picture(0, (32, 32, 3))], "label": [10]}), "label 10; allowed: 0 to 9"),
    ],
)
def test_other_schemas_are_refused(tmp_path, rows, words):
    for split in ("train", "test"):
        parquet.write_table(rows, tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=words):
        sources.get("cifar10")(folder=str(tmp_path)).load()


def test_missing_and_damaged_files_are_named(tmp_path):
    parquet.write_table(cifar(range(3)), tmp_path / "train.parquet")
    source = sources.get("cifar10")(folder=str(tmp_path))
    with pytest.raises(DataError, match=r"no parquet or Arrow file of the split 'test'.*\(1 data"):
        source.load()
    (tmp_path / "test.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"cannot read .*test\.parquet"):
        source.load()
    (tmp_path / "test.parquet").unlink()
    (tmp_path / "test.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot read .*test\.arrow"):
        source.load()


def test_without_network_the_error_comes_at_once(monkeypatch):
    pytest.importorskip("datasets", reason="needs the extra fedkd[datasets]")
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reachable", lambda url: False)
    with pytest.raises(DataError) as caught:
        sources.get("cifar10")().load()
    for words in ("uoft-cs/cifar10", "could not be reached", "HF_HUB_OFFLINE=1", "folder"):
        assert words in str(caught.value)


def test_a_failed_download_is_explained(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra fedkd[datasets]")
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr(hub, "reachable", lambda url: True)

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"failed \(Couldn't reach it\); try again, or download"):
        sources.get("cifar10")().load()


def test_a_download_is_used(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra fedkd[datasets]")
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr(hub, "reachable", lambda url: True)
    asked = []

    def fetch(name, split):
        asked.append((name, split))
        return datasets.Dataset(cifar(range(10)))

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    assert len(sources.get("cifar10")().load().train_y) == 10
    assert asked == [("uoft-cs/cifar10", "train"), ("uoft-cs/cifar10", "test")]
    assert "pyarrow" in sys.modules
