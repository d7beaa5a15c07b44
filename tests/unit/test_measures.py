from types import SimpleNamespace

import numpy as np
import pytest

from fedkd.metrics import fairness
from fedkd.metrics.intervals import mean_t, paired_t
from fedkd.report import measures
from fedkd.report.collection import Collection, Group
from fedkd.report.curves import Curves
from fedkd.report.measures import Target

HALF = Target(0.5, "given")


def made(accuracy, rounds=None, bits=None, up=10.0):
    """Curves of a run that is judged in ``rounds`` and sends ``up`` bytes each way in each."""
    accuracy = np.asarray(accuracy, dtype=float)
    judged = np.arange(1, len(accuracy) + 1) if rounds is None else np.array(rounds)
    played = np.arange(1, judged[-1] + 1)
    clients = accuracy.shape[1]
    none = np.full(len(played), np.nan)
    nobody = np.zeros((len(played), clients), dtype=bool)
    return Curves(
        clients=clients,
        rounds=judged,
        accuracy=accuracy,
        bits=None if bits is None else np.asarray(bits, dtype=float),
        played=played,
        bytes_up=np.full(len(played), up),
        bytes_down=np.full(len(played), 2 * up),
        seconds=none,
        seconds_judging=none,
        took_part=nobody,
        lost=nobody,
        clock=none,
        examples=np.ones(clients),
    )


def group(runs, label="a", strategy="fedavg", data="same", last_k=1, point=None):
    """A group of one run for each seed -> curves."""
    evaluate = SimpleNamespace(evaluate=SimpleNamespace(last_k=last_k))
    views = [
        SimpleNamespace(
            seed=seed, curves=c, experiment=evaluate, data=data, summary={"strategy": strategy}
        )
        for seed, c in runs.items()
    ]
    return Group(label, point or {}, views)


THREE = group({s: made([[0.1, 0.3], [0.4 + s / 10, 0.8]]) for s in range(3)})


def test_user_accuracy_is_over_seeds_where_there_are_several():
    assert measures.user_accuracy(THREE) == mean_t([0.6, 0.65, 0.7])
    assert measures.user_accuracy(Group("none", {})) is None


def test_user_accuracy_of_one_seed_is_over_its_clients():
    found = measures.user_accuracy(group({4: made([[0.2, 0.4, 0.9, 0.5]])}))
    assert (found.value, found.n) == (0.5, 4)
    assert found.method == "BCa bootstrap 95% over clients"
    assert 0.2 < found.low < 0.5 < found.high < 0.9


def test_the_last_k_rounds_are_those_in_which_somebody_was_judged():
    nobody = [np.nan, np.nan]
    runs = {s: made([[0.0, 0.0], [0.2, 0.4], nobody, [0.6, np.nan]]) for s in (0, 1)}
    assert measures.user_accuracy(group(runs, last_k=2)).value == pytest.approx((0.3 + 0.6) / 2)


def test_fairness_is_the_mean_over_rounds_as_in_summaries():
    rows = np.array([[0.2, 0.8, 0.5], [0.4, 0.6, 0.5]])
    found = group({0: made(rows), 1: made(rows)}, last_k=2)
    for measure, of in (
        (measures.worst_share, fairness.worst_share),
        (measures.spread, fairness.std),
        (measures.jain, fairness.jain),
    ):
        assert measure(found).value == pytest.approx(np.mean([of(row) for row in rows]))
        assert measure(found).n == 2


def test_bits_are_only_of_text():
    assert measures.bits_per_character(THREE) is None
    text = {s: made([[0.5, 0.5]], bits=[[2.0, 3.0 + s]]) for s in (0, 1)}
    assert measures.bits_per_character(group(text)) == mean_t([2.5, 3.0])


def test_bytes_are_summed_over_rounds_by_direction():
    assert measures.bytes_up(THREE).value == 20
    assert measures.bytes_down(THREE).value == 40
    assert measures.bytes_total(THREE).value == 60


