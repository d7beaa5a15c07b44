"""Passes, ratios, results: what is dropped, what is compared, what is refused."""

import json
import math
from dataclasses import dataclass, field
from itertools import count

import pytest

from fedkd.bench.compare import changes
from fedkd.bench.compare import markdown as compared
from fedkd.bench.goals import GOALS, Goal, measured
from fedkd.bench.passes import measure
from fedkd.bench.plot import draw
from fedkd.bench.readings import Load, Machine, Reading
from fedkd.bench.results import Entry, Outcome, Result, ratio, read
from fedkd.bench.tables import markdown
from fedkd.errors import ConfigError, RunError


@dataclass
class Clock:
    """A contender whose samples take what they are told to."""

    label: str
    seconds: list
    order: list = field(default_factory=list)
    pid: int = 1

    def sample(self, pass_):
        self.order.append(self.label)
        taken = self.seconds.pop(0)
        if taken is None:
            raise RunError("it fell over")
        return taken


class Counters:
    """Readings whose foreign shares are given, sample after sample."""

    def __init__(self, foreign):
        self.foreign = list(foreign)

    def read(self, pid):
        return Reading(0.0, 0.0, 0.0, 0.0)

    def load(self, before, after):
        return Load(1.0, self.foreign.pop(0), 0.0)


def test_contenders_alternate_and_each_has_one_sample_a_pass():
    order = []
    ours, other = Clock("ours", [1.0, 3.0], order), Clock("other", [2.0, 2.0], order)
    found = measure([ours, other], 2, Counters([0.0] * 4))
    assert order == ["ours", "other", "ours", "other"]
    assert found["ours"].seconds == [1.0, 3.0] and not found["ours"].dropped
    assert str(ratio(found["ours"].seconds, found["other"].seconds)) == "1 (0.5 to 1.5, n=2)"


def test_a_sample_under_load_is_dropped_and_taken_again():
    waited = []
    clock = Clock("a", [9.0, 1.0, 1.0, 1.0])
    found = measure([clock], 3, Counters([0.5, 0.05, 0.0, 0.1]), pause=waited.append)["a"]
    assert found.seconds == [1.0, 1.0, 1.0] and len(waited) == 1
    assert (found.attempts, found.dropped, found.noisy) == (4, 1, False)


def test_a_pass_without_a_quiet_sample_is_left_out_of_ratios():
    shares = [0.2, 0.3, 0.0, 0.0, 0.0]
    found = measure(
        [Clock("a", [9.0, 9.0, 2.0, 1.0, 1.0])], 4, Counters(shares), tries=2, pause=lambda s: None
    )["a"]
    assert found.seconds == [None, 2.0, 1.0, 1.0] and not found.noisy
    assert ratio(found.seconds, [1.0] * 4).n == 3


def test_where_most_samples_are_under_load_the_figures_are_called_noisy():
    shares = [0.3, 0.2, 0.4, 0.9, 0.0]
    found = measure(
        [Clock("a", [3.0, 2.0, 4.0, 9.0, 1.0])], 3, Counters(shares), tries=2, pause=lambda s: None
    )["a"]
    assert found.noisy and (found.attempts, found.dropped) == (5, 4)
    assert found.seconds == [2.0, 4.0, 1.0], "the quietest of each pass"


def test_who_falls_over_in_a_pass_is_out_and_the_others_go_on():
    found = measure([Clock("a", [1.0, None]), Clock("b", [1.0] * 3)], 3, Counters([0.0] * 9))
    assert found["a"].problem == "it fell over" and len(found["b"].seconds) == 3


def test_a_system_without_counters_drops_nothing(tmp_path):
    machine = Machine(tmp_path)
    assert machine.read(1) is None
    assert measure([Clock("a", [1.0])], 1, machine)["a"].seconds == [1.0]
    with machine.peak(1) as most:
        pass
    assert most == [0.0]


