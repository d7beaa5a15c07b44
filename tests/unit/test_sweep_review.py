"""Sweeps under hard use: merged folders, damaged files, equal values, processes that are killed."""

import json
import multiprocessing
import shutil

import numpy as np
import pytest

from fedkd.axes import Sweep, points
from fedkd.cli.sweep import axis
from fedkd.config import experiment
from fedkd.engine.study import run_study
from fedkd.errors import ConfigError, FedkdError, RunError
from fedkd.metrics.intervals import paired_t
from fedkd.report import load as load_study
from fedkd.report import measures
from fedkd.report.collection import RATIO, Group, collect
from fedkd.report.comparison import comparison
from fedkd.report.measures import Target
from fedkd.report.runs import RunView
from fedkd.sweep.failed import reason_of
from fedkd.sweep.plan import labels_of, plan
from fedkd.sweep.run import run_sweep


@pytest.fixture(scope="module")
def base(tiny):
    return {**tiny("fedavg", {"rounds": 2}).table(), "strategy": "fedavg"}


def sweep(base, changes=None, **axes):
    return experiment({**base, **(changes or {}), "sweep": axes})


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """A sweep over two strategies and two ratios, and a comparison of the same at one ratio."""
    root = tmp_path_factory.mktemp("made")
    grid = {"strategy": ["fedavg", "local-only"], RATIO: [0.5, 1]}
    run_sweep(sweep(base, grid=grid), root / "sweep")
    part = {"count": 4, "training": base["clients"]["training"]}
    half = {
        "clients": {**part, "participation": {**base["clients"]["participation"], "ratio": 0.5}},
        "compare": {"local-only": {"strategy": "local-only"}},
        "seeds": [0, 1],
    }
    run_study(experiment({**base, **half}), root / "study")
    return root


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made / "sweep", tmp_path / "copy")
    return tmp_path / "copy"


def held(collection):
    return [(g.label, *g.point.values(), g.seeds) for g in collection.groups]


def test_a_sweep_and_a_comparison_of_the_same_are_one(made):
    merged = collect([made / "sweep", made / "study"])
    assert merged.axes == {RATIO: (0.5, 1)} and merged.labels == ("fedavg", "local-only")
    assert held(merged) == [
        ("fedavg", 0.5, (0, 1)),
        ("fedavg", 1, (0,)),
        ("local-only", 0.5, (0, 1)),
        ("local-only", 1, (0,)),
    ]
    alone = collect([made / "sweep", made / "study" / "fedavg" / "seed-1"])
    assert held(alone)[0] == ("fedavg", 0.5, (0, 1)) and list(alone.axes) == [RATIO]


def test_one_and_one_point_zero_are_one_point(base, made, copied):
    index = json.loads((copied / "sweep.json").read_text())
    for run in index["runs"]:
        run["point"] = {RATIO: float(run["point"][RATIO])}
    (copied / "sweep.json").write_text(json.dumps(index))
    merged = collect([made / "sweep", copied])
    assert len(merged.groups) == 4 and all(g.seeds == (0,) for g in merged.groups)
    with pytest.raises(ConfigError, match="names a value twice"):
        sweep(base, grid={RATIO: [1, 1.0]})
    assert len(list(points(Sweep(grid={"a": [1, True]})))) == 2


def test_what_is_unfinished_in_one_folder_hides_nothing_of_another(made, copied):
    gone = [p for p in (copied / "runs").iterdir() if (p / "summary.json").exists()][:2]
    for folder in gone:
        shutil.rmtree(folder)
    assert sum(len(g.missing) for g in collect([copied]).groups) == 2
    for folders in ([copied, made / "sweep"], [made / "sweep", copied]):
        merged = collect(folders)
        assert len(merged.groups) == 4 and not any(g.missing for g in merged.groups)
    # What has not begun has no configuration of its own, and is placed all the same.
    with_study = collect([copied, made / "study"])
    assert with_study.axes == {RATIO: (0.5, 1)} and len(with_study.labels) == 2


