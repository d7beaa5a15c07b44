"""What each model of participation may claim: planned, spent, said, refused."""

import itertools
import json

import pytest

from fedkd.cli.privacy_check import expected_epsilon, findings, last_paid_round
from fedkd.clients.attendance import Attendance
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import prepare
from fedkd.engine.simulation import Run, run
from fedkd.errors import CheckpointError, ConfigError
from fedkd.options import build
from fedkd.privacy.accounting import History, epsilon
from fedkd.privacy.ledger import Claim, PrivacyLedger
from fedkd.privacy.options import Privacy
from fedkd.privacy.plan import make_plan, planned
from fedkd.privacy.population import Population

DELTA = 1e-3
CENTRAL = {"unit": "client", "noise_multiplier": 1.0, "delta": DELTA}
LOCAL = {**CENTRAL, "trust": "local"}
EXAMPLE = {**CENTRAL, "unit": "example"}
AVG = {"name": "fedavg", "weighting": "uniform"}
AT = "clients.participation."


def population(**changes):
    facts = {
        "scheme": "poisson",
        "ratio": 0.1,
        "rounds": 20,
        "examples": (50,) * 40,
        "turns": (2,) * 40,
        "fits": (((0.2, 5),),) * 40,
    }
    return Population(**{**facts, **changes})


def plan(options, **changes):
    return make_plan(build(Privacy, options), population(**changes))


REFUSED = {
    ("add-remove", "fixed"): "displaces another",
    ("add-remove", "cyclic"): "displaces another",
    ("replace-one", "poisson"): "accounted for adding or removing",
}
ADJACENT = ("add-remove", "zero-out", "replace-one")
SCHEMES = ("full", "fixed", "poisson", "cyclic")
AVAILABLE = ("always", "power-law", "label")


@pytest.mark.parametrize(
    ("adjacency", "scheme", "availability"),
    list(itertools.product(ADJACENT, SCHEMES, AVAILABLE)),
)
def test_every_combination_at_central_trust_is_claimed_or_refused(adjacency, scheme, availability):
    options = {**CENTRAL, "adjacency": adjacency}
    facts = {"scheme": scheme, "availability": availability}
    why = REFUSED.get((adjacency, scheme))
    if (scheme, availability) == ("poisson", "label"):
        why = None  # Nothing is amplified, so nothing rests on adding or removing.
    if (scheme, availability) == ("fixed", "label") and adjacency != "add-remove":
        why = "takes its place"
    if why is not None:
        with pytest.raises(ConfigError, match=why):
            plan(options, **facts)
        return
    made = plan(options, **facts)
    claim = made.claim()
    amplified = scheme == "poisson" and availability != "label"
    turns = scheme == "cyclic" and availability != "label"
    assert made.rate == (0.1 if amplified else 1.0)
    assert ("Poisson sampling of clients at rate 0.1" in claim.sampling) is amplified
    assert ("no amplification" in claim.sampling) is not amplified
    assert claim.turns is turns is ("its own turns" in claim.sampling)
    z = made.accounted(1.0)
    assert planned(made, 0, 1.0).events() == [(z, made.rate, 2 if turns else 20)]
    by_label = availability == "label"
    assert any("follows from the classes" in text for text in claim.not_covered) is by_label
    assert ("every client pays for every round" in claim.sampling) is by_label


def test_an_upper_bound_is_called_one():
    said = plan(CENTRAL, availability="power-law", presence=0.3).claim().sampling
    assert said == (
        "Poisson sampling of clients at rate 0.1, an upper bound: being away is independent of "
        "data, and not claimed"
    )
    assert plan(CENTRAL).claim().sampling == "Poisson sampling of clients at rate 0.1"
    lossy = plan(CENTRAL, lossy=True)
    assert lossy.rate == 0.1
    assert lossy.claim().sampling.endswith("at rate 0.1; lost uploads count as sent")
    late = plan(CENTRAL, lossy=True, deadline=True).claim()
    assert any("the deadline and who misses it" in text for text in late.not_covered)
    assert not any("deadline" in text for text in lossy.claim().not_covered)


@pytest.mark.parametrize("options", [LOCAL | {"adjacency": "zero-out"}, EXAMPLE])
def test_availability_by_label_needs_a_sum_that_hides_it(options):
    with pytest.raises(ConfigError, match=r"availability = 'label' with privacy .*'power-law'"):
        plan(options, scheme="full", availability="label")
    made = plan(options, scheme="cyclic", availability="power-law")
    assert made.rate == 1.0 and not made.claim().turns
    assert planned(made, 0, 1.0) == History([(z, q, 2 * n) for z, q, n in made.round_of(0)])


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"scheme": "full"}, 40),
        ({"scheme": "full", "presence": 0.25}, 10),
        ({"presence": 0.25}, 1),
        ({"scheme": "fixed"}, 4),
        ({"scheme": "fixed", "presence": 0.25}, 4),
        ({"scheme": "fixed", "presence": 0.05}, 2),
        ({"scheme": "cyclic", "presence": 0.5}, 2),
        ({"scheme": "cyclic"}, 4),
        ({"scheme": "cyclic", "availability": "label"}, 4),
        ({"lossy": True, "deadline": True}, 4),
    ],
)
def test_the_divisor_is_public(facts, expected):
    assert population(**facts).expected == pytest.approx(expected)


