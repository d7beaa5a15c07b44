"""Client-level privacy: how much noise there is, on what, and the edges of a cohort."""

import math

import numpy as np
import pytest
from scipy import stats

from fedkd.errors import ConfigError, RunError
from fedkd.privacy import client_level
from fedkd.privacy.accounting import joint
from fedkd.privacy.client_level import ClientLevel
from fedkd.privacy.options import Clipping, Privacy, Release
from fedkd.privacy.payload import Histogram, Weights
from fedkd.privacy.weights import weights_coder
from fedkd.rng import stream
from fedkd.strategies.averaging import average

ROUND = stream(7, "privacy", 1)
WIDE = (Weights({"model/w": np.zeros(20_000)}),)


def level(noise=1.0, share=0.5, trust="central", adjacency="add-remove", **clipping):
    options = Privacy(
        unit="client",
        trust=trust,
        adjacency=adjacency,
        clipping=Clipping(**clipping),
        release=Release(share=share),
    )
    return ClientLevel(options, noise)


def reference():
    return {
        "model/b": np.linspace(-1, 1, 4, dtype=np.float32).reshape(2, 2),
        "model/a": np.float32([0.5, -0.5, 2]),
        "model/steps": np.int64(40).reshape(()),
    }


def clients(n, scale=1.0):
    generator = stream(3, "clients").numpy()
    return [
        {k: (v + scale * generator.normal(size=v.shape)).astype(v.dtype) for k, v in start.items()}
        for start in [reference()] * n
    ]


def assert_scale(sample, std):
    """Hold a normal sample to its standard deviation, mean and shape, each at level 1e-4."""
    n = sample.size
    low, high = stats.chi2.ppf([5e-5, 1 - 5e-5], n)
    assert low <= float(np.sum(sample**2)) / std**2 <= high
    assert abs(sample.mean()) < 4 * std / math.sqrt(n)
    assert stats.kstest(sample / std, "norm").pvalue > 1e-4


# The noise.


@pytest.mark.parametrize("mode", ["flat", "per-layer"])
def test_the_noise_on_the_sum_is_z_times_the_norm_and_is_divided_by_the_expected_cohort(mode):
    made = level(1.5, mode=mode, norm=2.0).release([], WIDE, 7.0, 2.0, ROUND)
    assert_scale(made.arrays["model/w"] * 7.0, 3.0)
    assert made.multiplier == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize("many", [0, 1, 30])
def test_the_noise_does_not_depend_on_who_came(many):
    uploads = [{"model/w": np.full(20_000, 0.01)}] * many
    made = level(1.0).release(uploads, WIDE, 10.0, 1.0, ROUND).arrays["model/w"]
    signal = many * 1.0 / math.sqrt(20_000) / 10.0
    assert_scale((made - signal) * 10, 1.0)


def test_the_noise_is_fresh_every_round_and_the_same_for_the_same_address():
    def release(rng):
        return level(1.0).release([], WIDE, 1.0, 1.0, rng).arrays["model/w"]

    first, second = release(ROUND), release(stream(7, "privacy", 2))
    assert first.tobytes() == release(ROUND).tobytes()
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(first.size)
    assert_scale(first - second, math.sqrt(2))


def test_clients_of_an_untrusting_federation_each_add_their_own_noise():
    plan = level(2.0, trust="local", adjacency="zero-out")
    start, n = {"model/w": np.ones(20_000)}, 3
    sent = [
        plan.privatise(start, WIDE, 0.5, stream(7, "privacy", 1, k))["model/w"] for k in range(n)
    ]
    signal = 0.5 / math.sqrt(20_000)
    for one in sent:
        assert_scale(one - signal, 1.0)
    for k in range(1, n):
        assert abs(np.corrcoef(sent[0], sent[k])[0, 1]) < 4 / math.sqrt(20_000)


def test_noise_without_a_bound_is_refused():
    for call in (
        lambda plan: plan.release([], WIDE, 1.0, math.inf, ROUND),
        lambda plan: plan.multipliers(WIDE, 1.0),
        lambda plan: plan.worst(WIDE),
    ):
        with pytest.raises(ConfigError, match=r"norm = inf bounds nothing"):
            call(level(1.0, norm=math.inf))
    with pytest.raises(ConfigError, match=r"norm = inf bounds nothing"):
        level(1.0).release([], WIDE, 1.0, math.inf, ROUND)