def test_a_label_that_means_something_else_is_told_apart(base, made, tmp_path):
    moved = {"strategy": ["fedavg"], "clients.training.lr": [0.05]}
    run_sweep(sweep(base, zip=moved, grid={RATIO: [1.0]}), tmp_path)
    merged = collect([made / "sweep", tmp_path])
    assert merged.labels == ("fedavg", "local-only", f"fedavg ({base['name']})")
    assert [g.runs[0].experiment.clients.training.lr for g in merged.groups] == [
        *(0.2, 0.2, 0.2, 0.2),
        0.05,
    ]
    third = collect([made / "sweep", tmp_path, made / "study"])
    assert len(third.labels) == 3


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", None),
        ("metrics.jsonl", b""),
        ("metrics.jsonl", b"\xff"),
        ("metrics.jsonl", b'{"round": 1, "metric": "accuracy", "value": 1}\nx\n{}\n'),
        ("summary.json", b"{"),
        ("summary.json", b"\xff"),
        ("summary.json", b"{}"),
        ("summary.json", b"[]"),
        ("config.toml", b"="),
        ("config.toml", b"nonsense = 1"),
        ("sweep.json", b"{}"),
        ("sweep.json", b'{"version": 1, "runs": []}'),
        ("sweep.toml", b"="),
    ],
)
def test_damage_is_named(copied, file, content):
    place = copied / file if file.startswith("sweep") else next((copied / "runs").iterdir()) / file
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content)
    with pytest.raises(ConfigError, match=file.replace(".", r"\.")):
        [g.curves for g in collect([copied]).groups]


def test_tuning_of_an_earlier_command_is_not_shown(copied):
    (copied / "tuning.json").write_text('{"labels": {}, "space": {}}')
    assert collect([copied]).tuning is None


def test_tables_agree_with_those_of_a_comparison(made):
    rows = comparison(load_study(made / "study"))
    collection = collect([made / "study"])
    for label in ("fedavg", "local-only"):
        group, row = collection.group(label, {}), rows.row(label)
        for key, measure in (
            ("mean_last_k", measures.user_accuracy),
            ("worst_share", measures.worst_share),
            ("std", measures.spread),
            ("jain", measures.jain),
            ("bytes_up", measures.bytes_up),
            ("bytes_down", measures.bytes_down),
        ):
            ours, theirs = measure(group), row.values[key]
            for part in ("value", "low", "high"):
                assert getattr(ours, part) == pytest.approx(getattr(theirs, part), rel=1e-12)
    ours = measures.difference_t(collection.group("fedavg", {}), collection.group("local-only", {}))
    theirs = rows.row("fedavg").values["difference"]
    assert (ours.value, ours.low) == pytest.approx((theirs.value, theirs.low), rel=1e-9)
    assert ours.n == theirs.n == 2


def test_differences_pair_the_same_clients(made):
    group = collect([made / "study"]).group("fedavg", {})
    other = collect([made / "study"]).group("local-only", {})
    parts = [
        json.loads((run.folder / "partition.json").read_text())
        for run in (*group.runs, *other.runs)
    ]
    assert parts[0] == parts[2] and parts[1] == parts[3] and parts[0] != parts[1]
    each = [
        np.nanmean(a.by_client(5) - b.by_client(5))
        for a, b in zip(group.curves, other.curves, strict=True)
    ]
    assert measures.difference(group, other).value == pytest.approx(np.mean(each))
    assert measures.difference_t(group, other) == paired_t(each, [0.0, 0.0])


def test_a_target_is_reached_by_what_ties_with_it(made):
    group = collect([made / "study"]).group("fedavg", {})
    one = Group("x", {}, [RunView("x", 0, group.runs[0].folder, group.runs[0].summary)])
    curve = one.curves[0]
    best = float(curve.mean().max())
    first = int(curve.rounds[np.argmax(curve.mean())])
    found = measures.rounds_to(one, Target(best, ""))
    assert found.value == first and measures.reached(one, Target(best, "")) == (1, 1)
    assert measures.bytes_to(one, Target(best, "")).value == pytest.approx(
        float((curve.bytes_up + curve.bytes_down)[curve.played <= first].sum())
    )
    assert measures.rounds_to(one, Target(best + 1e-6, "")) is None


def test_axes_of_the_command_line_hold_tables_lists_and_quotes():
    assert axis('strategy={name="fedd2s", drop_every=5}, fd', "--over") == (
        "strategy",
        [{"name": "fedd2s", "drop_every": 5}, "fd"],
    )
    assert axis("model.hidden=[16],[16, 8]", "--over")[1] == [[16], [16, 8]]
    assert axis("a='x, y',z,true", "--over")[1] == ["x, y", "z", True]
    assert axis("rounds=[1, 2]", "--over")[1] == [1, 2] == axis("rounds=1,2", "--over")[1]


