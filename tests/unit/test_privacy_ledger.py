"""The ledger: two observers, a column by round, kill and resume, and what a claim says."""

import json
import math

import pytest

from fedkd.errors import CheckpointError, RunError
from fedkd.privacy.accounting import History, epsilon
from fedkd.privacy.ledger import Claim, PrivacyLedger, rounded_up

DELTA = 1e-5


def claim(unit: str = "client", trust: str = "central", **changes) -> Claim:
    values = {
        "adjacency": "add-remove",
        "sampling": "Poisson sampling at rate 0.1",
        "delta": DELTA,
        "accountant": "rdp",
    }
    return Claim(unit, trust, **{**values, **changes})


def played(ledger: PrivacyLedger, first: int = 1, last: int = 4) -> PrivacyLedger:
    for round_ in range(first, last + 1):
        ledger.spend(round_, 1.0, 0.1)
        for client in (0, 1) if round_ % 2 else (1, 2):
            ledger.spend_client(round_, client, [(1.0, 1.0, 1)])
    return ledger


def test_the_claim_of_central_noise_is_the_amplified_history():
    ledger = played(PrivacyLedger(claim()))
    assert ledger.epsilon() == epsilon(History([(1.0, 0.1, 4)]), DELTA)
    each = ledger.client_epsilons()
    assert each[1] == epsilon(History([(1.0, 1.0, 4)]), DELTA) > each[0] == each[2]
    assert each[0] == epsilon(History([(1.0, 1.0, 2)]), DELTA) > ledger.epsilon()


@pytest.mark.parametrize(("unit", "trust"), [("client", "local"), ("example", "central")])
def test_otherwise_the_claim_is_the_client_that_paid_most(unit, trust):
    ledger = PrivacyLedger(claim(unit, trust))
    assert ledger.epsilon() == 0.0
    ledger.spend_client(1, 0, [(1.0, 0.2, 10)])
    ledger.spend_client(1, 1, [(1.0, 0.3, 10), (5.0, 1.0, 1)])
    assert ledger.epsilon() == max(ledger.client_epsilons().values())
    assert ledger.client_epsilons()[1] > ledger.client_epsilons()[0]
    before = ledger.epsilon()
    ledger.spend(2, 3.0, 1.0)
    # A release about everybody is paid by everybody, never lost.
    expected = History([(1.0, 0.3, 10), (5.0, 1.0, 1), (3.0, 1.0, 1)])
    assert ledger.epsilon() == epsilon(expected, DELTA) > before


def test_a_budget_is_asked_before_it_is_spent():
    ledger = played(PrivacyLedger(claim()))
    state = ledger.state_dict()
    after = epsilon(History([(1.0, 0.1, 5)]), DELTA)
    assert not ledger.would_exceed(after, [(1.0, 0.1, 1)])
    assert ledger.would_exceed(math.nextafter(after, 0), [(1.0, 0.1, 1)])
    assert ledger.state_dict() == state
    local = played(PrivacyLedger(claim(trust="local", sampling="no amplification")), last=0)
    assert not local.would_exceed(5.0, [], {0: [(1.0, 1.0, 1)]})
    assert local.would_exceed(4.0, [], {0: [(1.0, 1.0, 1)]})
    assert local.client_epsilons() == {}


def test_the_column_holds_epsilon_after_every_round():
    ledger = PrivacyLedger(claim())
    for round_ in (1, 2, 5):
        ledger.spend(round_, 1.0, 0.1)
        ledger.spend_client(round_, 7, [(1.0, 1.0, 1)])
    column = ledger.column()
    assert [row["round"] for row in column] == [1, 2, 5]
    for k, row in enumerate(column, start=1):
        assert row["epsilon"] == epsilon(History([(1.0, 0.1, k)]), DELTA)
        assert row["largest_client"] == epsilon(History([(1.0, 1.0, k)]), DELTA)
    # Reading it in the middle of a round does not freeze the round.
    ledger.spend(5, 1.0, 0.1)
    assert ledger.column()[-1]["epsilon"] == epsilon(History([(1.0, 0.1, 4)]), DELTA)
    with pytest.raises(RunError, match="round 4 cannot be counted"):
        ledger.spend(4, 1.0, 0.1)


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed():
    whole = played(PrivacyLedger(claim()), last=6)
    saved = json.loads(json.dumps(played(PrivacyLedger(claim()), last=3).state_dict()))
    resumed = PrivacyLedger(claim())
    resumed.load_state_dict(saved)
    played(resumed, first=4, last=6)
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.report() == whole.report()


