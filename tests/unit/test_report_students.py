"""Agreement with teachers, hacking of teachers and calibration in reports, of made-up records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkd.config import experiment
from fedkd.engine.sinks.base import values
from fedkd.metrics.log import Log
from fedkd.metrics.summary import summarise
from fedkd.report import agreement, calibration, hacking
from fedkd.report.charts import fidelity, reliability, sheet
from fedkd.report.charts import hacking as hacking_chart
from fedkd.report.charts.canvas import Canvas
from fedkd.report.charts.svg import themed
from fedkd.report.collection import Collection, Group
from fedkd.report.curves import Curves, curves
from fedkd.report.drawn import Drawn
from fedkd.report.ends import CLIENTS
from fedkd.report.page import sections
from fedkd.report.sheets import Sheet
from fedkd.report.sweep_figures import CHARTS
from fedkd.rng import stream
from fedkd.types import Record

HEADLINE = ("composite", "personal")
CLIENT_COUNT = 5


@dataclass
class Run:
    """What tables and charts ask of a run."""

    label: str
    seed: int
    curves: Curves
    summary: dict[str, Any]
    folder: Path = Path("nowhere")
    data: str = "same"
    headline: tuple[str, str] = HEADLINE
    experiment: Any = field(default_factory=lambda: experiment({}))

    def entry(self, which: str) -> dict[str, Any]:
        return dict(self.summary.get("readouts", {}).get(which, {}))


def judged(round_: int, metric: str, value: float, client: int = -1) -> Record:
    return Record(
        round=round_, metric=metric, value=value, client=client, split="test",
        readout="composite", predict="personal",
    )  # fmt: skip


def trained(round_: int, metric: str, value: float, client: int) -> Record:
    return Record(round=round_, metric=metric, value=value, client=client, split="train")


def accuracies(rounds: int, each: Sequence[float]) -> list[Record]:
    every = range(1, rounds + 1)
    return [judged(t, "accuracy", a, k) for t in every for k, a in enumerate(each)]


def run(records: Iterable[Record], label: str = "a", seed: int = 0, **last: float) -> Run:
    found = curves(list(records), CLIENT_COUNT, *HEADLINE)
    return Run(label, seed, found, {"strategy": label, "readouts": {"last": last}})


def collected(*runs: Run) -> Collection:
    labels = tuple(dict.fromkeys(r.label for r in runs))
    groups = [Group(label, {}, [r for r in runs if r.label == label]) for label in labels]  # type: ignore[misc]
    return Collection("made up", (), {}, labels, groups)


def taught(label: str, follows: Sequence[float], seed: int = 0, point: str = "") -> Run:
    """A run whose first clients are as accurate as they follow; the last one is not taught."""
    records = accuracies(2, [*(0.9 * f for f in follows), 0.5][:CLIENT_COUNT])
    records += [trained(2, f"agreement/top1{point}", f, k) for k, f in enumerate(follows)]
    records += [trained(2, f"agreement/kl{point}", 1 - f, k) for k, f in enumerate(follows)]
    return run(records, label, seed)


def cells(found: Sheet | None, row: int = 0) -> dict[str, str]:
    assert found is not None
    return {c.key: cell.text for c, cell in zip(found.columns, found.rows[row], strict=True)}


def alone(figure: Any, stem: Path) -> None:
    """Write SVG alone, and lay nothing out: much faster than all files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.set_layout_engine("none")
    vector = stem.with_name(stem.name + ".svg")
    figure.savefig(vector, metadata={"Date": None}, transparent=True)
    vector.write_text(themed(vector.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "_write", alone)


def marks(drawn: Drawn) -> str:
    assert drawn.svg is not None
    return drawn.svg.read_text(encoding="utf-8")


def test_agreement_is_a_mean_over_the_clients_that_were_taught():
    found = agreement.sheet(collected(taught("fedmd", [0.5, 0.7, 0.9])))
    row = cells(found)
    assert row["student"] == "clients" and row["clients"] == "3 of 5"
    assert row["top1"].startswith("70.0 [") and row["kl"].startswith("0.300 [")
    assert (row["worst"], row["best"]) == ("50.0", "90.0")
    # What was never measured is no column.
    assert "tau" not in row and "cka" not in row
    assert found is not None and "bootstrap over the clients" in found.notes[1]


def test_agreement_of_several_seeds_has_the_interval_over_seeds():
    runs = [taught("fedmd", [0.4 + 0.1 * s, 0.6 + 0.1 * s], s) for s in range(3)]
    group = collected(*runs).groups[0]
    found = agreement.overall(group)
    assert found is not None and found.method == "Student t 95%" and found.n == 3
    # The means of the seeds are 0.5, 0.6 and 0.7: half a width of 4.303 * 0.1 / sqrt(3).
    assert (found.value, found.high - found.value) == pytest.approx((0.6, 0.2484), abs=1e-4)
    row = cells(agreement.sheet(collected(*runs)))
    assert (row["worst"], row["best"], row["clients"]) == ("50.0", "70.0", "2 of 5")


def test_taught_points_and_models_of_the_server_have_rows_of_their_own():
    records = accuracies(1, [0.5] * CLIENT_COUNT)
    records += [trained(1, "agreement/top1@cut-1", 0.25, k) for k in range(3)]
    records += [trained(1, "agreement/top1@cut-2", 0.75, k) for k in range(3)]
    records += [Record(round=1, metric="server/agreement/top1/cnn/wide", value=0.9)]
    group = collected(run(records)).groups[0]
    found = agreement.sheet(collected(run(records)))
    students = [cells(found, i)["student"] for i in range(3)]
    assert students == ["clients, at cut-1", "clients, at cut-2", "server: cnn/wide"]
    assert cells(found, 2)["top1"] == "90.0" and cells(found, 2)["worst"] == "–"
    # Clients count, with the mean of their points; the server's model only where none is taught.
    overall = agreement.overall(group)
    assert overall is not None and overall.value == 0.5 and not agreement.served(group)
    server = collected(run([*accuracies(1, [0.5] * 5), records[-1]])).groups[0]
    overall = agreement.overall(server)
    assert overall is not None and overall.value == 0.9 and agreement.served(server)


def test_runs_without_teachers_have_none_of_it(tmp_path):
    plain = collected(run(accuracies(8, [0.5] * 5)))
    for made in (agreement.sheet, agreement.together, hacking.sheet, calibration.sheet):
        assert made(plain) is None
    canvas = Canvas(plain, None, tmp_path)
    for chart in (fidelity.fidelity, hacking_chart.hacking, reliability.reliability):
        assert not list(chart(canvas))


def test_generalization_against_fidelity_over_labels_and_over_clients(tmp_path):
    many = [taught(name, [f - 0.05, f, f + 0.1]) for name, f in
            (("a", 0.5), ("b", 0.6), ("c", 0.7), ("d", 0.8))]  # fmt: skip
    found = agreement.together(collected(*many))
    over = cells(found)
    assert (over["label"], over["units"], over["correlation"]) == ("labels", "4 labels", "1.00")
    assert cells(found, 1)["label"] == "clients of a"
    # Two labels are no correlation, and neither are two clients.
    few = agreement.together(collected(taught("a", [0.5, 0.6]), taught("b", [0.6, 0.7])))
    assert few is None
    [drawn] = fidelity.fidelity(Canvas(collected(*many), None, tmp_path))
    text = marks(drawn)
    assert all(f"series-{k}-points" in text and f"series-{k}-clients" in text for k in range(4))
    assert "Spearman's correlation over 4 labels: 1.00." in drawn.caption
    assert "Hollow" not in drawn.caption


def test_a_correlation_over_seeds_ends_at_one():
    up, mixed = [0.2, 0.4, 0.6, 0.8], [0.4, 0.2, 0.6, 0.8]
    runs = [taught("a", up, 0), taught("a", mixed, 1), taught("a", up, 2)]
    for follows, one in zip((up, mixed, up), runs, strict=True):
        right = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
        one.curves.accuracy[-1] = right
        assert len(agreement.pairs(one)) == len(follows)
    found = agreement.within(Group("a", {}, runs))  # type: ignore[arg-type]
    # Spearman's correlations are 1, 0.8 and 1.
    assert found is not None and found.value == pytest.approx(2.8 / 3)
    assert found.high == 1.0 and found.low == pytest.approx(0.6465, abs=1e-3) and found.n == 3


def test_the_summary_has_agreement_where_there_is_any():
    records = accuracies(2, [0.5] * 5)
    assert "agreement" not in summarise(Log(5, records), 1)
    records += [trained(t, "agreement/top1", 0.1 * t, k) for t in (1, 2) for k in range(3)]
    records += [Record(round=2, metric="server/agreement/kl/cnn", value=0.3)]
    found = summarise(Log(5, records), 1)["agreement"]
    assert found == {"server/kl/cnn": 0.3, "top1": pytest.approx(0.2)}


def distilled(
    proxy: Sequence[float], golden: Sequence[float], seed: int = 0, server: bool = False
) -> Run:
    """Losses from round 1 on, with a little of the seed in them."""
    noise = np.exp(stream(seed, "losses").numpy().normal(0, 0.01, (2, len(proxy))))
    records = accuracies(len(proxy), [0.5] * 5)
    for t, (p, g) in enumerate(zip(proxy * noise[0], golden * noise[1], strict=True), 1):
        records += [judged(t, "loss", g * (1 + 0.1 * (k - 2)), k) for k in range(5)]
        if server:
            records += [Record(round=t, metric=f"server/distil/{m}", value=p * w)
                        for m, w in (("cnn", 0.5), ("mlp", 1.5))]  # fmt: skip
        else:
            records += [trained(t, "loss/digest", p * (1 + 0.1 * (k - 2)), k) for k in range(5)]
    return run(records, "fedmd", seed)


ROUNDS = np.arange(1, 13)
FALLS, TURNS = 1 / ROUNDS, 0.5 + 0.1 * np.abs(ROUNDS - 5)
"""A proxy that falls as one over rounds, and a golden loss that is least in round 5."""


@pytest.mark.parametrize("server", [False, True])
def test_a_test_loss_that_turns_while_the_proxy_falls_is_hacking(server, tmp_path):
    collection = collected(*(distilled(FALLS, TURNS, s, server) for s in range(3)))
    row = cells(hacking.sheet(collection))
    assert row["verdict"] == hacking.YES and row["turning"] == "5 [5, 5]"
    assert row["student"] == ("server: cnn, mlp" if server else "clients")
    assert row["convergence"].startswith("-1.0") and row["rise"].startswith("0.69")
    [drawn] = hacking_chart.hacking(Canvas(collection, None, tmp_path))
    text = marks(drawn)
    assert text.count('id="series-0-ring') == 2 and "series-0-band" in text
    assert "fedmd: hacked." in drawn.caption and "not on held-out ones" in drawn.caption


def test_one_seed_cannot_tell_and_what_goes_on_falling_is_no_sign():
    alone_ = hacking.sheet(collected(distilled(FALLS, TURNS)))
    assert cells(alone_)["verdict"] == hacking.ALONE
    falling = collected(*(distilled(FALLS, FALLS, s) for s in range(3)))
    assert cells(hacking.sheet(falling))["verdict"] == hacking.NO
    again = collected(*(distilled(FALLS, TURNS, s) for s in range(3)))
    assert hacking.sheet(again) == hacking.sheet(again)


def test_few_rounds_are_said_and_not_drawn(tmp_path):
    short = collected(distilled(FALLS[:5], TURNS[:5]))
    assert cells(hacking.sheet(short))["verdict"] == "too few rounds (5 of 6)"
    assert not list(hacking_chart.hacking(Canvas(short, None, tmp_path)))
    # One shot is not again and again.
    assert hacking.sheet(collected(distilled(FALLS[:1], TURNS[:1]))) is None


def test_points_of_an_axis_have_panels_and_figures_of_their_own(tmp_path):
    groups = []
    for n in (5, 8, 12):
        made, other = distilled(FALLS[:n], TURNS[:n]), taught("fedmd", [0.5, 0.6])
        ends = replace(made.curves.ends, agreement=other.curves.ends.agreement)
        made = replace(made, curves=replace(made.curves, ends=ends))
        groups.append(Group("fedmd", {"rounds": n}, [made]))  # type: ignore[list-item]
    found = Collection("made up", (), {"rounds": (5, 8, 12)}, ("fedmd",), groups)
    canvas = Canvas(found, None, tmp_path)
    drawn = list(hacking_chart.hacking(canvas))
    assert [d.name for d in drawn] == ["teacher-hacking-rounds-8", "teacher-hacking-rounds-12"]
    [one] = fidelity.fidelity(canvas)
    assert all(f"rounds {n}" in marks(one) for n in (5, 8, 12))
    rows = [cells(hacking.sheet(found), i) for i in range(3)]
    assert [r["checkpoints"] for r in rows] == [r["rounds"] for r in rows] == ["5", "8", "12"]
    assert rows[0]["verdict"] == "too few rounds (5 of 6)"


def test_losses_without_a_logarithm_are_left_out():
    proxy = np.where(np.isin(ROUNDS, (3, 4)), [0.0, -1.0] * 6, FALLS)
    collection = collected(*(distilled(proxy, TURNS, s) for s in range(2)))
    row = cells(hacking.sheet(collection))
    assert (row["checkpoints"], row["left_out"]) == ("10", "2") and row["verdict"] == hacking.YES
    nothing = hacking.sheet(collected(distilled(0 * FALLS, TURNS)))
    assert cells(nothing)["verdict"] == "too few rounds (0 of 6)"
    held = hacking.Checkpoints(ROUNDS, np.ones((1, 12)), TURNS[None], 0)
    assert hacking.judged(held, 0) == "the distillation loss is the same in all rounds"


def test_only_rounds_that_all_seeds_judged_count():
    first, second = distilled(FALLS, TURNS, 0), distilled(FALLS, TURNS, 1)
    del second.curves.ends.golden[7], first.curves.ends.proxy[CLIENTS][2]
    held = hacking.checkpoints(collected(first, second).groups[0])
    assert held is not None and held.rounds.tolist() == [1, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert held.proxy.shape == held.golden.shape == (2, 10)


@pytest.mark.parametrize("low, high, whole", [(0.9, 8.5, True), (1e-4, 3.0, False), (1, 1.3, False),
                                              (90, 1100, True), (2.0, 6.9, True)])  # fmt: skip
def test_logarithmic_axes_have_a_few_ticks(low, high, whole):
    found = hacking_chart.ticks(low, high, whole)
    assert 2 <= len(found) <= 6 and all(low <= t <= high for t in found)
    assert not whole or all(t == int(t) for t in found)


def binned(label: str, right: int, seed: int = 0, **last: float) -> Run:
    """A run with 100 answers of confidence 0.9, ``right`` of them correct."""
    records = accuracies(1, [0.5] * 5)
    records += [judged(1, f"bin_{what}/13", value) for what, value in
                (("count", 100.0), ("correct", right), ("confidence", 90.0))]  # fmt: skip
    records += [judged(1, "ece", 0.1 * (k + 1), k) for k in range(4)]
    return run(records, label, seed, **last)


def test_the_error_of_one_run_has_an_interval_over_examples(tmp_path):
    collection = collected(binned("sure", 60), binned("fair", 90))
    found = calibration.sheet(collection)
    first, second = cells(found, 0), cells(found, 1)
    assert first["ece"].startswith("30.0 [2") and first["ece_clients"].startswith("25.0 [")
    # Nobody can tell a perfect one from chance: its interval begins at 0.
    assert second["ece"].startswith("0.0 [0.0") and "ece_t" not in first
    assert first["ece_floor"] == "2.4"
    assert found is not None and "over examples" in found.rows[0][1].estimate.method  # type: ignore[union-attr]
    [drawn] = reliability.reliability(Canvas(collection, None, tmp_path))
    assert f"sure {first['ece']}, fair {second['ece']} (basic bootstrap over" in drawn.caption


def test_errors_of_seeds_have_an_interval_over_seeds_too():
    runs = [binned("sure", 60, 0, ece=0.30), binned("sure", 70, 1, ece=0.20)]
    row = cells(calibration.sheet(collected(*runs)))
    assert row["ece_t"].startswith("25.0 [") and row["ece"].startswith("25.0 [")
    # Seeds that err in opposite directions: together they are right.
    runs = [binned("sure", 80, 0, ece=0.10), binned("sure", 100, 1, ece=0.10)]
    row = cells(calibration.sheet(collected(*runs)))
    assert row["ece_t"].startswith("10.0 [") and row["ece"].startswith("0.0 [")


def test_the_test_loss_is_that_of_the_headline():
    own = [replace(r, readout="own") for r in accuracies(3, [0.5] * 5) if r.client or r.round == 1]
    own += [replace(judged(t, "loss", 1.0 * t, 1), readout="own") for t in (1, 2, 3)]
    own += [replace(judged(1, "loss", 4.0, 0), readout="own")]
    own += [trained(t, "loss/digest", 0.1, 1) for t in (1, 2, 3)]
    # Client 0 sat out rounds 2 and 3: its last value stands, and only for the read-out of that.
    stale, fresh = (curves(own, 5, readout, "personal").ends for readout in ("stale", "own"))
    assert stale.golden == {1: 2.5, 2: 3.0, 3: 3.5} and fresh.golden == {1: 2.5, 2: 2.0, 3: 3.0}
    # Without a proxy nobody needs it.
    assert not curves(own[:-3], 5, "own", "personal").ends.golden


def test_tables_stand_beside_their_figures():
    found = [Sheet(name, "", (), ()) for name in ("agreement", "fidelity", "hacking")]
    assert [sections._place(one) for one in found] == ["teachers"] * 3
    assert sections._place(Sheet("calibration", "", (), ())) == "accuracy"
    assert fidelity.fidelity in CHARTS and hacking_chart.hacking in CHARTS


def test_sinks_are_not_given_bins():
    records = [judged(1, "bin_count/13", 5.0), judged(1, "ece", 0.2)]
    assert values(records) == {1: {"composite/personal/test/ece": 0.2}}
