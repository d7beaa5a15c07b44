import sys

import pytest

from fedkd.engine.folder import RunFolder, read_records
from fedkd.errors import ConfigError
from fedkd.report import parquet
from fedkd.report.collection import Collection, Group
from fedkd.report.runs import RunView
from fedkd.types import Record

LABELS = ("fedavg", "a|b <script>alert(1)</script>\n& _x_")
RATIO, SCHEME = "clients.participation.ratio", "clients.participation.scheme"


@pytest.fixture
def collection(tmp_path):
    groups = []
    for label in LABELS:
        for ratio in (0.5, 1):
            found = Group(label, {RATIO: ratio, SCHEME: "fixed"})
            for seed in (0, 1):
                folder = RunFolder(tmp_path / str(LABELS.index(label)) / str(ratio) / str(seed))
                folder.begin("")
                folder.append([
                    Record(round=1, metric="accuracy", value=ratio / 2 + seed / 10, client=2,
                           split="test", readout="composite", predict="personal"),
                    Record(round=1, metric="bytes_up", value=7.0, split="train"),
                ])  # fmt: skip
                found.runs.append(RunView(label, seed, folder.path, {}))
            groups.append(found)
    axes = {RATIO: (0.5, 1), SCHEME: ("fixed",)}
    return Collection("c", (tmp_path,), axes, LABELS, groups)


def test_every_value_is_one_tidy_row(collection, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    file = parquet.write(collection, tmp_path / "out" / "results.parquet")
    table = pq.read_table(file)
    assert table.column_names == [
        *("label", RATIO, SCHEME, "seed", "round", "client", "split", "readout", "predict"),
        *("metric", "value"),
    ]
    rows = table.to_pylist()
    assert len(rows) == 2 * 2 * 2 * 2
    last = rows[-2]
    assert (last["label"], last[RATIO], last[SCHEME]) == (LABELS[1], 1.0, "fixed")
    assert (last["seed"], last["client"], last["value"]) == (1, 2, 0.6)
    whole = [r for r in rows if r["metric"] == "bytes_up"]
    assert {r["client"] for r in whole} == {-1}
    records = [r for g in collection.groups for v in g.runs
               for r in read_records(v.folder / "metrics.jsonl")]  # fmt: skip
    assert [r["value"] for r in rows] == [r.value for r in records]


def test_runs_are_row_groups_and_stay_out_of_memory(collection, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    file = parquet.write(collection, tmp_path / "results.parquet")
    assert pq.ParquetFile(file).num_row_groups == 8
    runs = [run for group in collection.groups for run in group.runs]
    assert not any("log" in vars(run) for run in runs)
    assert not list(tmp_path.glob("*.part"))


def test_the_same_runs_give_the_same_bytes(collection, tmp_path):
    pytest.importorskip("pyarrow.parquet")
    one = parquet.write(collection, tmp_path / "one.parquet").read_bytes()
    assert one == parquet.write(collection, tmp_path / "two.parquet").read_bytes()


def test_without_pyarrow_it_says_what_to_install(collection, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedkd\[parquet\]'"):
        parquet.write(collection, tmp_path / "results.parquet")
    assert not (tmp_path / "results.parquet").exists()