@pytest.mark.parametrize("noise", [-1.0, math.inf, math.nan])
def test_a_noise_multiplier_that_is_none_is_refused(noise):
    with pytest.raises(ConfigError, match="noise multiplier"):
        level(noise)


# The sum.


def test_the_divisor_is_the_expected_cohort_not_the_one_that_came():
    payload = (Weights(reference()),)
    one = clients(1, 0.01)
    made = level(0.0, norm=100.0).release(one, payload, 4.0, 100.0, ROUND).arrays
    for key in ("model/a", "model/b"):
        want = reference()[key] + (one[0][key].astype(float) - reference()[key]) / 4
        np.testing.assert_allclose(made[key], want, rtol=1e-6)


def test_fewer_than_one_client_may_be_expected_but_not_none():
    start, payload = {"model/w": np.array([0.25])}, (Weights({"model/w": np.zeros(1)}),)
    made = level(0.0).release([start], payload, 0.5, 1.0, ROUND).arrays
    assert made["model/w"].tolist() == [0.5]
    with pytest.raises(ConfigError, match="takes more than 0"):
        level(0.0).release([start], payload, 0.0, 1.0, ROUND)


def test_an_empty_cohort_without_noise_changes_nothing():
    for norm in (1.0, math.inf):
        plan = level(0.0, norm=norm)
        made = plan.release([], (Weights(reference()),), 4.0, norm, ROUND).arrays
        assert {k: v.tobytes() for k, v in made.items()} == {
            k: v.tobytes() for k, v in reference().items()
        }


@pytest.mark.parametrize("norm", [1.0, math.inf])
def test_types_shapes_and_counters_are_those_of_the_reference(norm):
    made = level(0.0, norm=norm).release(clients(3), (Weights(reference()),), 3.0, norm, ROUND)
    assert {k: (v.dtype, v.shape) for k, v in made.arrays.items()} == {
        k: (v.dtype, v.shape) for k, v in reference().items()
    }
    assert made.arrays["model/steps"] == 40


@pytest.mark.parametrize("norm", [1.0, math.inf])
def test_what_is_not_sent_is_a_zero_update(norm):
    plan, payload = level(0.0, norm=norm), (Weights(reference()),)
    full, start = clients(1)[0], reference()
    partial = {"model/a": full["model/a"]}
    said = plan.release([partial], payload, 2.0, norm, ROUND).arrays
    same = plan.release([{**start, **partial}], payload, 2.0, norm, ROUND).arrays
    for key in start:
        np.testing.assert_array_equal(said[key], same[key])
    silent = plan.release([{}, start], payload, 2.0, norm, ROUND).arrays
    for key, value in start.items():
        np.testing.assert_allclose(silent[key], value, rtol=1e-6)


def test_zero_updates_are_no_division_by_zero():
    coder = weights_coder(Weights(reference()), Clipping(), 1.0)
    assert not coder.encode(reference()).any() and coder.vote(reference()) == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("norm", [1.0, math.inf])
def test_an_update_that_is_not_finite_or_has_another_shape_is_refused_by_name(bad, norm):
    coder = weights_coder(Weights(reference()), Clipping(), norm)
    with pytest.raises(RunError, match="model/a is not finite"):
        coder.encode({"model/a": np.float32([0, bad, 0])})
    with pytest.raises(RunError, match=r"model/b has shape \(3,\)"):
        coder.encode({"model/b": np.zeros(3)})


@pytest.mark.parametrize("mode", ["flat", "per-layer"])
def test_without_noise_and_clipping_it_is_the_plain_average_bit_for_bit(mode):
    uploads = clients(5)
    uploads[2]["model/a"][0] = -0.0
    start = reference()
    for dtype in (np.float16, np.float32, np.float64):
        cast = [{k: u[k].astype(dtype) for k in ("model/b", "model/a")} for u in uploads]
        base = {k: start[k].astype(dtype) for k in ("model/b", "model/a")}
        want = average(cast, [1] * 5)
        plan = level(0.0, mode=mode, norm=math.inf)
        made = plan.release(cast, (Weights(base),), 5.0, math.inf, ROUND)
        assert {k: v.tobytes() for k, v in made.arrays.items()} == {
            k: v.tobytes() for k, v in want.items()
        }
        assert made.multiplier == 0.0


