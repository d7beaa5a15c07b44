"""Figures of sweeps: what is drawn of made-up runs, and that nothing about them can break it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fedkd.config import experiment
from fedkd.errors import RunError
from fedkd.report import sweep_figures
from fedkd.report.charts import attendance, outcomes, privacy, sheet, sources, traffic
from fedkd.report.charts.canvas import Canvas, missing
from fedkd.report.charts.scale import Scale
from fedkd.report.charts.svg import themed
from fedkd.report.collection import RATIO, Collection, Group, Missing
from fedkd.report.curves import Curves
from fedkd.report.drawn import Drawn
from fedkd.report.measures import Target
from fedkd.rng import stream
from fedkd.sweep.privacy_curves import CURVES

TARGET = Target(0.5, "as asked for")


@dataclass
class Run:
    """What charts ask of a run."""

    label: str
    seed: int
    curves: Curves
    summary: dict[str, Any]
    folder: Path = Path("nowhere")
    data: str = "same"
    headline: tuple[str, str] = ("composite", "personal")
    experiment: Any = field(default_factory=lambda: experiment({}))


def curves(seed: int, ratio: float, skill: float, sent: float, judged: int = 4) -> Curves:
    """Runs of 6 clients that learn; client 0 is never judged."""
    rng, played = stream(seed, "figures").numpy(), np.arange(1, judged + 1)
    accuracy = np.clip(
        skill * (played[:, None] / judged) ** 0.5 + rng.normal(0, 0.05, (judged, 6)), 0, 1
    )
    accuracy[:, 0] = np.nan
    part = rng.random((judged, 6)) < ratio
    return Curves(
        clients=6, rounds=played, accuracy=accuracy,
        bits=None, played=played, bytes_up=np.full(judged, sent * ratio),
        bytes_down=np.full(judged, sent * ratio), seconds=np.ones(judged),
        seconds_judging=np.ones(judged), took_part=part, lost=np.zeros_like(part),
        clock=np.full(judged, np.nan), examples=np.full(6, 10.0),
    )  # fmt: skip


def collection(
    labels: Sequence[str],
    axes: Mapping[str, Sequence[Any]],
    seeds: Sequence[int] = (0, 1),
    **changes: Any,
) -> Collection:
    groups = []
    for i, label in enumerate(labels):
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            ratio = point.get(RATIO, 0.5)
            made = [
                Run(label, s, replace(curves(s, ratio, 0.5 + 0.1 * i, 1e5 * i), **changes),
                    {"strategy": label})
                for s in seeds
            ]  # fmt: skip
            groups.append(Group(label, point, made))  # type: ignore[arg-type]
    full = {key: tuple(values) for key, values in axes.items()}
    return Collection("made up", (), full, tuple(labels), groups)


def on(found: Collection, folder: Path, target: Target | None = TARGET) -> Canvas:
    return Canvas(found, target, folder)


def texts(drawn: Drawn) -> str:
    assert drawn.svg is not None
    return drawn.svg.read_text(encoding="utf-8")


def alone(figure: Any, stem: Path) -> None:
    """Write SVG alone, and lay nothing out: much faster than all files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.set_layout_engine("none")
    vector = stem.with_name(stem.name + ".svg")
    figure.savefig(vector, metadata={"Date": None}, transparent=True)
    vector.write_text(themed(vector.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.fixture(autouse=True)
def quickly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "whole" not in request.fixturenames:
        monkeypatch.setattr(sheet, "_write", alone)


@pytest.fixture
def whole() -> None:
    """Ask for all files of every figure."""


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    charts = [c for c in sweep_figures.CHARTS if c is not sources.holdings]
    monkeypatch.setattr(sweep_figures, "CHARTS", tuple(charts))


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawn]:
    """All figures of two labels at two ratios."""
    folder = tmp_path_factory.mktemp("figures")
    found = collection(("local-only", "fedavg"), {RATIO: (0.1, 0.5)})
    charts = [c for c in sweep_figures.CHARTS if c is not sources.holdings]
    canvas = on(found, folder / "plots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheet, "_write", alone)
        return {d.name: d for chart in charts for d in chart(canvas)}


def test_every_question_has_its_figure_and_a_caption(two_by_two):
    assert set(two_by_two) == {
        "accuracy-by-round", "accuracy-by-ratio", "difference-0-by-ratio", "clients",
        "worst-by-ratio", "spread-by-ratio", "worst-against-mean", "bytes",
        "rounds-to-target-by-ratio", "bytes-to-target-by-ratio", "seconds-by-ratio", "attendance",
    }  # fmt: skip
    for drawn in two_by_two.values():
        assert len(drawn.caption) > 40 and "  " not in drawn.caption
        assert drawn.svg is not None and drawn.svg.stat().st_size < 40_000
    assert two_by_two["seconds-by-ratio"].section == "costs"
    assert "Student's t" in two_by_two["accuracy-by-round"].caption
    assert "2 seeds" in two_by_two["accuracy-by-round"].caption
    assert "composite personal" in two_by_two["accuracy-by-round"].caption


def test_svg_has_the_pages_colours_unique_ids_and_series_in_every_figure(two_by_two):
    for drawn in two_by_two.values():
        svg = texts(drawn)
        ids = [e.get("id") for e in ElementTree.fromstring(svg).iter() if e.get("id")]
        assert len(ids) == len(set(ids))
        assert "var(--ink" in svg and "<style" not in svg and "<metadata" not in svg
        bare = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", svg)
        assert not re.findall(r"(?:fill|stroke): #", bare), drawn.name
        assert "DejaVu" not in svg
        if drawn.name != "attendance":
            assert any(i.startswith("series-1") for i in ids)
            assert "series-1-legend" in ids and "series-1-legend-text" in ids
    by_round = texts(two_by_two["accuracy-by-round"])
    assert 'id="series-0-band"' in by_round and 'id="series-0-line-2"' in by_round


def test_the_same_results_give_the_same_bytes_in_all_three_files(tmp_path, whole):
    found = collection(("local-only", "fedavg"), {RATIO: (0.1, 0.5)})
    for folder in ("a", "b"):
        assert len(list(attendance.attendance(on(found, tmp_path / folder)))) == 1
    for kind, begins in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<svg")):
        first, again = (tmp_path / f / f"attendance.{kind}" for f in ("a", "b"))
        assert first.read_bytes() == again.read_bytes()
        assert first.read_bytes().startswith(begins)


def test_text_of_a_label_is_escaped_and_never_a_formula(tmp_path, whole):
    names = ("<script>$x_1$</script>", "_hidden", "ключ — 鍵", "a" * 80)
    found = collection(names, {RATIO: (0.1, 1.0)}, (0,))
    (drawn,) = outcomes.accuracy(on(found, tmp_path))
    svg = texts(drawn)
    assert "<script" not in svg and "&lt;script&gt;$x_1$" in svg
    shown = {e.text for e in ElementTree.fromstring(svg).iter() if e.text}
    assert {"_hidden", "ключ — 鍵"} <= shown and "a" * 80 not in shown


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {RATIO: (0.5,)},
        {"clients.participation.scheme": ("fixed", "a rather long name of a scheme", True)},
    ],
)
def test_one_seed_one_round_names_and_equal_values(tmp_path, without_data, axes):
    found = collection(
        ("fedavg", "fd"), axes, (3,),
        rounds=np.array([4]), accuracy=np.full((1, 6), 0.5), clock=np.ones(4), epsilon={4: 2.0},
    )  # fmt: skip
    drawn = sweep_figures.draw(found, TARGET, tmp_path)
    assert {"accuracy-by-round", "bytes"} <= {
        re.sub("-(part|true|fa).*", "", d.name) for d in drawn
    }
    assert all(d.png.parent == tmp_path / "plots" for d in drawn)
    assert not any("Student's t." in d.caption for d in drawn)


