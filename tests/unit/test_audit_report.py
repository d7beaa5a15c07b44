"""Tables and figures of audits: what is shown, what is never picked afterwards, what is missing."""

import io
import json
import math
from copy import deepcopy
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from fedkd.errors import DataError
from fedkd.metrics.intervals import mean_t
from fedkd.privacy.auditing.bounds import all_bounds
from fedkd.privacy.auditing.roc import auc, roc, tpr_at
from fedkd.privacy.exposure import NULL_BITS, mean, reduction
from fedkd.report import audit_figures, audit_tables
from fedkd.report.audit_tables import lines
from fedkd.rng import Rng


def plain(value):
    def number(v):
        bad = isinstance(v, float) and not math.isfinite(v)
        return ("inf" if v == math.inf else None) if bad else v

    return {k: number(v) for k, v in asdict(value).items()}


def subject(g, reps, inside, strength, covered):
    """One subject whose canaries gain ``strength`` bits a doubling; 1,000 references."""
    bits = g.exponential(NULL_BITS, reps.size) + inside * strength * np.log2(1 + reps)
    saturated, ceiling = bits > math.log2(1000), math.log2(1000)
    bits = np.minimum(bits, ceiling)
    levels = {}
    for r in np.unique(reps).tolist():
        into, out = (reps == r) & inside, (reps == r) & ~inside
        levels[str(r)] = {
            "inside": plain(mean(bits[into], Rng(1))),
            "outside": plain(mean(bits[out], Rng(2))),
            "saturated": float(saturated[into].mean()),
            "bits": bits[into].tolist(),
        }
    curve = roc(bits[inside], bits[~inside])
    rates = {f"{f:g}": plain(tpr_at(bits[inside], bits[~inside], f)) for f in (0.01, 0.001)}
    bounds = [
        {**plain(b), "attack": "loss", "level": str(level)}
        for level in ("all", 1, 8)
        for chosen in [(reps == level) | (level == "all")]
        for b in all_bounds(
            bits[chosen & inside], bits[chosen & ~inside], confidence=0.95, delta=1e-5
        )
    ]
    return bits, {
        "quality": {"accuracy": 0.3 + strength / 100, "bits_per_character": 2.5 + strength / 10},
        "covered": covered,
        "exposure": {
            "method": "interpolation",
            "ceiling": ceiling,
            "fit": None,
            "levels": levels,
            "all": plain(mean(bits[inside], Rng(3))),
            "null": plain(mean(bits[~inside], Rng(4))),
            "notes": [],
        },
        "attacks": {
            "loss": {
                "auc": plain(auc(bits[inside], bits[~inside])),
                "tpr": rates,
                "roc": {"fpr": curve.fpr.tolist(), "tpr": curve.tpr.tolist()},
            }
        },
        "bounds": bounds,
    }


def result(label="fedavg", seed=0, strength=2.0, epsilon="inf", unit="client"):
    g = Rng(seed).child(label).numpy()
    reps = np.repeat([1, 8], 60)
    inside = g.random(120) < 0.5
    bits, teacher = subject(g, reps, inside, strength, epsilon != "inf")
    own, student = subject(g, reps, inside, strength / 2, False)
    raw, excess = reduction(bits[inside], own[inside], Rng(5))
    made = {
        "run": {"name": "x", "strategy": "fedavg", "label": label, "seed": seed, "digest": "0"},
        "canaries": {
            "kind": "text", "levels": [1, 8], "count": 120, "inside": int(inside.sum()),
            "outside": int((~inside).sum()), "references": 1000, "space_bits": 19.9,
            "clients": 1, "copies": {"1": 1, "8": 8},
        },
        "theory": {
            "epsilon": epsilon, "delta": None if epsilon == "inf" else 1e-5, "unit": unit,
            "sentence": "" if epsilon == "inf" else f"({epsilon}, 1e-05)-DP for a {unit}.",
        },
        "subjects": {"teacher": teacher, "student:swing": student},
        "one_shot": None,
        "reductions": {"swing": {"raw": plain(raw), "excess": plain(excess)}},
    }  # fmt: skip
    return json.loads(json.dumps(made, allow_nan=False))


@pytest.fixture(scope="module")
def one():
    return result()


@pytest.fixture(scope="module")
def several():
    return [
        result(label, seed, strength, epsilon, unit)
        for label, strength, epsilon, unit in (
            ("fedavg", 2.0, "inf", "client"),
            ("dp-fedavg", 0.3, 4.0, "client"),
            ("dp-sgd", 0.3, 1.5, "example"),
        )
        for seed in (0, 1, 2)
    ]