def test_local_without_noise_and_clipping_is_what_the_client_has():
    plan = level(0.0, trust="local", adjacency="zero-out", norm=math.inf)
    upload = clients(1)[0]
    made = plan.privatise(upload, (Weights(reference()),), math.inf, ROUND)
    for key in ("model/a", "model/b"):
        assert made[key].tobytes() == upload[key].tobytes()


def test_per_layer_leaves_room_for_each_array():
    start = {"model/a": np.zeros(4), "model/b": np.zeros(4), "model/n": np.zeros(2, np.int64)}
    upload = {"model/a": np.full(4, 100.0), "model/b": np.full(4, 0.1)}
    flat, layers = (
        weights_coder(Weights(start), Clipping(mode=mode), 1.0).encode(upload)
        for mode in ("flat", "per-layer")
    )
    assert np.linalg.norm(layers[:4]) == pytest.approx(1 / math.sqrt(2))
    np.testing.assert_array_equal(layers[4:], upload["model/b"])
    assert flat[4:].max() < 0.001


# Several parts of one release.

MIXED = (Weights({"model/w": np.zeros(5_000)}), Histogram("labels", 10))


def test_parts_share_one_multiplier():
    plan = level(2.0, share=0.2)
    first, second = plan.multipliers(MIXED, 100.0)
    assert first**-2 == pytest.approx(0.8 * 2.0**-2)
    assert second**-2 == pytest.approx(0.2 * 2.0**-2)
    assert joint(first, second) == pytest.approx(2.0, rel=1e-12)
    assert plan.multipliers(MIXED[:1], 100.0) == plan.multipliers(MIXED[1:], 100.0) == [2.0]
    three = plan.multipliers((*MIXED, Histogram("again", 10)), 100.0)
    assert joint(*three) == pytest.approx(2.0) and three[1] == three[2]
    assert level(0.0).multipliers(MIXED, 100.0) == [0.0, 0.0]


def test_a_payload_without_parts_costs_nothing():
    made = level(1.0).release([{}], (), 5.0, 1.0, ROUND)
    assert made.arrays == {} and made.multiplier == math.inf == level(1.0).worst(())


def test_each_part_has_noise_of_its_own():
    plan = level(2.0, share=0.2)
    made = plan.release([], MIXED, 1.0, 3.0, ROUND)
    assert_scale(made.arrays["model/w"], plan.multipliers(MIXED, 1.0)[0] * 3.0)
    assert made.multiplier == pytest.approx(2.0) == plan.worst(MIXED)
    twice = (Weights({"model/w": np.zeros(9)}), Histogram("a", 9), Histogram("b", 9))
    arrays = plan.release([], twice, 0.01, 3.0, ROUND).arrays
    assert arrays["a"].tobytes() != arrays["b"].tobytes()


def test_parts_that_cannot_be_told_apart_or_paid_are_refused():
    with pytest.raises(ConfigError, match="share = 1 leaves no budget for weights"):
        level(1.0, share=1.0).multipliers(MIXED, 10.0)
    with pytest.raises(ConfigError, match="2 parts of weights"):
        level(1.0).multipliers(WIDE * 2, 10.0)


class Votes:
    """A coder that spends half of what it may."""

    bound = 1.0

    def encode(self, arrays):
        return np.zeros(3)

    def decode(self, total, expected, noise_std):
        raise AssertionError("it adds its own noise")

    def release_sum(self, total, noise_multiplier, expected, rng):
        return {"votes": total}, 2 * noise_multiplier

    def worst(self, noise_multiplier):
        return noise_multiplier


def test_a_part_that_adds_its_own_noise_says_what_it_spent(monkeypatch):
    monkeypatch.setattr(client_level, "knowledge_coder", lambda part, release: Votes())
    plan = level(1.0, share=0.5)
    weights, votes = plan.multipliers(MIXED, 10.0)
    made = plan.release([], MIXED, 10.0, 1.0, ROUND)
    assert made.multiplier == pytest.approx(joint(weights, 2 * votes))
    assert plan.worst(MIXED) == pytest.approx(1.0) and made.multiplier > 1.0


