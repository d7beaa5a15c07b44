"""Tuning: equal budgets, the same choice however often it was interrupted, unfair ones refused."""

import dataclasses
import json
import logging
import sys

import pytest

from fedkd.config import experiment as made_of
from fedkd.config import override
from fedkd.engine.folder import RunFolder
from fedkd.engine.simulation import run
from fedkd.errors import ConfigError, RunError
from fedkd.sweep.plan import plan
from fedkd.sweep.search import Listed, search
from fedkd.sweep.space import combination, dimensions, size
from fedkd.sweep.tune import apply, tune
from fedkd.sweep.tuning import read_tuning
from fedkd.types import Record

LR = "clients.training.lr"
REAL = {LR: {"low": 0.01, "high": 1.0, "log": True}, "clients.training.epochs": [1, 2, 3]}


@pytest.fixture
def asked(tiny):
    """Return ``asked(tune, changes)``: FedAvg and FedProx, tuned as the table says."""

    def make(tuning, changes=None):
        table = tiny().table()
        table |= {"compare": {"fedprox": {"strategy": "fedprox"}}, "seeds": [0, 1]}
        table["sweep"] = {"grid": {"clients.participation.ratio": [0.5, 1.0]}}
        table["sweep"]["tune"] = {"trials": 6, "space": REAL, **tuning}
        for key, value in (changes or {}).items():
            override(table, key, value)
        return made_of(table)

    return make


class Fake:
    """Stands for training: accuracy has its peak at lr = 0.1; keeps what it was asked to run."""

    def __init__(self, stop_after=None, fails=lambda experiment: ""):
        self.done, self.batches, self.stop_after, self.fails = [], [], stop_after, fails

    def __call__(self, runs):
        self.batches.append([r.label for r in runs])
        errors = {}
        for one in runs:
            folder = RunFolder(one.folder)
            if folder.summary() is not None:
                continue
            if self.stop_after is not None and len(self.done) >= self.stop_after:
                raise KeyboardInterrupt
            self.done.append(one.digest)
            errors[one.digest] = self.fails(one.experiment)
            if not errors[one.digest]:
                self.write(folder, one.experiment)
        return errors

    @staticmethod
    def write(folder, experiment):
        lr, last = experiment.clients.training.lr, experiment.evaluate.last_k
        best = max(0.0, 0.8 - abs(lr - 0.1))
        folder.begin("")
        # Two early evaluations that must not count, then last_k around the value.
        rounds = [0.99, 0.99] + [best + 0.01 * (-1) ** t for t in range(last)]
        place = {"metric": "accuracy", "readout": "composite", "predict": "personal"}
        folder.append(
            Record(round=t, value=value + shift, client=k, split=split, **place)
            for t, value in enumerate(rounds)
            for k, shift in ((0, 0.1), (1, -0.1))
            for split in ("validation", "test")
        )
        folder.write_summary({"headline": {"readout": "composite", "predict": "personal"}})


def even(changes):
    """Return changes with an even last_k, so that the wobble of the fake cancels."""
    return {"evaluate.last_k": 4, **(changes or {})}


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_every_label_gets_the_same_number_of_trials_and_the_best_is_chosen(asked, tmp_path, method):
    runner = Fake()
    found = tune(asked({"method": method}, even({})), tmp_path, runner)
    table = json.loads((tmp_path / "tuning.json").read_text())
    assert table == read_tuning(tmp_path) == found.table()
    assert (table["trials"], table["seed"], table["method"]) == (6, 1000, method)
    assert list(table["labels"]) == ["fedavg", "fedprox"]
    for label in table["labels"].values():
        assert len(label["trials"]) == 6 and label["method"] == method
        best = max(label["trials"], key=lambda trial: trial["validation"])
        assert (label["chosen"], label["validation"]) == (best["options"], best["validation"])
        for trial in label["trials"]:
            lr = trial["options"][LR]
            assert 0.01 <= lr <= 1 and float(f"{lr:.4g}") == lr
            assert trial["validation"] == pytest.approx(max(0.0, 0.8 - abs(lr - 0.1)))
            assert RunFolder(tmp_path / "runs" / trial["digest"]).summary() is not None
    # One trial of each label at a time, run together.
    assert runner.batches == [["fedavg", "fedprox"]] * 6


