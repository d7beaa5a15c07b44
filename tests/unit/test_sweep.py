"""Sweeps: each run once, by what it follows from; failures reported; jobs change no result."""

import json
import shutil
import threading

import pytest

from fedkd.config import experiment
from fedkd.engine.lock import held, locked
from fedkd.engine.simulation import run
from fedkd.errors import ConfigError, RunError
from fedkd.report.collection import RATIO, collect
from fedkd.sweep.plan import INDEX, labels_of, plan, read_index
from fedkd.sweep.run import curves, run_sweep


@pytest.fixture
def swept(tiny):
    table = tiny("fedavg", {"rounds": 2}).table()
    table |= {
        "compare": {"alone": {"strategy": "local-only"}},
        "seeds": [0, 1],
        "sweep": {"grid": {RATIO: [0.5, 1.0]}},
    }
    return experiment(table)


class Watching:
    def __init__(self):
        self.begun, self.finished, self.seen, self.checked = 0, [], [], 0

    def checking(self, done, of):
        assert done < of
        self.checked += 1

    def planned(self, runs, finished):
        self.begun, self.finished = len(runs), list(finished)

    def trial_finished(self, label, trial, number, trials):
        self.seen.append((label, number, trials))

    def told(self, run, told):
        self.seen.append((run.label, told[0]))