def cell(table, row, title):
    (found,) = [r for r in table.rows if r[0] == row]
    return found[table.titles.index(title)]


def test_several_seeds_give_the_mean_with_students_t(several):
    values = [r["subjects"]["teacher"]["exposure"]["all"]["value"] for r in several[:3]]
    line = lines(several)[0]
    assert line.over_seeds("exposure", "all") == mean_t(values)
    assert "Means over 3 seeds" in audit_tables.headline(several).notes[0]


def test_one_seed_keeps_its_interval_over_canaries_and_says_what_it_does_not_tell(one):
    table = audit_tables.headline([one])
    top = one["subjects"]["teacher"]["exposure"]["levels"]["8"]["inside"]
    assert cell(table, "teacher", "exposure, 8 copies").endswith(
        f"{top['value']:.2f} [{top['low']:.2f}, {top['high']:.2f}]"
    )
    assert cell(table, "teacher", "excess over 1.44").startswith(
        f"≥ +{top['value'] - NULL_BITS:.2f}"
    )
    assert "nothing of other seeds" in table.notes[0]


def test_names_say_what_differs(one, several):
    assert [line.name for line in lines([one])] == ["teacher", "student swing"]
    assert lines(several)[0].name == "fedavg: teacher"
    alone = deepcopy(several)
    for made in alone:
        del made["subjects"]["student:swing"]
    assert [line.name for line in lines(alone)] == ["fedavg", "dp-fedavg", "dp-sgd"]


def test_the_certified_bound_is_not_the_largest_but_chosen_beforehand(several):
    made = lines(several)
    for line, level in ((made[0], "all"), (made[4], "1")):
        chosen = audit_tables.certified(line)
        assert [(b["method"], b["level"]) for b in chosen] == [("one-run", level)] * 3
    table = audit_tables.headline(several)
    shown = cell(table, "fedavg: teacher", "epsilon ≥ (of)")
    middle = sorted(float(b["epsilon"]) for b in audit_tables.certified(made[0]))[1]
    assert shown.startswith(audit_tables.rounded_down(middle) + " (")
    assert float(audit_tables.rounded_down(middle)) <= middle
    largest = max(b["epsilon"] for b in several[0]["subjects"]["teacher"]["bounds"])
    assert middle < largest


def test_of_two_seeds_the_smaller_bound_is_shown(several):
    pair = several[:2]
    smaller = min(float(b["epsilon"]) for b in audit_tables.certified(lines(pair)[0]))
    shown = cell(audit_tables.headline(pair), "teacher", "epsilon ≥ (of)")
    assert shown.startswith(audit_tables.rounded_down(smaller) + " (")


def test_claims_stand_only_where_they_cover_the_subject(several):
    table = audit_tables.headline(several)
    claims = {row[0]: row[-1] for row in table.rows}
    assert claims["fedavg: teacher"] == "none"
    assert claims["dp-fedavg: teacher"] == "4"
    assert claims["dp-fedavg: student swing"] == "not covered"
    assert any("(4.0, 1e-05)-DP for a client." in note for note in table.notes)
    assert not any("student" in note for note in table.notes if note.startswith("Claimed"))


def test_what_contradicts_a_claim_is_said_unless_it_is_at_a_smaller_delta(several):
    wrong = deepcopy(several[0])
    wrong["theory"].update(epsilon=0.01, delta=1e-5)
    wrong["subjects"]["teacher"]["covered"] = True

    def said(made):
        return any("more than the claimed" in note for note in audit_tables.headline([made]).notes)

    assert said(wrong)
    wrong["theory"]["delta"] = 1e-3
    assert not said(wrong)


def test_a_low_bound_is_never_called_safe(several):
    text = audit_tables.markdown(several)
    assert "never that no more leaks" in text and "no evidence of privacy" in text
    assert "safe" not in text.lower() and "no leak" not in text.lower()


def test_rates_that_too_few_canaries_resolve_are_marked_and_intervals_stay_within_0_and_1(several):
    table = audit_tables.headline(several)
    rate = cell(table, "fedavg: teacher", "TPR at 0.1 % in %")
    assert rate.endswith("*") and any(note.startswith("*:") for note in table.notes)
    for row in table.rows:
        for title in ("TPR at 1 % in %", "TPR at 0.1 % in %"):
            assert "-" not in row[table.titles.index(title)]