def test_impossible_axes_name_the_fix(base):
    with pytest.raises(ConfigError, match=r"'clients' comes after 'clients\.count'"):
        list(points(Sweep(grid={"clients.count": [2], "clients": ["few"]})))
    with pytest.raises(ConfigError, match="sweep over 'strategy'"):
        list(points(Sweep(grid={"strategy.name": ["fd"]})))
    alike = [{"name": "fedprox", "mu": 0.1234567}, {"name": "fedprox", "mu": 0.12345678}]
    with pytest.raises(ConfigError, match="named alike"):
        labels_of(sweep(base, grid={"strategy": alike}))


def test_a_key_that_one_label_does_not_have_is_said_with_the_label(base, tmp_path):
    grid = {"strategy": ["fedprox", "fd"], "strategy.mu": [0.1]}
    with pytest.raises(ConfigError, match=r"in 'fd' at strategy.mu = 0.1.*unknown key"):
        plan(sweep(base, grid=grid), tmp_path)


def test_equal_runs_are_done_once_and_shown_twice(base, tmp_path):
    compare = {"again": {"strategy": "fedavg"}, "a/b <script>": {"rounds": 2}, "..": {}}
    result = run_sweep(experiment({**base, "rounds": 2, "compare": compare}), tmp_path)
    assert len(result.runs) == 4 and len(list((tmp_path / "runs").iterdir())) == 1
    found = collect([tmp_path])
    assert found.labels == ("fedavg", "again", "a/b <script>", "..")
    assert len({measures.user_accuracy(g).value for g in found.groups}) == 1


def test_other_results_are_not_hidden(base, made):
    with pytest.raises(ConfigError, match=r"holds a run or a comparison \(study.toml\)"):
        run_sweep(sweep(base, grid={RATIO: [1.0]}), made / "study")
    assert not (made / "study" / "lock").exists()


def test_a_folder_that_cannot_be_written_to_is_named(base, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot write to"):
        run_sweep(sweep(base, grid={RATIO: [1.0]}), tmp_path / "file")


def test_a_drop_in_of_the_workspace_is_found(base, tmp_path):
    place = tmp_path / "space" / "strategies"
    place.mkdir(parents=True)
    (place / "own.py").write_text(
        '"""Own."""\nfrom fedkd.options import options\n'
        "from fedkd.strategies.base import strategies\n"
        'Base = strategies.get("fedavg")\n\n'
        '@strategies.register("own-average")\n@options\n'
        'class Own(Base):\n    """FedAvg under another name."""\n'
    )
    asked = sweep(base, grid={"strategy": ["fedavg", "own-average"], RATIO: [1.0]})
    result = run_sweep(asked, tmp_path / "out", workspace=tmp_path / "space")
    assert not result.errors and len(result.runs) == 2


class Kills:
    """Kills the first process that begins a run."""

    def __init__(self):
        self.told_, self.killed = [], False

    def checking(self, done, of):
        pass

    def planned(self, runs, finished):
        pass

    def trial_finished(self, *what):
        pass

    def told(self, run, told):
        self.told_.append((run.digest, told[0]))
        if told[0] == "round" and not self.killed:
            self.killed = True
            for process in multiprocessing.active_children():
                process.kill()


def test_processes_that_are_killed_cost_their_runs_only(base, tmp_path):
    asked = sweep({**base, "rounds": 6}, grid={RATIO: [0.25, 0.5, 1.0]})
    watching = Kills()
    result = run_sweep(asked, tmp_path, jobs=2, watcher=watching)
    assert 1 <= len(result.errors) <= 2
    assert all("killed by signal 9" in error for error in result.errors.values())
    assert all("killed" in reason_of(run.folder) for run in result.failed)
    assert sum(kind == "done" for _, kind in watching.told_) == 3 - len(result.errors)
    assert not run_sweep(asked, tmp_path).errors
    assert not any(g.missing for g in collect([tmp_path]).groups)


def test_a_reason_that_cannot_be_kept_is_told(base, tmp_path, monkeypatch):
    from fedkd.sweep import worker

    def full(*what):
        raise RunError("no space left")

    monkeypatch.setattr(worker, "keep_reason", full)
    wild = {**base, "clients": {**base["clients"], "training": {"lr": 1e30, "batch_size": 16}}}
    result = run_sweep(sweep(wild, grid={RATIO: [0.5, 1.0]}), tmp_path)
    assert len(result.errors) == 2 and isinstance(RunError(""), FedkdError)