def test_what_has_no_result_is_told_and_breaks_nothing(tmp_path, without_data):
    found = collection(("fedavg", "fd", "fedprox"), {RATIO: (0.1, 0.5)})
    empty = np.full((4, 6), np.nan)
    for group in found.groups:
        if group.label == "fd":
            group.runs.clear()
            group.missing.append(Missing(0, "failed", "broke", Path("x")))
        if group.label == "fedprox" and group.point[RATIO] == 0.1:
            for run in group.runs:
                run.curves = replace(run.curves, rounds=np.zeros(0, int), accuracy=empty[:0])
    drawn = {d.name: d for d in sweep_figures.draw(found, TARGET, tmp_path)}
    assert "2 of 10 runs (2 failed; fd)" in drawn["accuracy-by-ratio"].caption
    assert "series-1" not in texts(drawn["accuracy-by-ratio"])
    assert sweep_figures.draw(replace(found, groups=[]), None, tmp_path) == []


def test_runs_under_way_are_shown_and_told():
    found = collection(("fedavg",), {RATIO: (0.1, 0.5)})
    found.groups[0].missing.append(Missing(1, "running", "", Path("x"), 2))
    assert missing(found, {}) == "1 runs are under way, and shown as far as they came."
    assert missing(found, {RATIO: 0.5}) == ""