def test_labels_do_not_influence_each_other(asked, tmp_path):
    both = tune(asked({}), tmp_path / "both", Fake())
    alone = tune(
        asked({}), tmp_path / "alone", Fake(), variants={"fedprox": {"strategy": "fedprox"}}
    )
    assert both.labels["fedprox"] == alone.labels["fedprox"]
    options = [[t.options for t in found.trials] for found in both.labels.values()]
    assert options[0] != options[1]
    again = tune(asked({"seed": 7}), tmp_path / "again", Fake())
    assert again.labels["fedprox"].trials[0].options != both.labels["fedprox"].trials[0].options


@pytest.mark.parametrize("k", [0, 1, 5, 11])
def test_killed_after_k_trials_the_same_command_does_only_the_rest(asked, tmp_path, k):
    whole = Fake()
    tune(asked({}), tmp_path / "whole", whole)
    first, second = Fake(stop_after=k), Fake()
    with pytest.raises(KeyboardInterrupt):
        tune(asked({}), tmp_path / "killed", first)
    tune(asked({}), tmp_path / "killed", second)
    assert first.done + second.done == whole.done
    written = [(tmp_path / name / "tuning.json").read_bytes() for name in ("whole", "killed")]
    assert written[0] == written[1]
    third = Fake()
    tune(asked({}), tmp_path / "killed", third)
    assert third.done == []


def test_what_was_tried_is_written_after_every_trial(asked, tmp_path):
    seen = []

    class Watcher:
        def trial_finished(self, label, trial, number, trials):
            kept = read_tuning(tmp_path)["labels"][label]["trials"]
            assert kept[-1]["digest"] == trial.digest and len(kept) == number
            seen.append((label, number, trials))

    tune(asked({"trials": 5}), tmp_path, Fake(), Watcher())
    assert seen == [(label, n, 5) for n in range(1, 6) for label in ("fedavg", "fedprox")]


def test_a_small_space_is_gone_through_once_and_a_label_may_have_more(asked, tmp_path):
    asks = {
        "space": {LR: [0.1, 0.3]},
        "labels": {"fedprox": {"strategy.mu": {"low": 0.01, "high": 1.0, "log": True}}},
    }
    runner = Fake()
    table = tune(asked(asks), tmp_path, runner).table()["labels"]
    assert table["fedavg"]["method"] == "grid"
    assert sorted(t["options"][LR] for t in table["fedavg"]["trials"]) == [0.1, 0.3]
    assert table["fedavg"]["chosen"] == {LR: 0.1}
    assert table["fedprox"]["method"] == "tpe" and len(table["fedprox"]["trials"]) == 6
    assert set(table["fedprox"]["chosen"]) == {LR, "strategy.mu"}


def test_what_was_tried_before_counts_but_does_not_run_again(asked, tmp_path):
    # Far more trials than that come back to the few good values of nine.
    asks = {"trials": 8, "space": {LR: [0.1, 0.2, 0.3], "clients.training.epochs": [1, 2, 3]}}
    runner = Fake()
    found = tune(asked(asks), tmp_path, runner)
    digests = [t.digest for label in found.labels.values() for t in label.trials]
    assert [len(label.trials) for label in found.labels.values()] == [8, 8]
    assert len(set(digests)) < len(digests)
    assert sorted(runner.done) == sorted(set(digests))


def test_a_failed_trial_scores_none_is_recorded_and_never_chosen(asked, tmp_path):
    def fails(experiment):
        return "it diverged" if experiment.clients.training.lr < 0.2 else ""

    found = tune(asked({"trials": 12}, even({})), tmp_path, Fake(fails=fails))
    for label in found.labels.values():
        for trial in label.trials:
            assert (trial.validation is None) == (trial.options[LR] < 0.2)
            assert trial.error == ("it diverged" if trial.options[LR] < 0.2 else "")
        assert any(t.validation is None for t in label.trials)
        assert label.best.options[LR] >= 0.2


