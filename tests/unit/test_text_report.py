"""What reports, previews and checks say of text: bits beside accuracy, rows in place of classes."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from fedkd import report
from fedkd.cli.audit_check import findings, occurring, warnings
from fedkd.cli.progress import Lines, Tracker
from fedkd.config import experiment
from fedkd.data.federated import Federation
from fedkd.data.partition import divide
from fedkd.data.preview import plot_holdings, plot_rows
from fedkd.data.registries import partitions, sources
from fedkd.engine.setup import prepare
from fedkd.engine.study import run_study
from fedkd.metrics.log import Log
from fedkd.metrics.summary import summarise
from fedkd.report import tables
from fedkd.report.comparison import comparison
from fedkd.rng import Rng
from fedkd.types import Record

SOURCE = {"name": "pydoc-topics", "topics": 4, "rows_per_topic": 12, "length": 16}
TABLE = {
    "name": "text",
    "rounds": 2,
    "strategy": "fedavg",
    "model": {"name": "lstm", "width": 4, "hidden": 8, "depth": 1},
    "data": {"source": SOURCE, "partition": "natural"},
    "clients": {"count": 4, "training": {"lr": 0.1, "batch_size": 4}},
    "engine": {"executor": "serial", "device": "cpu"},
    "canaries": {
        "kind": "text", "pattern": "pin {}{}{}{}", "repetitions": [1, 2], "count": 6,
        "references": 200,
    },
    "compare": {"alone": {"strategy": "local-only"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    made = run_study(experiment(TABLE), tmp_path_factory.mktemp("text") / "study")
    report.write(made)
    return made


def records(round_, bits, split="test"):
    return [
        Record(round=round_, client=k, metric=metric, split=split, readout="composite",
               predict="personal", value=value)
        for k, b in enumerate(bits)
        for metric, value in (("accuracy", 0.1), ("bits_per_character", b))
    ]  # fmt: skip


def checked(changes, seeds=()):
    table = {**TABLE, "compare": {}, "canaries": {**TABLE["canaries"], **changes.pop("on", {})}}
    prepared = prepare(experiment({**table, **changes}))
    found = findings(prepared, seeds) + warnings(prepared)
    return " ".join(f"{title}: {text}" for title, text in found)


def test_bits_are_summed_up_by_the_same_rules_as_accuracy():
    log = Log(2)
    for t, row in {1: [5.0, 3.0], 2: [4.0, 2.0], 3: [3.0, 2.0]}.items():
        log.add(records(t, row) + records(t, [1.0, 1.0], "validation"))
    log.add(records(3, [6.0, 8.0], "global"))
    entry = summarise(log, 2)["readouts"]["composite"]["personal"]
    assert entry["last"]["bits_per_character"] == 2.5
    assert entry["mean_last_k"]["bits_per_character"] == 2.75
    chosen = entry["chosen_on_validation"]
    assert chosen["bits_per_character"] == {1: 4.0, 2: 3.0, 3: 2.5}[chosen["round"]]
    assert entry["last"]["global_bits_per_character"] == 7.0


def test_a_summary_of_images_has_no_bits():
    log = Log(2)
    log.add(r for r in records(1, [1.0, 2.0]) if r.metric == "accuracy")
    assert "bits" not in json.dumps(summarise(log, 1))


def test_progress_shows_bits_of_the_last_round_and_forgets_them_in_the_next_run():
    lines, cells = [], list(experiment({"rounds": 2}).cells())
    tracker = Tracker(Lines(lines.append))
    tracker.planned(cells)
    tracker.cell_started(cells[0], None)
    log = Log(2)
    log.add(records(1, [4.0, 3.0]))
    tracker.finished_round(1, log, [])
    assert "accuracy 10.0 %  3.50 bits/character" in lines[-1]
    tracker.cell_started(cells[0], None)
    assert "bits" not in tracker.standing.line()


def test_the_comparison_of_text_has_bits_and_says_what_accuracy_is(study):
    shown = comparison(study)
    row = shown.row("fedavg").values["bits_per_character"]
    entry = study.cells[0].summary["readouts"]["composite"]["personal"]
    assert row.value == entry["mean_last_k"]["bits_per_character"]
    assert row.low < row.value < row.high and row.n == 4
    text = " ".join(tables.text(shown, 200).split())
    assert "next-token accuracy" in text and f"{row.value:.3f} [" in text
    assert "global bits per character" in tables.markdown(shown)
    assert any(f"fedkd audit {study.folder}" in note for note in shown.notes)
    long = (study.folder / "readouts.md").read_text()
    assert f"{entry['last']['global_bits_per_character']:.3f}" in long and "nats" in long
    saved = json.loads((study.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert saved["rows"][0]["bits_per_character"]["value"] == row.value


def test_figures_of_text_are_of_rows_and_bits(study):
    def stems(folder):
        return {f.stem for f in (folder / "plots").iterdir()}

    assert stems(study.folder) == {"accuracy", "bits", "bytes", "clients", "rows"}
    assert stems(study.cells[0].folder) == {"accuracy", "bits", "rows"}


def test_rows_are_drawn_for_any_number_of_clients_with_canaries_on_top(tmp_path):
    plain = plot_rows(np.array([5, 9, 0]), tmp_path / "a")
    marked = plot_rows(np.array([5, 9, 0]), tmp_path / "b", planted=[1, 0, 0])
    assert plain[0].read_bytes() != marked[0].read_bytes()
    many = plot_rows(np.arange(120), tmp_path / "c", "many")
    assert all(f.is_file() for f in many)


@pytest.mark.parametrize("tokens, different", [(True, False), (False, True)])
def test_only_classes_are_drawn_as_a_map(tmp_path, monkeypatch, tokens, different):
    from fedkd.data import preview

    drawn = []
    monkeypatch.setattr(preview, "plot_labels", lambda *a: drawn.append("labels") or [])
    name, options = ("pydoc-topics", SOURCE) if tokens else ("digits", {"limit": 100})
    data = sources.get(name)(**{k: v for k, v in options.items() if k != "name"}).load()
    parts = divide(data, partitions.get("iid")(), 4, Rng(0))
    plot_holdings(Federation.build(data, parts, rng=Rng(0)), tmp_path / "x")
    assert (drawn == ["labels"]) == different


def test_what_is_planted_and_measurable_is_said():
    prepared = prepare(experiment({**TABLE, "compare": {}}))
    canaries, said = prepared.canaries, checked({})
    copies = int(canaries.repetitions[canaries.inside].sum())
    rows = sum(prepared.federation.train_size(k) for k in range(4))
    assert f"{copies} of the {rows} training rows" in said
    assert f"{canaries.inside.sum()} planted and {(~canaries.inside).sum()} held back" in said
    assert "|R|, all there could be: 10,000 (13.3 bits)" in said
    assert "at most 13.3 bits by a fit, where it holds; 7.6 bits" in said
    assert "all levels (12 canaries): nothing, these are too few" in said
    many = checked({"on": {"count": 30, "repetitions": [1]}})
    for method in ("one-run", "clopper-pearson", "gdp"):
        assert f"{method} " in many and f"{method} " not in said
    assert "no extra runs" in said and "references are few" not in said


def test_the_largest_exposure_follows_the_estimator():
    assert "at most 7.6 bits (log2" in checked({"audit": {"estimator": "interpolation"}})
    said = checked({"audit": {"estimator": "exact"}})
    assert "at most 13.3 bits, among all other secrets" in said
    wide = {"on": {"pattern": "a {}{}{}{}{}{}"}, "audit": {"estimator": "exact"}}
    assert "refused: audit.estimator = 'exact'" in checked(wide)


def test_extra_runs_are_those_that_other_seeds_do_not_serve_as():
    two = {"audit": {"reference_models": 2}}
    assert "2 extra runs (seeds 1, 2) beside 1 run" in checked(two)
    assert "1 extra run (seed 2) beside 2 runs" in checked(dict(two), (0, 1))
    assert "no extra run, 3 runs serve each other" in checked(dict(two), (0, 1, 2))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"on": {"references": 30}}, "30 references are few"),
        ({"on": {"references": 12}}, "refuses this: canaries.references = 12"),
        ({"on": {"repetitions": [64]}}, "training rows are canaries"),
        ({"on": {"count": 4, "repetitions": [1]}}, "4 canaries certify nothing"),
        ({"on": {"coin": False}}, "for exposure alone, no attack and no bound"),
        ({"audit": {"on": ["released"]}}, "needs audit.reference_models = 3"),
        ({"strategy": "local-only"}, "has no global network"),
        ({"audit": {"students": {"s": {"transfer": "public"}}}}, "needs a public pool"),
        ({"on": {"references": 9000}, "audit": {"reference_models": 9}}, "networks that hold"),
        (
            {"privacy": {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5}},
            "changes up to 2: group",
        ),
    ],
)
def test_what_makes_an_audit_weak_or_slow_is_warned_of(changes, words):
    assert words in checked(changes)
    assert words not in checked({})


def test_a_secret_that_the_text_holds_anyway_is_named():
    data = prepare(experiment({**TABLE, "compare": {}})).federation.dataset
    text = data.tokenizer.decode(data.train_x[:, 1:].ravel())
    # Two letters that follow an "e" somewhere, of all that there are: some secrets are natural.
    letters = "".join(sorted(set(text) & set("abcdefghijklmnopqrstuvwxyz")))
    said = checked({"on": {"pattern": "e{}{}", "alphabet": letters, "references": 100}})
    assert "occur in the training text anyway, as 'e" in said
    assert "occur in the training text" not in checked({})


def test_secrets_are_found_wherever_they_begin():
    secrets = ["aab", "aac", "abb"]
    assert occurring("xaaab", secrets) == ["aab"]
    assert occurring("xabbaac", ["aab", "aac", "abb"]) == ["aac", "abb"]
    assert occurring("ab", ["", "ab"]) == ["", "ab"]
    assert occurring("", ["ab"]) == []


def test_canary_clients_are_said_and_nothing_where_there_is_nothing():
    assert checked({"on": {"kind": "none"}}) == ""


def test_a_table_of_findings_fits_a_pipe():
    from fedkd.cli.screen import grid

    stream = io.StringIO()
    lines = findings(prepare(experiment({**TABLE, "compare": {}})))
    Console(file=stream, width=100).print(grid(lines))
    assert max(map(len, stream.getvalue().splitlines())) <= 100
