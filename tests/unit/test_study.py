"""Comparisons: a folder for each run, problems before the first, nothing done twice."""

from pathlib import Path

import pytest

from fedkd.config import experiment
from fedkd.engine.study import folders, run_study, slug
from fedkd.errors import ConfigError
from fedkd.strategies.bounds import LocalOnly


@pytest.fixture
def study(tiny):
    compare = {"local-only": {"strategy": "local-only"}, "FedProx!": {"strategy": "fedprox"}}
    table = {**tiny("fedavg", {"rounds": 1}).table(), "compare": compare, "seeds": [0, 1]}
    return experiment(table)


class Watching:
    def __init__(self):
        self.seen = []

    def planned(self, cells):
        self.seen.append(("planned", len(cells)))

    def cell_started(self, cell, folder):
        self.seen.append((cell.label, cell.seed))

    def cell_finished(self, result):
        self.seen.append(result.error)

    def started(self, experiment, first_round):
        self.seen.append(("from", first_round))

    def finished_round(self, round_, log, failures):
        self.seen.append(("round", round_))


def test_every_run_has_a_folder_and_a_summary(study, tmp_path):
    watching = Watching()
    result = run_study(study, tmp_path / "out", watcher=watching)
    assert result.failed == []
    assert result.labels() == ["fedavg", "local-only", "FedProx!"]
    found = [cell.folder.relative_to(tmp_path / "out").as_posix() for cell in result.cells]
    assert found == [f"{s}/seed-{n}" for s in ("fedavg", "local-only", "fedprox") for n in (0, 1)]
    assert (tmp_path / "out/study.toml").is_file()
    for cell in result.cells:
        assert cell.summary["seed"] == cell.seed
        assert (cell.folder / "summary.json").is_file()
    assert watching.seen[:5] == [("planned", 6), ("fedavg", 0), ("from", 1), ("round", 1), ""]
    assert len({str(c.summary["digest"]) for c in result.cells}) == 6


def test_resume_does_nothing_twice_and_the_rest(study, tmp_path):
    out = tmp_path / "out"
    first = run_study(study, out)
    (first.cells[3].folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match="is not empty; add --resume"):
        run_study(study, out)
    watching = Watching()
    second = run_study(study, out, resume=True, watcher=watching)
    assert [s for s in watching.seen if s and s[0] in ("from", "round")] == [("from", 2)]
    for one, other in zip(first.cells, second.cells, strict=True):
        assert one.summary["readouts"] == other.summary["readouts"]


def test_a_failed_run_is_reported_and_the_others_go_on(study, tmp_path, monkeypatch):
    def fail(self, client, received):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(LocalOnly, "local_update", fail)
    result = run_study(study, tmp_path / "out")
    assert [cell.label for cell in result.failed] == ["local-only"] * 2
    assert "all participants of round 1 failed" in result.failed[0].error
    assert all(c.summary for c in result.cells if c.label != "local-only")


def test_problems_are_found_before_the_first_run(study, tmp_path):
    table = study.table()
    table["compare"]["odd"] = {"strategy": {"name": "fedprox", "mu": -1}}
    with pytest.raises(ConfigError, match=r"in 'odd': strategy\.mu = -1"):
        run_study(experiment(table), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_run_uses_the_folder_itself(tiny, tmp_path):
    result = run_study(tiny("fedavg", {"rounds": 1}), tmp_path / "one")
    assert [cell.folder for cell in result.cells] == [tmp_path / "one"]
    assert (tmp_path / "one/summary.json").is_file()


def test_labels_that_share_a_folder_are_refused(study):
    table = study.table()
    table["compare"] = {"a b": {}, "A-B": {"rounds": 2}}
    with pytest.raises(ConfigError, match="too much alike"):
        folders(list(experiment(table).cells()), Path("x"))


@pytest.mark.parametrize(
    ("label", "name"),
    [("a/b", "a-b"), ("..", "run"), ("", "run"), ("Ü", "run"), ("x.y_z", "x.y_z")],
)
def test_slugs_are_safe_names(label, name):
    assert slug(label) == name
