"""Equal experiments have equal digests; what was run stays readable after defaults change."""

from __future__ import annotations

import json

import pytest

from fedkd.config import experiment, load, override
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import resolve
from fedkd.engine.simulation import run
from fedkd.errors import ConfigError
from fedkd.options import build
from fedkd.registry import Registry
from fedkd.strategies.fedd2s import FedD2S


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("fedavg", {"name": "fedavg", "weighting": "examples"}),
        ({"name": "fedprox", "mu": 1}, {"name": "fedprox", "mu": 1.0}),
    ],
)
def test_the_same_strategy_written_in_two_ways_has_one_digest(short, long):
    first, second = (resolve(experiment({"strategy": s})) for s in (short, long))
    assert first.digest() == second.digest()
    assert first.digest() != resolve(experiment({"strategy": "ditto"})).digest()


def test_a_stored_config_has_every_option_and_reads_back(tmp_path):
    full = resolve(experiment({"strategy": "fedd2s"}))
    (tmp_path / "config.toml").write_text(full.toml())
    assert full.strategy.options["temperature"] == FedD2S().temperature
    assert resolve(load(tmp_path / "config.toml", ["name=run"])) == full


def test_a_manifest_counts_by_its_content(tmp_path):
    digests = []
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
        digests.append(experiment({"data": {"manifest": str(tmp_path / name)}}).digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_label_is_given_once_and_so_is_a_seed():
    with pytest.raises(ConfigError, match="another label"):
        list(experiment({"strategy": "fedavg", "compare": {"fedavg": {}}}).cells())
    with pytest.raises(ConfigError, match="each seed once"):
        list(experiment({"seeds": [0, 0]}).cells())


def test_an_override_does_not_reach_into_what_it_was_given():
    given = {"name": "fedavg"}
    table: dict = {}
    override(table, "strategy", given)
    override(table, "strategy.weighting", "uniform")
    assert given == {"name": "fedavg"}


@pytest.mark.parametrize("value", [True, "5"])
def test_numbers_are_not_made_of_other_things(value):
    with pytest.raises(ConfigError, match=r"rounds = .*integer"):
        experiment({"rounds": value})
    with pytest.raises(ConfigError, match=r"clients\.training\.epochs"):
        experiment({"clients": {"training": {"epochs": value}}})


def test_a_failed_import_is_reported_again_and_not_as_an_unknown_name():
    registry: Registry = Registry("thing", "fedkd.no_such_package")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            registry.get("x")


def test_resume_refuses_a_folder_of_another_experiment_even_without_a_checkpoint(tmp_path, tiny):
    RunFolder(tmp_path).begin(resolve(tiny("fedavg")).toml())
    with pytest.raises(ConfigError, match="another experiment"):
        run(tiny("local-only"), tmp_path, resume=True)


def test_the_ledger_of_a_resumed_run_is_that_of_an_undisturbed_one(tmp_path, tiny):
    whole = tiny("fedavg", {"rounds": 3})
    run(whole, tmp_path / "whole")
    run(whole, tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    run(whole, tmp_path / "cut", resume=True)
    manifests = [
        json.loads((tmp_path / name / "checkpoint" / "checkpoint.json").read_text())
        for name in ("whole", "cut")
    ]
    assert manifests[0]["body"]["extra"]["ledger"] == manifests[1]["body"]["extra"]["ledger"]


def test_unset_drops_depend_on_the_reading():
    blocks = ("conv1", "conv2", "fc1", "head")
    averaging = build(FedD2S, {})
    assert averaging.schedule(blocks)(1) == {"conv1", "conv2", "fc1"}
    slow = build(FedD2S, {"drop_every": 2})
    assert slow.schedule(blocks)(2) == set(blocks)
    assert slow.schedule(blocks)(99) == {"conv1", "conv2", "fc1"}
    cut = build(FedD2S, {"reading": "cut", "drop_every": 2})
    assert [cut.active(blocks, r) for r in (1, 3, 5, 99)] == [
        ["fc1"],
        ["conv2"],
        ["conv1"],
        ["conv1"],
    ]
    assert build(FedD2S, {"reading": "cut"}).active(blocks, 99) == ["fc1"]
