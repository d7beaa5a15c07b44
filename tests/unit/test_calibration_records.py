"""Calibration from predictions to records: bins on the wire, pooled values, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import MetricRecord, RecordDict

from fedkd.clients.judge import EDGES, Calibration, Verdict, judge
from fedkd.data.federated import Split
from fedkd.engine.calibration import MOST, WIDTH, Pool, check_packed, packed, unpacked, written
from fedkd.engine.client_app import _report
from fedkd.engine.flower_strategy import means, unpack
from fedkd.engine.folder import read_records
from fedkd.errors import RunError
from fedkd.metrics.bins import UNIT, Bins, binned, pooled
from fedkd.metrics.calibration import bin_sums, brier
from fedkd.metrics.log import Log
from fedkd.metrics.summary import summarise
from fedkd.report import measures
from fedkd.report.charts.reliability import bins
from fedkd.report.collection import Group
from fedkd.report.comparison import Comparison, Readout
from fedkd.report.ends import ends
from fedkd.report.tables import readouts_markdown
from fedkd.types import Estimate, Record

TEST = "composite|m|test|bins"
THREE = ("bin_count", "bin_correct", "bin_confidence")


def answers(n, classes=5, seed=0):
    """Return logits (n, C), from careful to sure, and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * rng.uniform(0.2, 6, size=(n, 1))
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(rng.integers(0, classes, n))


def verdict(logits, y, calibrated=True) -> Verdict:
    split = Split(logits, y)
    return judge(lambda x: {"m": x}, split, logits.shape[1], calibrated=calibrated)["m"]


def calibration(n, seed=0) -> Calibration:
    found = verdict(*answers(n, seed=seed)).calibration
    assert found is not None
    return found


def same(one: Bins, other: Bins) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("edges", "counts", "correct", "confidence")
    )


def test_a_verdict_has_the_errors_of_its_predictions():
    logits, y = answers(300)
    found = verdict(logits, y)
    probs = torch.softmax(logits.double(), 1).numpy()
    sums = bin_sums(probs, y.numpy())
    assert np.array_equal(found.calibration.bins.counts, sums.counts)
    assert np.array_equal(found.calibration.bins.correct, sums.correct)
    assert found.calibration.bins.error() == pytest.approx(sums.error(), abs=1e-6)
    assert found.calibration.brier_score == pytest.approx(brier(probs, y.numpy()), abs=1e-6)
    assert found.calibration.bins.correct.sum() == found.correct.sum()


def test_accuracy_and_loss_do_not_depend_on_it():
    # Equal logits: which answer is taken must not change.
    logits, y = answers(200)
    logits[::3] = logits[::3].round()
    with_, without = verdict(logits, y), verdict(logits, y, calibrated=False)
    assert without.calibration is None
    assert (with_.accuracy, with_.loss) == (without.accuracy, without.loss)
    assert np.array_equal(with_.correct, without.correct)


def test_what_is_no_number_has_no_calibration():
    logits, y = answers(10)
    logits[3, 1] = math.nan
    broken, sound = verdict(logits, y), verdict(*answers(10))
    assert broken.calibration is None
    assert (broken + sound).calibration is None and (sound + sound).calibration is not None


def test_sums_come_through_a_message():
    found = calibration(100)
    sent = _report({TEST: packed(found), "num-examples": 3.0})["metrics"][TEST]
    again = unpacked(sent)
    assert same(again.bins, found.bins) and again.brier == found.brier
    check_packed(TEST, sent, clients=10)


def test_the_federation_has_the_values_of_all_examples_in_any_order():
    each = [calibration(n, seed=n) for n in (7, 40, 90)]
    made = []
    for order in ([0, 1, 2], [2, 0, 1]):
        pool = Pool(4, last=False)
        for k in order:
            assert pool.add(k, {TEST: packed(each[k]), "composite|m|test|accuracy": 0.5}) == []
        made.append(pool.records())
    assert made[0] == made[1]
    everyone = pooled([c.bins for c in each])
    assert {r.metric: r.value for r in made[0]} == {
        "ece": everyone.error(),
        "ece_floor": everyone.error_if_calibrated(),
        "brier": sum(c.brier for c in each) / UNIT / 137,
    }
    assert {(r.round, r.client, r.split, r.readout, r.predict) for r in made[0]} == {
        (4, -1, "test", "composite", "m")
    }