def test_a_state_shares_nothing_with_the_ledger():
    first = played(PrivacyLedger(claim()))
    state = first.state_dict()
    second = PrivacyLedger(claim())
    second.load_state_dict(state)
    played(second, first=5, last=5)
    assert state == first.state_dict() != second.state_dict()
    state["history"][0][2] = state["clients"]["0"][0][2] = 999
    state["column"].clear()
    assert first.state_dict() == played(PrivacyLedger(claim())).state_dict()


def test_infinity_survives_json_that_every_reader_accepts():
    ledger = PrivacyLedger(claim(trust="local"))
    ledger.spend_client(1, 0, [(0.0, 1.0, 1)])
    ledger.spend_client(1, 1, [(math.inf, 1.0, 1)])
    text = json.dumps(ledger.state_dict(), allow_nan=False)
    again = PrivacyLedger(claim(trust="local"))
    again.load_state_dict(json.loads(text))
    assert (
        again.client_epsilons() == {0: math.inf, 1: 0.0}
        and again.column()[0]["epsilon"] == math.inf
    )
    report = json.loads(json.dumps(ledger.report(), allow_nan=False))
    assert report["epsilon"] == "inf" and "epsilon = inf for each client" in report["sentence"]
    assert report["global"] == {"history": [], "epsilon": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("history", [[1.0, 0.1]]),
        ("history", [[-1.0, 0.1, 3]]),
        ("history", [[1.0, 0.1, 2.5]]),
        ("history", [["nan", 0.1, 1]]),
        ("history", None),
        ("clients", {"zero": []}),
        ("clients", [1]),
        ("column", [{"round": 1}]),
        ("column", [{"round": 1, "epsilon": -1.0, "largest_client": 0.0}]),
        ("claim", None),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(key, value):
    ledger = played(PrivacyLedger(claim()))
    before = ledger.state_dict()
    with pytest.raises(CheckpointError, match="privacy ledger cannot be read"):
        ledger.load_state_dict({**before, key: value})
    with pytest.raises(CheckpointError):
        ledger.load_state_dict({k: v for k, v in before.items() if k != key})
    assert ledger.state_dict() == before


@pytest.mark.parametrize(
    "other",
    [claim("example"), claim(trust="local"), claim(adjacency="replace-one"), claim(delta=1e-6)],
)
def test_a_ledger_of_another_claim_is_refused(other):
    with pytest.raises(CheckpointError, match="was kept for"):
        PrivacyLedger(other).load_state_dict(PrivacyLedger(claim()).state_dict())


def test_a_report_says_everything_an_epsilon_needs():
    ledger = played(PrivacyLedger(claim(not_covered=("test metrics", "choice of clients"))))
    report = ledger.report()
    assert report == json.loads(json.dumps(report, allow_nan=False))
    assert report["global"]["history"] == [[1.0, 0.1, 4]]
    assert report["global"]["epsilon"] == report["epsilon"] == ledger.epsilon()
    assert report["clients"]["1"]["history"] == [[1.0, 1.0, 4]]
    assert report["clients"]["1"]["epsilon"] == ledger.client_epsilons()[1]
    assert len(report["rounds"]) == 4
    for word in ("add-remove", "Poisson", "1e-05", "rdp", "not covered: test metrics, choice"):
        assert word in report["sentence"]


def test_where_nothing_is_claimed_no_epsilon_is_printed():
    ledger = PrivacyLedger(claim("none"))
    ledger.spend(1, 1.0, 0.1)
    assert ledger.epsilon() == math.inf and ledger.would_exceed(1e9, [])
    assert ledger.report()["epsilon"] is None
    assert ledger.report()["sentence"].startswith("no epsilon: nothing is claimed")


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.10291, 3.4999, 7.0, 99.95, 123456.7])
def test_a_printed_epsilon_never_understates(value):
    assert value <= float(rounded_up(value)) <= value * 1.01
