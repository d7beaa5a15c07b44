import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.config import experiment
from fedkd.engine.rhythm import TRAINED, Rhythm, rhythm, rhythm_of, trained_examples
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.metrics.options import Evaluate


def judged(rhythm: Rhythm) -> list[int]:
    return [t for t in range(1, rhythm.rounds + 1) if t in rhythm or rhythm.everywhere(t)]


def share(rhythm: Rhythm, trained: float, each: float) -> float:
    work = len(judged(rhythm)) * each
    return work / (work + TRAINED * trained * rhythm.rounds)


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_what_is_asked_for_is_judged_where_it_costs_little(every):
    found = judged(rhythm(Evaluate(every=every), 20, trained=1000, judged=100))
    assert found == sorted({*range(every, 21, every), 20})


@given(
    every=st.integers(1, 5),
    last_k=st.integers(1, 8),
    rounds=st.integers(1, 300),
    trained=st.floats(0, 1e4),
    each=st.floats(1, 1e5),
)
def test_the_last_k_are_those_of_judging_as_often_as_asked(every, last_k, rounds, trained, each):
    options = Evaluate(every=every, last_k=last_k)
    asked = judged(rhythm(Evaluate(every=every, last_k=last_k, share=1), rounds, trained, each))
    found = judged(rhythm(options, rounds, trained, each))
    assert found[-last_k:] == asked[-last_k:]
    assert set(found) <= set(asked)


def test_a_long_run_keeps_to_the_share_and_uses_it():
    found = rhythm(Evaluate(), 400, trained=5400, judged=16000)
    assert 0.12 < share(found, 5400, 16000) <= 0.15
    gaps = {b - a for a, b in zip(judged(found), judged(found)[1:], strict=False)}
    assert gaps <= {found.coarse, *range(1, found.coarse)}
    twice = rhythm(Evaluate(share=0.3), 400, trained=5400, judged=16000)
    assert 0.25 < share(twice, 5400, 16000) <= 0.3


def test_a_short_run_has_its_end_and_a_curve():
    found = judged(rhythm(Evaluate(), 20, trained=5400, judged=16000))
    assert found[-5:] == [16, 17, 18, 19, 20]
    assert found[0] < 10


def test_rounds_of_the_global_test_are_judged_anyway():
    options = Evaluate(global_every=10)
    found = rhythm(options, 100, trained=1, judged=1e6)
    assert set(range(10, 101, 10)) <= set(judged(found))
    assert found.everywhere(100) and found.everywhere(10) and not found.everywhere(99)


def test_nobody_trains_or_nobody_is_judged():
    assert judged(rhythm(Evaluate(last_k=2), 9, trained=0, judged=10)) == [8, 9]
    assert len(judged(rhythm(Evaluate(), 9, trained=0, judged=0))) == 9


def test_the_count_is_of_who_takes_part_and_how_long():
    def clients(**table):
        return experiment({"clients": {"count": 10, **table}}).clients

    assert trained_examples(clients(), 500) == 500
    assert trained_examples(clients(participation={"ratio": 0.1}), 500) == pytest.approx(50)
    full = {"ratio": 0.1, "scheme": "full"}
    assert trained_examples(clients(participation=full, training={"epochs": 3}), 500) == 1500
    assert trained_examples(clients(training={"steps": 5, "batch_size": 8}), 500) == 400


def test_it_follows_from_numbers_that_no_seed_changes():
    def made(seed, ratio):
        table = {"seed": seed, "rounds": 60, "strategy": "fedavg", "model": "mlp"}
        table["clients"] = {"count": 20, "participation": {"ratio": ratio}}
        return rhythm_of(prepare(experiment(table)))

    rare = [made(seed, 0.1) for seed in range(3)]
    assert rare[0] == rare[1] == rare[2]
    assert rare[0].coarse > 1
    assert made(0, 1.0).coarse == 1


def test_the_usual_share_is_in_no_digest_and_another_is():
    plain = experiment({})
    assert plain.evaluate.share == 0.15
    assert "share" not in plain.evaluate.identity()
    assert plain.digest() == experiment({"evaluate": {"share": 0.15}}).digest()
    assert plain.digest() != experiment({"evaluate": {"share": 1}}).digest()
    with pytest.raises(ConfigError, match="share"):
        experiment({"evaluate": {"share": 0}})