def test_rounds_and_bytes_to_a_target_are_of_the_first_judged_round_there():
    found = group({
        0: made([[0.2, 0.4], [0.5, 0.5], [0.1, 0.1]], rounds=[5, 10, 15]),
        1: made([[0.5, 0.7], [0.5, 0.5], [0.5, 0.5]], rounds=[5, 10, 15]),
        2: made([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]], rounds=[5, 10, 15]),
    })  # fmt: skip
    assert measures.reached(found, HALF) == (2, 3)
    rounds, sent = measures.rounds_to(found, HALF), measures.bytes_to(found, HALF)
    assert (rounds.value, rounds.n) == (7.5, 2)
    assert sent.value == (10 + 5) / 2 * 30
    assert rounds.method.endswith(measures.REACHED)


def test_a_target_that_nobody_reaches_has_no_rounds():
    high = Target(0.99, "given")
    assert measures.rounds_to(THREE, high) is None
    assert measures.bytes_to(THREE, high) is None
    assert measures.reached(THREE, high) == (0, 3)


def test_who_sends_nothing_reaches_a_target_for_nothing():
    found = group({0: made([[0.9, 0.9]], up=0.0)})
    assert measures.bytes_to(found, HALF).value == 0
    assert measures.rounds_to(found, HALF).value == 1


def test_rounding_keeps_no_one_from_a_target():
    third = group({0: made([[0.1, 0.2, 0.6, 0.1, 0.2, 0.6]])})
    assert measures.reached(third, Target(0.3, "")) == (1, 1)


def collection(*groups):
    labels = tuple(dict.fromkeys(g.label for g in groups))
    return Collection("c", (), {}, labels, list(groups))


def test_the_target_is_what_a_client_reaches_alone():
    alone = group({0: made([[0.633, 0.633]])}, "alone", "local-only", point={"r": 1})
    weaker = group({0: made([[0.2, 0.2]])}, "alone", "local-only", point={"r": 0.1})
    better = group({0: made([[0.9, 0.9]])}, "a")
    found = measures.default_target(collection(weaker, alone, better))
    assert found.accuracy == 0.63 and "local-only" in found.origin
    assert str(found) == "63 %"
    assert measures.reached(alone, found) == (1, 1)


def test_without_local_only_the_target_is_a_share_of_the_best():
    found = measures.default_target(collection(group({0: made([[0.9, 0.9]])}), THREE))
    assert found.accuracy == 0.81 and "90 %" in found.origin
    tiny = measures.default_target(collection(group({0: made([[0.004, 0.004]])})))
    assert tiny.accuracy == pytest.approx(0.0036)
    assert measures.default_target(collection(Group("a", {}))).accuracy == 0


def pair(shift, seeds=(0, 1, 2), data="same"):
    """Clients that differ much, and ``shift`` that differs little."""
    hard = np.array([[0.1, 0.5, 0.9, 0.4]])
    return group({s: made(hard + shift + 0.001 * s) for s in seeds}, data=data)


def test_differences_are_paired_by_seed_and_client():
    found = measures.difference(pair(0.05), pair(0.0))
    assert (found.value, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05))
    assert found.n == 3 and "seeds and clients" in found.method
    student = measures.difference_t(pair(0.05), pair(0.0))
    assert student.method == paired_t([1, 2], [1, 1]).method
    assert student.value == pytest.approx(0.05)


def test_only_common_seeds_count():
    one, other = pair(0.05, (0, 1, 2)), pair(0.0, (2, 3))
    assert measures.difference(one, other).n == 4
    assert "one seed" in measures.difference(one, other).method
    assert measures.difference_t(one, other) is None
    assert measures.difference(one, pair(0.0, (7,))) is None


def test_what_has_other_data_or_other_clients_is_not_paired():
    assert measures.difference(pair(0.05), pair(0.0, data="other")) is None
    assert measures.difference_t(pair(0.05), pair(0.0, data="other")) is None
    fewer = group({s: made([[0.1, 0.2]]) for s in range(3)})
    assert not measures.comparable(pair(0.05), fewer)


def test_a_tie_is_a_paired_interval_with_zero_in_it():
    best = pair(0.05)
    noisy = group({s: made([[0.15, 0.55, 0.95, 0.45 + d]]) for s, d in enumerate((-0.1, 0.1, 0))})
    assert measures.tied(best, best)
    assert measures.tied(noisy, best)
    assert not measures.tied(pair(0.0), best)
    assert not measures.tied(pair(0.05, data="other"), best)