def test_replacing_a_client_costs_twice():
    for adjacency, factor in (("add-remove", 1), ("zero-out", 1), ("replace-one", 0.5)):
        plan = level(3.0, adjacency=adjacency)
        made = plan.release([], WIDE, 1.0, 1.0, ROUND)
        assert made.multiplier == plan.worst(WIDE) == pytest.approx(3.0 * factor)


# Adaptive clipping.


def test_the_count_of_adaptive_clipping_is_paid_first():
    plan = level(1.0, mode="adaptive", count_noise=2.0)
    (weights,) = plan.multipliers(WIDE, 100.0)
    assert weights == pytest.approx((1 - 1 / 16) ** -0.5)
    assert joint(weights, 2 * 2.0) == pytest.approx(1.0, rel=1e-12)
    made = plan.release([], WIDE, 100.0, 0.1, ROUND)
    assert made.multiplier == pytest.approx(1.0, rel=1e-12) == plan.worst(WIDE)
    assert_scale(made.arrays["model/w"] * 100, weights * 0.1)


def test_a_count_that_takes_the_whole_budget_is_refused_with_the_fix():
    with pytest.raises(ConfigError, match=r"count_noise > 0\.5"):
        level(1.0, mode="adaptive").multipliers(WIDE, 10.0)
    assert level(1.0, mode="adaptive").multipliers(WIDE, 11.0)[0] > 1.0


def test_adaptive_clipping_is_refused_where_nobody_may_count_or_the_norm_cannot_move():
    with pytest.raises(ConfigError, match="counts unclipped clients on the server"):
        level(1.0, trust="local", adjacency="zero-out", mode="adaptive")
    with pytest.raises(ConfigError, match="cannot adapt"):
        level(0.0, mode="adaptive", norm=math.inf)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.1, 10.0])
def test_the_norm_converges_to_the_quantile_from_far_below_and_far_above(start, quantile):
    norms = np.linspace(1.0, 1.9, 40)
    uploads = [{"model/w": np.array([norm])} for norm in norms]
    payload = (Weights({"model/w": np.zeros(1)}),)
    plan = level(1.0, mode="adaptive", norm=start, rate=0.4, quantile=quantile, count_noise=2.0)
    norm, path = start, []
    for round_ in range(80):
        rng = stream(5, "privacy", round_)
        made = plan.release(uploads, payload, 40.0, norm, rng)
        norm = plan.next_norm(norm, made.unclipped, 40.0, rng)
        path.append(norm)
    assert np.mean(path[-40:]) == pytest.approx(np.quantile(norms, quantile), abs=0.06)


def test_the_norm_follows_the_formula_and_its_noise_has_the_promised_scale():
    plan = level(1.0, mode="adaptive", rate=0.3, quantile=0.4, count_noise=2.0)
    # Of 50 expected clients 60 came, 45 unclipped and 15 clipped: (45 - 15) / 2.
    steps = [plan.next_norm(1.0, 15.0, 50.0, stream(1, "round", r)) for r in range(2_000)]
    share = -np.log(steps) / 0.3 + 0.4
    assert_scale((share - 0.5) * 50 - 15, 2.0)
    assert level(1.0).next_norm(0.7, 15.0, 50.0, ROUND) == 0.7


def test_the_count_is_centred_and_the_silent_are_as_the_absent():
    uploads = [{"model/w": np.array([size])} for size in (0.0, 0.5, 1.0, 1.01, 50.0)]
    payload = (Weights({"model/w": np.zeros(1)}),)
    plan = level(1.0, mode="adaptive", count_noise=1.0)
    assert plan.release(uploads, payload, 5.0, 1.0, ROUND).unclipped == (3 - 2) / 2
    assert plan.release([*uploads, {}, {}], payload, 5.0, 1.0, ROUND).unclipped == 0.5
    assert plan.release([], payload, 5.0, 1.0, ROUND).unclipped == 0


def test_the_norm_never_leaves_the_numbers():
    plan = level(0.0, mode="adaptive", rate=1e6, count_noise=1e6)
    norm = 1.0
    for round_ in range(20):
        norm = plan.next_norm(norm, 0.0, 1.0, stream(2, "round", round_))
        assert 0 < norm < math.inf