def test_a_label_of_which_every_trial_fails_ends_the_tuning(asked, tmp_path):
    with pytest.raises(RunError, match="every trial of 'fedavg' failed, the last with: no"):
        tune(asked({}), tmp_path, Fake(fails=lambda experiment: "no memory"))
    assert len(read_tuning(tmp_path)["labels"]["fedavg"]["trials"]) == 6


def test_options_that_exclude_each_other_are_a_failed_trial(asked, tmp_path):
    asks = {"space": {"model": ["mlp", "cnn"], "model.hidden": [[16], [8]]}}
    runner = Fake()
    found = tune(asked(asks), tmp_path, runner).labels["fedavg"]
    for trial in found.trials:
        assert (trial.validation is None) == (trial.options["model"] == "cnn")
        assert ("model.hidden" in trial.error) == (trial.digest == "")
    assert found.best.options["model"] == "mlp" and len(runner.done) == 4


def test_chosen_options_go_under_each_label_and_axes_over_them(asked, tmp_path):
    experiment = asked({"at": {"clients.participation.ratio": 0.5}})
    found = tune(experiment, tmp_path, Fake())
    variants = apply(found, experiment.variants())
    assert variants["fedprox"] == {"strategy": "fedprox", **found.labels["fedprox"].best.options}
    runs = plan(experiment, tmp_path, variants=variants)
    assert len(runs) == 2 * 2 * 2
    for one in runs:
        chosen = found.labels[one.label].best.options
        assert one.experiment.clients.training.lr == chosen[LR]
        assert one.experiment.clients.participation.ratio in (0.5, 1.0)
        assert one.seed in (0, 1)
    with pytest.raises(ConfigError, match="'other' was not tuned"):
        apply(found, {"other": {}})
    nothing = tune(asked({"trials": 0}), tmp_path / "none", Fake())
    assert apply(nothing, {"other": {}}) == {"other": {}}
    assert not (tmp_path / "none").exists()


def test_trials_are_ordinary_runs_at_the_given_point(asked, tmp_path):
    """Training for once: digits, and what tuning reads is what the summary's runs hold."""
    asks = {"trials": 2, "space": {LR: [0.001, 0.3]}, "at": {"clients.participation.ratio": 1.0}}
    runs = []

    def really(planned):
        for one in planned:
            run(one.experiment, one.folder, resume=True)
            runs.append(one)
        return {}

    experiment = asked(asks, {"data.validation": 0.3, "rounds": 2, "compare": {}})
    found = tune(experiment, tmp_path, really)
    assert {one.seed for one in runs} == {1000}
    assert {one.experiment.clients.participation.ratio for one in runs} == {1.0}
    assert all(one.folder == tmp_path / "runs" / one.experiment.digest() for one in runs)
    assert found.labels["fedavg"].best.options == {LR: 0.3}