def test_bins_and_errors_of_clients_are_of_the_last_round():
    each = [calibration(n, seed=n) for n in (60, 80)]
    pool = Pool(9, last=True)
    own = []
    for k, found in enumerate(each):
        metrics = {TEST: packed(found), "composite|m|global|bins": packed(found)}
        own += pool.add(k, metrics)
    assert [(r.client, r.split, r.metric, r.value) for r in own] == [
        (k, "test", metric, value)
        for k, found in enumerate(each)
        for metric, value in (
            ("ece", found.bins.error()),
            ("ece_floor", found.bins.error_if_calibrated()),
        )
    ]
    records = pool.records()
    everyone = pooled([c.bins for c in each])
    for split in ("test", "global"):
        assert same(written(records, "composite", "m", split), everyone)
        names = [r.metric for r in records if r.split == split and r.metric.startswith("bin_")]
        filled = np.flatnonzero(everyone.counts)
        assert sorted(names) == sorted(f"{what}/{m:02}" for what in THREE for m in filled)
        assert 0 < len(filled) < WIDTH
    assert written(records, "own", "m") is None
    # Flower's history gets the federation's error, not a mean of those of clients.
    assert means(own + records)["composite/m/test/ece"] == everyone.error()
    assert means(records + own) == means(own + records)


def good():
    counts, right, sure = [0] * WIDTH, [0] * WIDTH, [0] * WIDTH
    counts[3], right[3], sure[3] = 4, 2, int(4 * 0.25 * UNIT)
    return [float(v) for v in (*counts, *right, *sure, 3 * UNIT)]


def bad(place, value):
    numbers = good()
    numbers[place] = float(value)
    return numbers


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.5, "46 whole numbers are expected"),
        (good()[:-1], "46 whole numbers are expected"),
        ([int(v) for v in good()], "not 46 whole numbers"),
        (bad(3, 0.5), "not 46 whole numbers"),
        (bad(33, math.inf), "not 46 whole numbers"),
        (bad(3, -1), "not 46 whole numbers"),
        ([0.0] * 46, "0 examples"),
        (bad(3, MOST), "examples as"),
        (bad(18, 5), "4 examples, 5 correct"),
        (bad(17, 1), "bin 2 has 0 examples, 1 correct"),
        (bad(33, 4 * UNIT), "confidences from 0.2 to 0.267"),
        (bad(33, 0), "confidences from 0.2 to 0.267"),
        (bad(34, 1), "bin 4 has 0 examples"),
        (bad(45, 8 * UNIT + 1), "Brier score above 2"),
    ],
)
def test_sums_that_nobody_can_have_are_refused(value, words):
    check_packed(TEST, good(), clients=2)
    with pytest.raises(RunError, match=words):
        check_packed(TEST, value, clients=2)


@pytest.mark.parametrize("sure", [0.2, 1 / 15, 4 / 15, 1.0, 1e-12, 0.6000000001])
def test_sums_at_the_bounds_of_bins_are_taken(sure):
    alike = binned(np.full(7, sure), np.ones(7, bool), EDGES)
    check_packed(TEST, packed(Calibration(alike, 0)), clients=1)