def test_every_bound_is_listed_with_its_ceiling_and_what_it_assumes(several):
    table = audit_tables.bounds(several)
    assert len(table.rows) == 6 * 3 * 4
    first = dict(zip(table.titles, table.rows[0], strict=True))
    assert first["method"] == "one-run" and "coin" in first["assumes"]
    assert len(first["epsilon ≥"].split("; ")) == 3


def test_a_one_shot_audit_is_listed_beside_the_bounds(one):
    made = deepcopy(one)
    bound = made["subjects"]["teacher"]["bounds"][0]
    made["one_shot"] = {
        "estimate": {**bound, "method": "one-shot", "assumes": "an estimate, not a bound"},
        "lower": {**bound, "method": "one-shot-lower"},
    }
    rows = audit_tables.bounds([made]).rows
    assert [r[3] for r in rows[-2:]] == ["one-shot", "one-shot-lower"]
    assert rows[-2][-1] == "an estimate, not a bound"


def test_reductions_are_shown_raw_and_as_excess_and_a_missing_one_with_its_reason(several):
    made = deepcopy(several[:3])
    values = [r["reductions"]["swing"]["raw"]["value"] for r in made]
    table = audit_tables.reductions(made)
    assert cell(table, "fedavg", "raw in %").startswith(f"{100 * np.mean(values):.1f} [")
    none = {"value": None, "low": None, "high": None, "n": 60, "method": "nothing to reduce"}
    made[0]["reductions"]["swing"]["excess"] = none
    assert "(2 of 3 seeds)" in cell(audit_tables.reductions(made), "fedavg", "excess in %")
    assert cell(audit_tables.reductions(made[:1]), "fedavg", "excess in %") == "nothing to reduce"


def test_levels_stand_side_by_side_with_what_was_not_planted(one):
    table = audit_tables.by_level([one])
    assert table.titles == ("", "1 copy", "8 copies", "not planted")
    null = one["subjects"]["teacher"]["exposure"]["null"]["value"]
    assert cell(table, "teacher", "not planted").startswith(f"{null:.2f} [")


@pytest.mark.parametrize("width", [80, 100, 120, 240])
def test_the_terminal_table_fits_and_breaks_no_number(several, width):
    stream = io.StringIO()
    audit_tables.show(several, Console(file=stream, width=width, color_system=None))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert cell(audit_tables.headline(several), "fedavg: teacher", "epsilon ≥ (of)") in text
    assert (
        "not covered" in text
        and "…" not in text
        and ("TPR" in text.split("Means over")[0]) == (width > 80)
    )


def test_a_released_subject_has_neither_quality_nor_exposure(one, tmp_path):
    made = deepcopy(one)
    made["subjects"]["released"] = {
        **made["subjects"]["teacher"],
        "quality": {"accuracy": None, "bits_per_character": None},
        "exposure": None,
    }
    table = audit_tables.headline([made])
    assert cell(table, "released", "bits per character") == "–"
    assert cell(table, "released", "exposure, 8 copies") == "–"
    assert cell(table, "released", "AUC") == cell(table, "teacher", "AUC")
    del made["subjects"]["teacher"], made["subjects"]["student:swing"]
    names = {f.name for f in audit_figures.draw([made], tmp_path)}
    assert names == {"roc-fedavg-released.png", "roc-fedavg-released.pdf"}


def test_all_is_written_and_drawn_again_bit_for_bit(several, tmp_path):
    few = deepcopy(several[3:5])
    for made in few:
        del made["subjects"]["student:swing"]
    files = audit_figures.draw(few, tmp_path) + audit_tables.write(few, tmp_path)
    stems = {"exposure", "exposure-once", "trade-off", "roc-dp-fedavg-teacher"}
    names = {f"{stem}{kind}" for stem in stems for kind in (".png", ".pdf")}
    assert {f.name for f in files} == {*names, "audit.md"}
    kinds = {f.suffix: f.read_bytes()[:4] for f in files if f.suffix != ".md"}
    assert kinds == {".png": b"\x89PNG", ".pdf": b"%PDF"}
    for file in audit_figures.exposure(lines(few), tmp_path / "again" / "exposure"):
        assert file.read_bytes() == (tmp_path / "plots" / file.name).read_bytes()


def drawn(monkeypatch, draw, *args):
    """The axes that a figure was drawn on, as they were when it was written."""
    kept = []
    real = audit_figures.legend
    monkeypatch.setattr(audit_figures, "legend", lambda f, a: (kept.append(a), real(f, a)))
    draw(*args)
    return kept[0]


