"""The summary against numbers worked out by hand."""

import numpy as np
import pytest

from fedkd.metrics.log import Log
from fedkd.metrics.summary import summarise
from fedkd.types import Record

TEST = {1: [0.2, 0.4], 2: [0.9, 0.7], 3: [0.5, 0.3]}
VALIDATION = {1: [0.1, 0.1], 2: [0.2, 0.2], 3: [0.6, 0.4]}


def made(test=TEST, validation=VALIDATION, readout="composite", clients=2):
    log = Log(clients)
    for k, n in enumerate([30, 10]):
        log.add([Record(round=0, client=k, metric="examples", split="test", value=n)])
    for split, table in (("test", test), ("validation", validation)):
        for round_, row in table.items():
            for k, value in enumerate(row):
                for metric, v in (("accuracy", value), ("loss", 1 - value)):
                    if not np.isnan(v):
                        record = Record(
                            round=round_,
                            client=k,
                            metric=metric,
                            value=v,
                            split=split,
                            readout=readout,
                            predict="personal",
                        )
                        log.add([record])
    return log


def test_the_last_round():
    last = summarise(made(), 2)["readouts"]["composite"]["personal"]["last"]
    assert last["round"] == 3
    assert last["clients"] == 2
    assert last["user_accuracy"] == pytest.approx(0.4)
    assert last["weighted_accuracy"] == pytest.approx((30 * 0.5 + 10 * 0.3) / 40)
    assert last["loss"] == pytest.approx(0.6)
    assert last["by_client"] == [0.5, 0.3]
    assert last["std"] == pytest.approx(0.1)
    assert last["jain"] == pytest.approx(0.8**2 / (2 * (0.25 + 0.09)))


def test_the_mean_of_the_last_k():
    for k, expected in ((1, 0.4), (2, (0.8 + 0.4) / 2), (9, (0.3 + 0.8 + 0.4) / 3)):
        found = summarise(made(), k)["readouts"]["composite"]["personal"]["mean_last_k"]
        assert found["user_accuracy"] == pytest.approx(expected)


def test_the_round_is_chosen_on_validation_and_not_on_test():
    chosen = summarise(made(), 2)["readouts"]["composite"]["personal"]["chosen_on_validation"]
    assert chosen["round"] == 3, "round 2 is best on test, round 3 on validation"
    assert chosen["user_accuracy"] == pytest.approx(0.4)


def test_without_validation_nothing_is_chosen():
    found = summarise(made(validation={}), 2)["readouts"]["composite"]["personal"]
    assert "chosen_on_validation" not in found
    assert found["last"]["user_accuracy"] == pytest.approx(0.4)


def test_clients_that_sat_out_are_left_out_or_stale():
    nan = float("nan")
    log = made(test={1: [0.2, nan], 2: [nan, 0.6]}, validation={}, readout="own")
    readouts = summarise(log, 1)["readouts"]
    own, stale = (readouts[r]["personal"]["last"] for r in ("own", "stale"))
    assert (own["clients"], own["user_accuracy"]) == (1, 0.6)
    assert own["by_client"] == [None, 0.6]
    assert (stale["clients"], stale["user_accuracy"]) == (2, pytest.approx(0.4))
    assert stale["weighted_accuracy"] == pytest.approx((30 * 0.2 + 10 * 0.6) / 40)


def test_bytes_and_seconds_by_phase():
    log = made()
    for round_ in (1, 2):
        log.add(
            [
                Record(round=round_, metric="bytes_up", split="train", value=100),
                Record(round=round_, metric="bytes_up/model", split="train", value=60),
                Record(round=round_, metric="wire_bytes_up", split="train", value=120),
                Record(round=round_, metric="bytes_down", split="evaluate", value=7),
                Record(round=round_, metric="seconds", split="train", value=round_),
            ]
        )
    found = summarise(log, 2)
    assert found["bytes"] == {
        "bytes_up": 200,
        "bytes_up/model": 120,
        "wire_bytes_up": 240,
        "evaluate/bytes_down": 14,
    }
    assert found["seconds"] == {"train": 3, "train_per_round": 1.5}


def test_an_empty_log_has_an_empty_summary():
    assert summarise(Log(2), 3) == {"readouts": {}, "bytes": {}, "seconds": {}}


def test_the_summary_of_a_run_agrees_with_its_log(tiny, play):
    run = play(tiny({"name": "fedd2s", "reading": "cut", "server_epochs": 1}))
    summary = run.finish()
    table = run.log.table("accuracy", "test", "composite", "ensemble")
    entry = summary["readouts"]["composite"]["ensemble"]
    assert entry["last"]["user_accuracy"] == pytest.approx(table[-1].mean())
    assert entry["mean_last_k"]["user_accuracy"] == pytest.approx(table.mean())
    assert set(summary["readouts"]["composite"]) == {
        "personal",
        "global_head",
        "ensemble",
        "own_heads",
    }
    assert "global_accuracy" in entry["last"]
    up = run.ledger.totals(phase="train", direction="up")
    assert summary["bytes"]["bytes_up"] == up.tensor
    assert run.folder.summary()["digest"] == run.experiment.digest()