def test_a_run_records_and_sums_up_its_calibration(tiny, play):
    changes = {"clients.participation.ratio": 0.5, "evaluate.last_k": 2, "data.validation": 0.2}
    run = play(tiny("fedavg", {**changes, "evaluate.share": 1}))
    log = run.log
    of = ("composite", "personal")
    error = log.series("ece", "test", *of)
    assert sorted(error) == [1, 2, 3]
    own = written(log.records, *of)
    assert error[3] == own.error() and own.examples == log.by_client("examples", "test").sum()
    hits = log.table("accuracy", "test", *of)[-1] * log.by_client("examples", "test")
    assert own.correct.sum() == pytest.approx(np.nansum(hits))
    # The same network on the same examples, once for each client.
    everywhere = written(log.records, *of, "global")
    assert everywhere.examples % 4 == 0 and (everywhere.counts % 4 == 0).all()
    kinds = {(r.metric, r.round, r.client >= 0, r.split) for r in log.records}
    errors = {kind for kind in kinds if kind[0] in ("ece", "ece_floor")}
    assert {round_ for _, round_, client, _ in errors if client} == {3}
    assert {split for _, _, client, split in errors if client} == {"test"}
    assert not any(client for metric, _, client, _ in kinds if metric == "brier")
    judged = ("ece", "ece_floor", "brier", "bin")
    found = {split for name, *_, split in kinds if name.startswith(judged)}
    assert found == {"test", "global"}
    entry = summarise(log, 2)["readouts"]["composite"]["personal"]
    assert entry["last"]["ece"] == error[3]
    assert entry["mean_last_k"]["ece"] == (error[2] + error[3]) / 2
    assert entry["last"]["brier"] == log.series("brier", "test", *of)[3]
    assert 0 < entry["last"]["ece_floor"] < 1
    assert "ece" not in summarise(log, 2)["readouts"]["stale"]["personal"]["last"]


def test_values_of_predictors_do_not_mix():
    made = [
        Record(round=1, split="test", readout="own", predict=p, metric="ece", value=v)
        for p, v in (("a", 0.1), ("b", 0.2))
    ]
    log = Log(2, made)
    assert log.series("ece", "test", "own", "b") == {1: 0.2}
    assert log.series("ece", "test") == {}


def test_bins_are_no_record_of_a_client():
    metrics = RecordDict({"metrics": MetricRecord({TEST: good(), "fit|loss": 1.0})})["metrics"]
    assert [r.metric for r in unpack(1, 0, metrics)] == ["loss"]


def shown(values) -> Comparison:
    made = {key: Estimate(v, math.nan, math.nan, 1, "") for key, v in values.items()}
    readout = Readout(label="a", readout="own", predict="m", headline=True, values=made)
    return Comparison("study", Path(), [], [readout], [])


def test_tables_have_calibration_where_it_was_judged():
    text = readouts_markdown(shown({"loss": 0.5, "brier": 0.25, "ece": 0.081, "ece_floor": 0.02}))
    assert "| loss | Brier | ECE | ECE by chance |" in text
    assert "| 0.500 | 0.250 | 8.1 | 2.0 |" in text and "over 15 bins" in text
    old = readouts_markdown(shown({"loss": 0.5}))
    assert "ECE" not in old and "Brier" not in old


@dataclass
class Ended:
    """What the chart and the measure ask of a run."""

    folder: Path
    summary: dict
    headline: tuple[str, str] = ("composite", "m")

    @cached_property
    def curves(self):
        log = Log(1, read_records(self.folder / "metrics.jsonl"))
        return SimpleNamespace(ends=ends(log, *self.headline))

    def entry(self, which):
        return self.summary["readouts"]["composite"]["m"][which]


def ended(folder, metrics, ece) -> Ended:
    pool = Pool(2, last=True)
    pool.add(0, metrics)
    folder.mkdir()
    lines = "".join(json.dumps(asdict(r)) + "\n" for r in pool.records())
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    entry = {"last": {"ece": ece} if ece else {}, "mean_last_k": {"ece": ece} if ece else {}}
    return Ended(folder, {"readouts": {"composite": {"m": entry}}})


def test_bins_and_errors_are_taken_over_seeds(tmp_path):
    each = [calibration(50, seed=s) for s in (0, 1)]
    runs = [ended(tmp_path / str(i), {TEST: packed(c)}, 0.1 + i) for i, c in enumerate(each)]
    group = Group("a", {}, runs)
    assert same(bins(group), pooled([c.bins for c in each]))
    assert measures.ece(group).value == pytest.approx(0.6)
    # A run of before: neither is made up for it.
    old = Group("a", {}, [*runs, ended(tmp_path / "old", {}, 0.0)])
    assert bins(old) is None and measures.ece(old) is None