def test_cyclic_noise_is_calibrated_for_the_largest_number_of_turns():
    wanted = {"unit": "client", "epsilon": 2.0, "delta": DELTA, "adjacency": "zero-out"}
    turns = (2,) * 39 + (3,)
    cyclic = plan(wanted, scheme="cyclic", turns=turns)
    assert 1.9 < epsilon(History([(cyclic.noise_multiplier, 1.0, 3)]), DELTA) <= 2
    assert len(set(cyclic.noise)) == 1
    fixed = plan(wanted, scheme="fixed", turns=turns)
    assert 1.9 < epsilon(History([(fixed.noise_multiplier, 1.0, 20)]), DELTA) <= 2
    assert cyclic.noise_multiplier < fixed.noise_multiplier / 2
    given = {"unit": "client", "epsilon": 2.0, "noise_multiplier": cyclic.noise_multiplier}
    delta = plan({**given, "adjacency": "zero-out"}, scheme="cyclic", turns=turns).delta
    assert delta == pytest.approx(DELTA, rel=0.3) and delta <= DELTA
    twice = plan({**wanted, "adjacency": "replace-one"}, scheme="cyclic", turns=turns)
    assert twice.noise_multiplier == pytest.approx(2 * cyclic.noise_multiplier, rel=0.02)


def cyclic(tiny, changes=None):
    """Four clients, one a round for six rounds: two of them have two turns."""
    base = {
        "privacy": {**CENTRAL, "adjacency": "zero-out"},
        AT + "scheme": "cyclic",
        AT + "ratio": 0.25,
        "rounds": 6,
        "engine.checkpoint_every": 1,
    }
    return tiny(AVG, {**base, **(changes or {})})


def test_cyclic_runs_spend_what_is_planned(tiny, play, tmp_path):
    experiment = cyclic(tiny)
    done = play(experiment)
    guard, part = done.strategy.guard, done.prepared.attendance
    turns = part.turns(range(1, 7))
    assert sorted(turns) == [1, 1, 2, 2] == sorted(guard.plan.population.turns)
    each = {k: epsilon(History([(1.0, 1.0, n)]), DELTA) for k, n in enumerate(turns)}
    assert guard.ledger.client_epsilons() == each
    assert guard.ledger.epsilon() == max(each.values()) == expected_epsilon(guard.plan)
    report = json.loads((done.folder.path / "privacy.json").read_text())
    assert report["epsilon"] == max(each.values())
    assert report["global"] == {"history": [], "epsilon": None}
    assert report["claim"]["turns"] is True
    assert Claim(**report["claim"]).sentence(report["epsilon"]) == guard.sentence()
    series = done.log.series("epsilon", "privacy")
    assert series == {r["round"]: r["epsilon"] for r in report["rounds"]}
    assert series[1] == series[4] < series[5] == series[6] == max(each.values())


def test_cyclic_runs_resume_to_the_same_ledger(tiny, play, bits, values):
    changes = {AT + "dropout": 0.4}
    whole = play(cyclic(tiny, changes))
    part = play(cyclic(tiny, changes), rounds=3)
    resumed = Run(prepare(cyclic(tiny, changes)), RunFolder(part.folder.path))
    play(cyclic(tiny, changes), run=resumed)
    assert bits(resumed) == bits(whole) and values(resumed) == values(whole)
    ledger = resumed.strategy.guard.ledger
    assert ledger.state_dict() == whole.strategy.guard.ledger.state_dict()
    assert ledger.state_dict()["claim"]["turns"] is True


def test_a_ledger_of_turns_is_no_other_ledger():
    claim = Claim("client", "central", "zero-out", "by turns", DELTA, "rdp", turns=True)
    other = Claim("client", "central", "zero-out", "by turns", DELTA, "rdp")
    assert "turns" not in other.table() and claim.table()["turns"] is True
    kept = PrivacyLedger(claim)
    kept.spend_client(1, 3, [(1.0, 1.0, 1)])
    with pytest.raises(CheckpointError, match="turns"):
        PrivacyLedger(other).load_state_dict(kept.state_dict())
    again = PrivacyLedger(claim)
    again.load_state_dict(kept.state_dict())
    assert again.epsilon() == kept.epsilon() == epsilon(History([(1.0, 1.0, 1)]), DELTA)
    assert again.would_exceed(again.epsilon(), [], {3: [(1.0, 1.0, 1)]})
    assert not again.would_exceed(again.epsilon(), [], {2: [(1.0, 1.0, 1)]})