REFUSED = {
    "a seed of the sweep": ({"seed": 1}, {}, "is a seed of the sweep"),
    "no validation data": ({}, {"data.validation": 0.0}, "data.validation = 0"),
    "an unknown label": ({"labels": {"fedprx": REAL}}, {}, "did you mean 'fedprox'"),
    "nothing to search": ({"space": {}}, {}, "nothing to search"),
    "an unknown key": ({"space": {"strategy.mu": [0, 1]}}, {}, "'fedavg': unknown key"),
    "a value that cannot be": ({"space": {LR: [0.1, -1.0]}}, {}, "greater than 0"),
    "swept and tuned": ({"space": {"clients.participation.ratio": [0.1, 1.0]}}, {}, "swept over"),
    "fixed and tuned": ({"at": {LR: 0.1}}, {}, "in sweep.tune.at"),
    "set by a label": ({}, {"compare.fedprox": {LR: 0.1}}, "'fedprox' sets it itself"),
    "what is judged on": ({"space": {"data.validation": [0.1, 0.2]}}, {}, "judged on"),
    "what is claimed": ({"space": {"privacy.noise_multiplier": [0, 1]}}, {}, "what is claimed"),
    "a seed": ({"space": {"seed": [5, 6]}}, {}, "nothing to search"),
    "a strategy": ({"at": {"strategy": "fd"}}, {}, "nothing to search or to fix"),
    "an endless grid": ({"method": "grid"}, {}, "real range for clients.training.lr"),
    "one value": ({"space": {LR: [0.1]}}, {}, "one value needs no search"),
    "no list": ({"space": {LR: 0.1}}, {}, "give a list"),
    "a value twice": ({"space": {LR: [0.1, 0.1]}}, {}, "twice"),
    "an empty range": ({"space": {LR: {"low": 1, "high": 1}}}, {}, "must be below"),
    "logarithm of 0": ({"space": {LR: {"low": 0.0, "high": 1, "log": True}}}, {}, "low > 0"),
    "a step too far": ({"space": {LR: {"low": 1, "high": 2, "step": 3}}}, {}, "at most high"),
    "a range of text": ({"space": {LR: {"low": "1", "high": 2}}}, {}, "low"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_unfair_or_impossible_is_refused_before_the_first_trial(asked, tmp_path, case):
    asks, changes, words = REFUSED[case]
    runner = Fake()
    with pytest.raises(ConfigError, match=words):
        tune(asked(asks, changes), tmp_path, runner)
    assert runner.batches == []


def test_without_optuna_the_way_out_is_said_and_grids_still_work(asked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedkd\[tune\]'"):
        tune(asked({}), tmp_path, Fake())
    grid = {"method": "grid", "trials": 3, "space": {LR: [0.1, 0.2, 0.3, 0.4]}}
    found = tune(asked(grid), tmp_path, Fake())
    assert [len(label.trials) for label in found.labels.values()] == [3, 3]


def test_optuna_says_nothing_and_its_level_is_left_alone(asked, tmp_path, capfd):
    import optuna

    optuna.logging.set_verbosity(logging.INFO)
    tune(asked({"trials": 3}), tmp_path, Fake())
    assert optuna.logging.get_verbosity() == logging.INFO
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_ranges_are_counted_where_they_can_be():
    space = {
        "a": {"low": 1, "high": 3},
        "b": {"low": 0.1, "high": 0.75, "step": 0.2},
        "c": ["x", True, [1]],
    }
    found = dimensions(space, "space")
    assert size(found) == 3 * 4 * 3
    everything = [combination(found, i) for i in range(36)]
    assert len({json.dumps(one) for one in everything}) == 36
    assert sorted({one["b"] for one in everything}) == [0.1, 0.3, 0.5, 0.7]
    assert {type(one["a"]) for one in everything} == {int}
    assert size(dimensions({"a": {"low": 1, "high": 64, "log": True}}, "space")) == 64
    assert size(dimensions({"a": {"low": 1, "high": 2.5}}, "space")) is None


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_every_kind_of_value_comes_out_as_it_went_in(asked, method):
    space = dimensions(
        {
            "mixed": ["a", True, 1, 0.5, [1, 2]],
            "steps": {"low": 0.0, "high": 1.0, "step": 0.25},
            "whole": {"low": 8, "high": 256, "log": True},
            "real": {"low": -1.0, "high": 1.0},
        },
        "space",
    )
    wanted = dataclasses.replace(asked({}).sweep.tune, method=method, trials=40)
    one = search(wanted, "label", space)
    assert not isinstance(one, Listed)
    drawn = []
    for i in range(40):
        drawn.append(one.ask())
        one.tell(None if i % 7 == 3 else -abs(drawn[-1]["real"] - 0.5))
    assert {json.dumps(d["mixed"]) for d in drawn} == {'"a"', "true", "1", "0.5", "[1, 2]"}
    assert {d["steps"] for d in drawn} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert all(isinstance(d["whole"], int) and 8 <= d["whole"] <= 256 for d in drawn)
    late = [abs(d["real"] - 0.5) for d in drawn[-15:]]
    early = [abs(d["real"] - 0.5) for d in drawn[:15]]
    if method == "tpe":
        assert sum(late) < 0.6 * sum(early)
