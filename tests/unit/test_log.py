"""The log and its views: tables with gaps, the stale read-out, series of the federation."""

import numpy as np

from fedkd.metrics.log import Log
from fedkd.types import Record

NAN = float("nan")


def accuracy(round_, client, value, readout="own", predict="personal", split="test"):
    return Record(
        round=round_,
        client=client,
        metric="accuracy",
        split=split,
        readout=readout,
        predict=predict,
        value=value,
    )


def log():
    made = Log(3)
    made.add([accuracy(2, 0, 0.2), accuracy(2, 2, 0.3)])
    made.add([accuracy(4, 1, 0.4), accuracy(6, 0, 0.6)])
    made.add([accuracy(6, k, 0.1 * k, "composite", "ensemble") for k in range(3)])
    made.add([accuracy(6, 0, 0.9, split="validation")])
    made.add([Record(round=0, client=k, metric="examples", split="test", value=k) for k in (0, 2)])
    made.add([Record(round=r, metric="bytes_up", split="train", value=10.0 * r) for r in (1, 2)])
    return made


def test_tables_have_gaps_where_clients_sat_out():
    own = log().table("accuracy", "test", "own", "personal")
    expected = [[0.2, NAN, 0.3], [NAN, 0.4, NAN], [0.6, NAN, NAN]]
    assert np.array_equal(own, expected, equal_nan=True)


def test_stale_carries_the_last_value_over():
    stale = log().table("accuracy", "test", "stale", "personal")
    expected = [[0.2, NAN, 0.3], [0.2, 0.4, 0.3], [0.6, 0.4, 0.3]]
    assert np.array_equal(stale, expected, equal_nan=True)


def test_rounds_and_predictors():
    made = log()
    assert made.rounds("accuracy", "own") == [2, 4, 6]
    assert made.rounds() == [6]
    made.add([accuracy(6, 0, 0.5, "composite"), accuracy(6, 0, 0.5, "composite", "a")])
    assert made.predictors("composite") == ["personal", "a", "ensemble"]
    assert made.predictors("nothing") == []


def test_by_client_and_series():
    made = log()
    assert np.array_equal(made.by_client("examples", "test"), [0, NAN, 2], equal_nan=True)
    assert made.series("bytes_up", "train") == {1: 10.0, 2: 20.0}
    assert made.series("examples", "test") == {}, "values of clients are not the federation's"


def test_an_empty_log_gives_empty_tables():
    empty = Log(2)
    assert empty.table("accuracy", "test", "own", "personal").shape == (0, 2)
    assert empty.table("accuracy", "test", "stale", "personal").shape == (0, 2)
    assert empty.rounds() == []