def test_a_budget_ends_a_cyclic_run_before_the_turn_it_does_not_pay(tiny, tmp_path):
    once = epsilon(History([(1.0, 1.0, 1)]), DELTA)
    experiment = cyclic(tiny, {"privacy.max_epsilon": once * 1.01})
    prepared = prepare(experiment)
    assert last_paid_round(prepared) == 4
    assert "before round 5 of 6" in dict(findings(prepared))["max_epsilon"]
    summary = run(experiment, tmp_path / "run")
    assert "stopped after round 4" in summary["stopped"]
    report = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert report["epsilon"] == once
    plenty = cyclic(tiny, {"privacy.max_epsilon": 100.0})
    assert last_paid_round(prepare(plenty)) == 6


def test_turns_are_paid_by_whoever_stays_away_or_is_lost(tiny, play):
    changes = {AT + "availability": "power-law", AT + "exponent": 2.0, AT + "dropout": 0.5}
    done = play(cyclic(tiny, changes))
    part, ledger = done.prepared.attendance, done.strategy.guard.ledger
    came = [k for t in range(1, 7) for k in part.cohort(t) if k not in part.lost(t)]
    assert len(came) < 6
    turns = part.turns(range(1, 7), scheduled=True)
    rows = ledger.state_dict()["clients"]
    assert {int(k): e for k, e in rows.items()} == {k: [[1.0, 1.0, n]] for k, n in enumerate(turns)}


def test_by_label_everybody_pays_for_every_round(tiny, play):
    changes = {
        "privacy": {**CENTRAL, "adjacency": "zero-out"},
        "rounds": 3,
        AT + "scheme": "cyclic",
        AT + "ratio": 0.5,
        AT + "availability": "label",
    }
    done = play(tiny(AVG, changes))
    ledger = done.strategy.guard.ledger
    cost = epsilon(History([(1.0, 1.0, 3)]), DELTA)
    assert ledger.epsilon() == cost == expected_epsilon(done.prepared.plan)
    assert ledger.client_epsilons() == dict.fromkeys(range(4), cost)
    assert ledger.state_dict()["history"] == [[1.0, 1.0, 3]]


def test_lost_uploads_are_silent_and_paid_for(tiny, play, monkeypatch):
    changes = {"privacy": CENTRAL, "rounds": 2, AT + "scheme": "poisson", AT + "ratio": 0.99}
    monkeypatch.setattr(Attendance, "lost", lambda self, round_: self.cohort(round_))
    done = play(tiny(AVG, changes))
    ledger, part = done.strategy.guard.ledger, done.prepared.attendance
    assert ledger.state_dict()["history"] == [[1.0, 0.99, 2]], "noise is released all the same"
    paid = {int(k): rows[0][2] for k, rows in ledger.state_dict()["clients"].items()}
    assert paid == {k: n for k, n in enumerate(part.turns([1, 2])) if n}
    first = play(tiny(AVG, changes), rounds=0)
    assert any((done.state[k] != first.state[k]).any() for k in done.state), "noise alone"
    monkeypatch.undo()
    monkeypatch.setattr(Attendance, "lossy", True)
    assert prepare(tiny(AVG, changes)).plan.expected() == 0.99 * 4


@pytest.mark.parametrize("options", [LOCAL | {"adjacency": "zero-out"}, EXAMPLE])
def test_a_client_whose_upload_is_lost_has_paid(options, tiny, play):
    changes = {"privacy": options, "rounds": 2, AT + "dropout": 1.0}
    done = play(tiny(AVG, changes))
    kept = play(tiny(AVG, {**changes, AT + "dropout": 0.0}))
    ledgers = [r.strategy.guard.ledger.state_dict()["clients"] for r in (done, kept)]
    assert ledgers[0] == ledgers[1] and len(ledgers[0]) == 4
    plan = done.prepared.plan
    assert done.strategy.guard.ledger.epsilon() == expected_epsilon(plan)
    assert "lost uploads count as sent" in plan.claim().sampling or options is EXAMPLE


def test_canary_clients_have_no_turns(tiny):
    canaries = {"canaries.random_clients": 4}
    with pytest.raises(ConfigError, match="for which no client of a cyclic schedule pays"):
        prepare(cyclic(tiny, canaries))
    fixed = {**canaries, AT + "scheme": "fixed"}
    assert prepare(cyclic(tiny, fixed)).plan.rate == 1.0


def test_the_doctor_says_what_a_cyclic_plan_claims(tiny):
    said = dict(findings(prepare(cyclic(tiny))))
    assert "public schedule" in said["sampling"]
    once, twice = (epsilon(History([(1.0, 1.0, n)]), DELTA) for n in (1, 2))
    assert expected_epsilon(prepare(cyclic(tiny)).plan) == twice > once
    fixed = prepare(cyclic(tiny, {AT + "scheme": "fixed"})).plan
    assert expected_epsilon(fixed) > twice