def line_of(axes, start):
    (found,) = [x for x in axes.lines if x.get_label().startswith(start)]
    return found


def test_exposure_is_drawn_with_its_null_ceiling_and_theory(several, monkeypatch, tmp_path):
    axes = drawn(monkeypatch, audit_figures.exposure, lines(several), tmp_path / "e")
    assert set(line_of(axes, "no memorisation").get_ydata()) == {NULL_BITS}
    assert line_of(axes, "ceiling").get_ydata()[0] == pytest.approx(math.log2(1000))
    client = line_of(axes, "ε = 4").get_ydata()
    np.testing.assert_allclose(client, (4 - math.log(0.01 - 1e-5)) / math.log(2))
    # Of examples eight copies are eight units, so that far more is allowed.
    first, last = line_of(axes, "ε = 1.5").get_ydata()
    assert first == pytest.approx((1.5 - math.log(0.01 - 1e-5)) / math.log(2)) and last > first + 10
    hollow = [x for x in axes.lines if x.get_markerfacecolor() == "white" and len(x.get_xdata())]
    assert hollow and line_of(axes, "open:")
    assert axes.get_xscale() == "log"


def test_no_line_of_theory_without_a_claim(one, monkeypatch, tmp_path):
    axes = drawn(monkeypatch, audit_figures.exposure, lines([one]), tmp_path / "e")
    assert not [x for x in axes.lines if "ε" in x.get_label()]


def test_the_tail_is_the_share_that_reaches_each_exposure(several, monkeypatch, tmp_path):
    axes = drawn(monkeypatch, audit_figures.tail, lines(several), tmp_path / "t")
    levels = [r["subjects"]["teacher"]["exposure"]["levels"]["1"]["bits"] for r in several[:3]]
    bits = np.sort(np.concatenate(levels))
    x, y = line_of(axes, "fedavg: teacher").get_data()
    for t, share in zip(x[1:], y[1:], strict=True):
        assert share == pytest.approx(np.mean(bits >= t))
    t, most = line_of(axes, "DP allows: ε = 4").get_data()
    np.testing.assert_allclose(most, np.minimum(1, np.exp(4) * 2.0**-t + 1e-5), rtol=1e-9)
    t, null = line_of(axes, "no memorisation").get_data()
    np.testing.assert_allclose(null, 2.0**-t)


def test_the_curve_left_of_one_false_alarm_is_shaded(one, monkeypatch, tmp_path):
    made = deepcopy(one)
    axes = drawn(monkeypatch, audit_figures.roc, lines([made])[0], tmp_path / "r")
    assert axes.patches[0].get_label().startswith("not resolved")
    right = axes.patches[0].get_x() + axes.patches[0].get_width()
    assert right == pytest.approx(1 / made["canaries"]["outside"])
    at, tpr = line_of(axes, "loss").get_data()
    curve = made["subjects"]["teacher"]["attacks"]["loss"]["roc"]
    for x, y in list(zip(at, tpr, strict=True))[::40]:
        allowed = [t for f, t in zip(curve["fpr"], curve["tpr"], strict=True) if f <= x * 1.0001]
        assert y == pytest.approx(max(allowed))
    made["subjects"]["teacher"]["attacks"]["loss"]["outside"] = 20
    again = drawn(monkeypatch, audit_figures.roc, lines([made])[0], tmp_path / "s")
    assert again.patches[0].get_x() + again.patches[0].get_width() == pytest.approx(1 / 20)


def test_the_trade_off_is_exposure_against_quality(several, monkeypatch, tmp_path):
    axes = drawn(monkeypatch, audit_figures.trade_off, lines(several), tmp_path / "q")
    x, y = line_of(axes, "fedavg: teacher").get_data()
    assert x[0] == pytest.approx(2.7)
    assert y[0] == lines(several)[0].over_seeds("exposure", "all").value
    images = deepcopy(several)
    for made in images:
        for found in made["subjects"].values():
            found["quality"]["bits_per_character"] = None
    axes = drawn(monkeypatch, audit_figures.trade_off, lines(images), tmp_path / "i")
    assert line_of(axes, "fedavg: teacher").get_xdata()[0] == pytest.approx(32)
    assert "accuracy" in axes.get_xlabel()


def test_nothing_to_report_and_a_seed_twice_are_refused(one):
    with pytest.raises(DataError, match="no audit to report"):
        audit_tables.headline([])
    with pytest.raises(DataError, match="has a seed twice"):
        lines([one, one])