def test_labels_that_miss_the_target_are_hollow_or_absent(tmp_path):
    found = collection(("low", "high"), {RATIO: (0.1, 0.5)})
    for run in found.groups[2].runs[:1]:
        run.curves = replace(run.curves, accuracy=run.curves.accuracy * 0.1)  # type: ignore[misc]
    canvas = on(found, tmp_path, Target(0.55, "as asked for"))
    at_rounds, at_bytes = outcomes.to_target(canvas)
    svg = texts(at_rounds)
    assert "series-0" not in svg and "Not shown, as there is no value: low." in at_rounds.caption
    assert 'id="series-1-points-2"' in svg
    hollow = svg.split('id="series-1-points-2"')[1].split("<use")[1].split(">")[0]
    assert "fill: none" in hollow or "fill-opacity: 0" in hollow, hollow
    assert "55 %" in at_bytes.caption


def test_differences_are_measured_from_the_baselines(tmp_path):
    found = collection(("fedavg", "local-only", "fd"), {RATIO: (0.1, 0.5)})
    assert outcomes.references(on(found, tmp_path)) == ["local-only"]
    (drawn,) = outcomes.differences(on(found, tmp_path))
    assert "series-1-points" not in texts(drawn) and "as local-only" in texts(drawn)
    others = collection(("fd", "fedavg"), {RATIO: (0.1,)})
    assert outcomes.references(on(others, tmp_path)) == ["fedavg"]
    assert outcomes.references(on(collection(("fd",), {}), tmp_path)) == []


def test_the_front_is_what_no_other_beats():
    group = collection(("fd",), {}).groups[0]

    def offer(cost: float, worth: float) -> traffic.Offer:
        estimate = traffic.Estimate(worth, math.nan, math.nan, 1, "")
        return traffic.Offer(group, cost, estimate)

    offers = [offer(3, 70), offer(1, 50), offer(2, 50), offer(2, 60), offer(4, 65), offer(1, 40)]
    assert [(o.cost, o.worth.value) for o in traffic.front(offers)] == [(1, 50), (2, 60), (3, 70)]


def test_bytes_of_other_data_are_not_compared(tmp_path):
    found = collection(("fedavg", "fd"), {"data.partition.alpha": (0.1, 1.0)})
    drawn = list(traffic.pareto(on(found, tmp_path)))
    assert [d.name for d in drawn] == ["bytes-0", "bytes-1"]
    assert "Hollow: sends nothing" in drawn[0].caption