def results(folder):
    """Every record of every run but times, by digest."""
    found = {}
    for file in sorted(folder.glob("runs/*/metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.parent.name] = [r for r in lines if r["metric"] != "seconds"]
    return found


def test_a_sweep_is_labels_by_points_by_seeds(swept, tmp_path):
    runs = plan(swept, tmp_path)
    assert [(r.label, r.point[RATIO], r.seed) for r in runs] == [
        (label, ratio, seed)
        for label in ("fedavg", "alone")
        for ratio in (0.5, 1.0)
        for seed in (0, 1)
    ]
    assert len({r.digest for r in runs}) == 8
    assert runs[0].title == "fedavg, ratio=0.5, seed 0"


def test_a_run_of_a_sweep_is_the_run_that_anybody_would_make(swept, tiny, tmp_path):
    planned = plan(swept, tmp_path)[0]
    by_hand = tiny("fedavg", {"rounds": 2, RATIO: 0.5})
    assert run(by_hand, tmp_path / "by-hand")["digest"] == planned.digest


def test_what_moves_with_the_strategy_belongs_to_its_label(swept, tmp_path):
    table = {**swept.table(), "compare": {}}
    table["sweep"] = {
        "zip": {"strategy": ["fedavg", "fedprox"], "clients.training.lr": [0.1, 0.3]},
        "grid": {RATIO: [0.5, 1.0]},
    }
    runs = plan(experiment(table), tmp_path)
    assert {(r.label, r.experiment.clients.training.lr) for r in runs} == {
        ("fedavg", 0.1),
        ("fedprox", 0.3),
    }
    assert {tuple(r.point) for r in runs} == {(RATIO,)}
    # As run_sweep makes them, which has the labels in hand.
    made = experiment(table)
    again = plan(made, tmp_path, variants=curves(made, labels_of(made)))
    assert [r.digest for r in again] == [r.digest for r in runs]


def test_a_repeated_sweep_does_nothing_and_an_extended_one_the_rest(swept, tmp_path):
    first = run_sweep(swept, tmp_path, watcher=Watching())
    assert not first.errors and len(results(tmp_path)) == 8
    again = Watching()
    run_sweep(swept, tmp_path, watcher=again)
    assert again.begun == len(again.finished) == 8 and not again.seen
    wider = experiment({**swept.table(), "sweep": {"grid": {RATIO: [0.5, 0.75, 1.0]}}})
    more = Watching()
    run_sweep(wider, tmp_path, watcher=more)
    assert (more.begun, len(more.finished)) == (12, 8)
    assert [what for what in more.seen if what[1] == "done"] == [
        (label, "done") for label in ("fedavg", "alone") for _ in range(2)
    ]


def test_a_repeated_tuned_sweep_checks_and_does_nothing(swept, tmp_path):
    space = {"clients.training.lr": [0.05, 0.2]}
    tune = {"trials": 2, "method": "grid", "seed": 9, "space": space}
    table = {**swept.table(), "sweep": {"grid": {RATIO: [1.0]}, "tune": tune}}
    first, again = Watching(), Watching()
    run_sweep(experiment(table), tmp_path, watcher=first)
    run_sweep(experiment(table), tmp_path, watcher=again)
    trials = [(label, n, 2) for n in (1, 2) for label in ("fedavg", "alone")]
    assert [seen for seen in first.seen if len(seen) == 3] == trials
    assert again.seen == trials and first.checked == 2 and again.checked == 0


def test_the_number_of_jobs_changes_nothing(swept, tmp_path):
    run_sweep(swept, tmp_path / "one", jobs=1)
    watching = Watching()
    run_sweep(swept, tmp_path / "two", jobs=2, watcher=watching)
    assert results(tmp_path / "one") == results(tmp_path / "two")
    assert sum(what[1] == "done" for what in watching.seen) == 8


def test_a_failing_run_is_reported_and_the_others_go_on(swept, tmp_path):
    table = swept.table()
    table["compare"]["wild"] = {"strategy": "fedavg", "clients.training.lr": 1e30}
    table["sweep"] = {"grid": {RATIO: [1.0]}}
    result = run_sweep(experiment(table), tmp_path)
    assert {r.label for r in result.failed} == {"wild"}
    assert all("finite" in error for error in result.errors.values())
    found = collect([tmp_path])
    wild = found.group("wild", {RATIO: 1.0})
    assert not wild.runs and [m.state for m in wild.missing] == ["failed", "failed"]
    assert "finite" in wild.missing[0].reason
    assert all(g.seeds == (0, 1) for g in found.groups if g.label != "wild")


def test_what_failed_is_tried_again(swept, tmp_path):
    run_sweep(swept, tmp_path)
    broken = next(iter(plan(swept, tmp_path))).folder
    shutil.rmtree(broken)
    broken.mkdir()
    (broken / "failed.json").write_text('{"error": "disk full"}')
    assert collect([tmp_path]).group("fedavg", {RATIO: 0.5}).missing[0].reason == "disk full"
    assert not run_sweep(swept, tmp_path).errors
    assert not collect([tmp_path]).group("fedavg", {RATIO: 0.5}).missing


def test_an_impossible_run_is_found_before_the_first_one(swept, tmp_path):
    table = {**swept.table(), "sweep": {"grid": {RATIO: [0.5, 1.5]}}}
    with pytest.raises(ConfigError, match=r"at clients.participation.ratio = 1.5"):
        run_sweep(experiment(table), tmp_path)
    table["sweep"] = {"grid": {"strategy.mu": [0.1]}}
    with pytest.raises(ConfigError, match="mu"):
        run_sweep(experiment(table), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_two_sweeps_of_disjoint_ratios_are_one(swept, tmp_path):
    for name, ratios in (("a", [1.0]), ("b", [0.5])):
        table = {**swept.table(), "sweep": {"grid": {RATIO: ratios}}}
        run_sweep(experiment(table), tmp_path / name)
    merged = collect([tmp_path / "a", tmp_path / "b"])
    assert merged.axes == {RATIO: (0.5, 1.0)}
    assert [(g.label, g.point[RATIO], g.seeds) for g in merged.groups] == [
        (label, ratio, (0, 1)) for label in ("fedavg", "alone") for ratio in (0.5, 1.0)
    ]


def test_what_two_folders_differ_in_is_an_axis(swept, tmp_path):
    for alpha in (0.5, 5.0):
        table = swept.table()
        table["data"]["partition"]["alpha"] = alpha
        table["sweep"] = {"grid": {RATIO: [1.0]}}
        run_sweep(experiment(table), tmp_path / str(alpha))
    merged = collect([tmp_path / "0.5", tmp_path / "5.0"])
    assert merged.axes == {RATIO: (1.0,), "data.partition.alpha": (0.5, 5.0)}
    assert len(merged.groups) == 4


def test_folders_that_have_little_in_common_stand_side_by_side(swept, tiny, tmp_path):
    run_sweep(swept, tmp_path / "a")
    other = tiny("fedavg", {"rounds": 1, "data.partition.alpha": 2.0, "clients.count": 3}).table()
    other |= {"name": "other", "evaluate": {"last_k": 1}, "sweep": {"grid": {RATIO: [1.0]}}}
    run_sweep(experiment(other), tmp_path / "b")
    merged = collect([tmp_path / "a", tmp_path / "b"])
    assert merged.axes == {"sweep": ("run", "other"), RATIO: (0.5, 1.0)}
    assert merged.labels == ("fedavg", "alone")
    (note,) = merged.notes
    assert "rounds" in note and "clients.count" in note and "alpha" in note
    assert [g.point["sweep"] for g in merged.groups] == ["run", "run", "other", "run", "run"]


def test_a_folder_has_one_process_at_work(swept, tmp_path):
    with locked(tmp_path):
        assert held(tmp_path)
        with pytest.raises(RunError, match="another process is at work"):
            run_sweep(swept, tmp_path)
    assert not held(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.update(version=9),
        lambda t: t["runs"][0].update(folder="../../somewhere"),
        lambda t: t["runs"][0].update(digest="../x", folder="runs/../x"),
        lambda t: t["runs"][0].pop("seed"),
    ],
)
def test_a_damaged_index_is_refused(swept, tmp_path, damage):
    from fedkd.sweep.plan import write_index

    write_index(swept, plan(swept, tmp_path), tmp_path)
    table = json.loads((tmp_path / INDEX).read_text())
    damage(table)
    (tmp_path / INDEX).write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=INDEX):
        read_index(tmp_path)


def test_locks_leave_nothing_behind_and_exclude_one_another(tmp_path):
    inside, most, entered = [], [], []

    def work(number):
        for _ in range(5):
            with locked(tmp_path, patience=60):
                inside.append(number)
                most.append(len(inside))
                entered.append(number)
                inside.remove(number)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert max(most) == 1 and len(entered) == 20
    assert not list(tmp_path.iterdir())