def stat(folder, pid, parent, ticks, name="x"):
    (folder / str(pid)).mkdir(exist_ok=True)
    fields = ["S", str(parent), *["0"] * 9, *map(str, ticks), *["0"] * 5]
    (folder / str(pid) / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")


def test_foreign_load_is_what_our_process_tree_did_not_use(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    monkeypatch.setattr("fedkd.bench.readings._allowed", lambda: frozenset({0, 1}))
    now = count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    stat(tmp_path, "self", 1, [0, 0, 0, 0])

    def state(busy, steal, own):
        cpu = [f"cpu{i} {busy} 0 0 900 7 0 0 {steal} 0 0" for i in range(3)]
        (tmp_path / "stat").write_text("\n".join(["cpu 1 1 1 1", *cpu, "intr 5"]) + "\n")
        stat(tmp_path, 10, 1, [own, 0, 0, 0])
        stat(tmp_path, 11, 10, [own, own, 0, 0], "a (b) c")
        stat(tmp_path, 12, 1, [7 * own, 0, 0, 0])

    state(100, 0, 0)
    machine = Machine(tmp_path)
    before = machine.read(10)
    state(160, 5, 20)
    load = machine.load(before, machine.read(10))
    assert sorted(machine.tree(10)) == [10, 11]
    # 2 cores for 1 s: busy 1.2 s, own 0.6 s, stolen 0.1 s; the third core is not ours.
    assert load.cores == pytest.approx(0.6) and load.foreign == pytest.approx(0.3)
    assert load.steal == pytest.approx(0.05) and load.total == pytest.approx(0.35)


def test_memory_is_summed_over_the_process_tree(tmp_path):
    stat(tmp_path, "self", 1, [0] * 4)
    (tmp_path / "stat").write_text("cpu0 0 0 0 0 0 0 0 0\n")
    for pid, parent, kib in ((10, 1, 2048), (11, 10, 1024), (12, 1, 4096)):
        stat(tmp_path, pid, parent, [0] * 4)
        (tmp_path / str(pid) / "smaps_rollup").write_text(f"Rss: 9 kB\nPss: {kib} kB\nPss_Anon: 9")
    machine = Machine(tmp_path)
    assert machine.pss(10) == 3.0
    with machine.peak(10, every=0.001) as most:
        while not most[0]:
            pass
    assert most == [3.0]


def outcome(name="mlp K=10", hash_="a" * 16, **seconds):
    facts = {"hash": hash_, "source": "fashion-mnist", "clients": 100, "k": 10, "samples": [5, 6]}
    facts |= {"parameters": 50890, "batch_size": 32, "kind": "mlp"}
    entries = [Entry(label, label, seconds=list(values)) for label, values in seconds.items()]
    return Outcome(name, "round", "bare", facts, entries)


def result(*outcomes):
    made = Result(
        {"cpu": "some", "cores": 2, "ram_gib": 24, "flags": ["avx2"]},
        {"python": "3.11", "commit": "c" * 40},
        2,
        list(outcomes),
    )
    made.goals = measured(made)
    return made


def test_a_result_is_read_back_as_it_was_written(tmp_path):
    one = outcome(bare=[1.0, 2.0], serial=[1.0, None])
    one.entries.append(Entry("odd", status="wrong", problem="far away", apart_fp64=math.inf))
    file = tmp_path / "bench.json"
    file.write_text(result(one).text())
    back = read(file)
    assert back.outcomes[0].ratio("serial") == one.ratio("serial")
    assert [e.label for e in back.wrong] == ["odd"] and back.outcomes[0].entry("odd").problem
    assert json.loads(file.read_text())["outcomes"][0]["entries"][1]["ratio"]["n"] == 1
    assert back.text() == read(file).text()


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"schema": 1, "outcomes": [{}]}'])
def test_what_is_no_result_is_refused(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        read(file)
    with pytest.raises(ConfigError, match="there is no file"):
        read(tmp_path / "none.json")


def test_two_results_of_one_work_are_compared_by_ratios():
    before = result(outcome(bare=[1.0, 1.0], auto=[0.5, 0.6], serial=[1.0, 1.2]))
    after = result(outcome(bare=[3.0, 3.0], auto=[0.9, 1.2], serial=[3.3, 3.3]))
    found = {c.label: c for c in changes(before, after)}
    assert set(found) == {"auto", "serial"}
    assert found["auto"].factor == pytest.approx(0.35 / 0.55) and found["auto"].clear
    assert not found["serial"].clear
    assert "| faster |" in compared(list(found.values()))


def test_results_of_other_work_are_not_compared():
    before, after = (result(outcome(hash_=h * 16, bare=[1.0], auto=[1.0])) for h in "ab")
    with pytest.raises(ConfigError, match="cannot be compared"):
        changes(before, after)
    other = result(outcome("cnn K=10", bare=[1.0], auto=[1.0]))
    with pytest.raises(ConfigError, match="in common"):
        changes(before, other)
    moved = result(outcome(bare=[1.0], auto=[1.0]))
    moved.outcomes[0].reference = "auto"
    with pytest.raises(ConfigError, match="same reference"):
        changes(before, moved)


def goal(found, name):
    return next(g for g in found.goals if g["id"] == name)


def test_goals_take_the_best_of_ours_and_of_the_others():
    seconds = {"bare": [1.0, 1.0], "bare:2": [0.8, 0.8], "auto": [0.3, 0.3], "cohort": [0.1, 0.3]}
    found = result(outcome(**seconds, serial=[1.2, 1.2], **{"flower-ray": [5.0, 5.0]}))
    assert goal(found, "mlp-10")["by"] == ["cohort", "bare:2"]
    assert goal(found, "mlp-10")["measured"]["median"] == pytest.approx(0.25)
    assert goal(found, "mlp-10")["passed"] is False, "0.25 is above 0.24"
    assert goal(found, "ray-mlp")["passed"] is True
    assert goal(found, "serial-mlp")["passed"] is False
    assert goal(found, "pfl-mlp")["measured"] is None and goal(found, "pfl-mlp")["passed"] is None


def test_no_goal_is_judged_by_what_was_measured_under_load():
    one = outcome(bare=[1.0], serial=[1.0])
    assert goal(result(one), "serial-mlp")["passed"] is True
    one.entry("bare").status = "noisy"
    found = goal(result(one), "serial-mlp")
    assert found["measured"]["median"] == 1 and found["noisy"] and found["passed"] is None
    assert "| not judged |" in markdown(result(one))


def test_a_small_work_for_trying_says_nothing_about_goals():
    small = outcome(bare=[1.0], serial=[1.0])
    small.facts["clients"] = 8
    assert goal(result(small), "serial-mlp")["measured"] is None
    entries = [Entry("plain", seconds=[1.0]), Entry("ours", seconds=[1.0])]
    for source, known in (("digits", None), ("fashion-mnist", {"median": 1.0})):
        step = Outcome("dp-step-cnn", "step", "plain", {"source": source}, entries)
        found = goal(result(step), "dp-cnn")["measured"]
        assert (found and found["median"]) == (known and known["median"])


def test_goals_of_memory_seconds_and_values():
    one = outcome("cnn K=10", auto=[1.0], **{"flower-ray": [1.0]})
    for entry, peak in zip(one.entries, (600.0, 1800.0), strict=True):
        entry.peak_mib = peak
    idle = Outcome("idle", "client", "", {}, [Entry("idle client")])
    idle.entries[0].values = {"bytes / its list of indices": 1.05}
    waits = Outcome("start-up", "command", "", {}, [Entry("fedkd --help", seconds=[0.5, 0.3, 0.5])])
    found = result(one, idle, waits)
    assert goal(found, "memory-ray")["measured"]["median"] == pytest.approx(1 / 3)
    assert goal(found, "idle")["passed"] is True
    assert goal(found, "help") | {"measured": 0.5, "passed": False} == goal(found, "help") | {
        "measured": goal(found, "help")["measured"]["median"],
        "passed": goal(found, "help")["passed"],
    }


def test_every_goal_names_what_exists():
    from fedkd.bench.run import BLOCK, everybody, works

    kinds = {*BLOCK, "whole", *works()}
    for each in GOALS:
        assert isinstance(each, Goal) and each.work.split()[0] in kinds, each.id
        if each.work.split()[0] in BLOCK:
            for pattern in (*each.ours, *each.others):
                assert any(n.startswith(pattern.rstrip("*")) for n in everybody()), pattern
    assert len({each.id for each in GOALS}) == len(GOALS)


def test_tables_and_figure_show_what_was_found_and_no_more(tmp_path):
    made = outcome(bare=[1.0, 1.0], auto=[0.3, 0.4])
    made.entry("auto").status = "noisy"
    made.entries.append(Entry("pfl", external=True, status="skipped", problem="not installed"))
    found = result(made)
    text = markdown(found)
    assert "0.35 (0.3 to 0.4, n=2)" in text and "| noisy |" in text
    assert "skipped: not installed" in text and "start-up s" not in text
    assert draw(found, tmp_path / "bench")
    assert {f.suffix for f in tmp_path.iterdir()} == {".png", ".svg", ".pdf"}
    assert "auto" in (tmp_path / "bench.svg").read_text(encoding="utf-8")
    assert not draw(result(outcome(bare=[1.0])), tmp_path / "none")