def test_epsilon_is_the_largest_over_seeds_and_the_three_curves_have_a_panel(tmp_path):
    labels = [f"fd, {curve}" for curve in CURVES]
    found = collection(labels, {RATIO: (0.1, 0.5)}, epsilon={1: 0.5, 4: 1.5})
    run = found.groups[0].runs[1]
    run.curves = replace(run.curves, epsilon={1: 1.0, 4: 1.2})  # type: ignore[misc]
    assert privacy.largest(found.groups[0]) == {1: 1.0, 4: 1.5}
    canvas = on(found, tmp_path)
    (by_round,), (curve,) = privacy.epsilon(canvas), privacy.curves(canvas)
    assert by_round.section == curve.section == "privacy"
    assert 'id="curve-2"' in texts(curve) and "fixed epsilon" in texts(curve)
    plain = on(collection(("fd",), {RATIO: (0.1, 0.5)}), tmp_path)
    assert not list(privacy.epsilon(plain)) and not list(privacy.curves(plain))


def test_axes_that_move_together_are_one(tmp_path):
    found = collection(("fd",), {RATIO: (0.1, 0.5), "rounds": (10, 2)})
    kept = [g for g in found.groups if (g.point[RATIO] == 0.1) == (g.point["rounds"] == 10)]
    canvas = on(replace(found, groups=kept), tmp_path)
    assert canvas.axes == [RATIO] and canvas.slices(RATIO) == [{}]
    assert [value for value, _ in canvas.along(RATIO, "fd", {})] == [0.1, 0.5]
    assert on(found, tmp_path).axes == [RATIO, "rounds"]


def test_slices_and_panels_are_capped_and_told(tmp_path):
    found = collection(("fd",), {RATIO: (0.1, 0.5), "rounds": range(6)}, (0,))
    drawn = list(outcomes.accuracy(on(found, tmp_path)))
    assert len(drawn) == 4 + 2
    assert "2 further slices" in drawn[0].caption and "rounds 0" in drawn[0].title
    values, left = on(found, tmp_path).panels("rounds", {})
    assert (len(values), left) == (6, 0)
    many = collection(("fd",), {"rounds": range(11)}, (0,))
    assert on(many, tmp_path).panels("rounds", {}) == ([0, 2, 4, 6, 8, 10], 5)


def test_cohorts_that_are_the_same_are_one_row(tmp_path):
    found = collection(("fedavg", "fd"), {RATIO: (0.1, 0.5)})
    (drawn,) = attendance.attendance(on(found, tmp_path))
    assert texts(drawn).count(">ratio 0.") == 2
    full = collection(("fedavg",), {RATIO: (0.5, 1.0)}, took_part=np.ones((4, 6), bool))
    assert not list(attendance.attendance(on(full, tmp_path)))


@pytest.mark.parametrize(
    ("values", "kind"),
    [((0.1, 0.5), "linear"), ((0.05, 1.0), "log"), ((0, 100), "linear"), ((3,), "linear"),
     (("a", "b"), "names"), ((True, False), "names"), ((1, "all"), "names")],
)  # fmt: skip
def test_scales_follow_the_values(values, kind):
    scale = Scale(values)
    assert scale.kind == kind
    places = [scale.shifted(values[0], k, 3) for k in range(3)]
    assert places == sorted(places) and places[1] == pytest.approx(scale.at(values[0]))


def test_paths_in_steps_end_where_they_ended():
    points = [(0.04 * i, 7 - 0.26 * i) for i in range(50)]
    path = "M " + " L ".join(f"{x} {y}" for x, y in points)
    steps = re.findall(r"(-?[\d.]+) (-?[\d.]+)", themed(f'<path d="{path}"/>'))
    x, y = (sum(float(s[i]) for s in steps) for i in (0, 1))
    assert (x, y) == pytest.approx(points[-1], abs=0.051)
    kept = '<text x="1.00001">#0072b2 id="1.23456"</text>'
    assert themed(kept) == '<text x="1">#0072b2 id="1.23456"</text>'


def test_a_full_disk_is_a_message(tmp_path, without_data):
    (tmp_path / "plots").write_text("a file where a folder should be")
    with pytest.raises(RunError, match="cannot write"):
        sweep_figures.draw(collection(("fd",), {}, (0,)), TARGET, tmp_path)
