"""Judging against counts by hand, in chunks, with empty splits."""

import numpy as np
import pytest
import torch

from fedkd.clients import chunk
from fedkd.clients.client import ByNetworks
from fedkd.clients.heads import mixed, with_heads
from fedkd.clients.judge import Verdict, Verdicts, fingerprint, judge
from fedkd.data.federated import Split
from fedkd.models.base import BlockNet
from fedkd.models.initial import initialise
from fedkd.rng import Rng

CLASSES = 4


def case(n=50):
    z = torch.randn(n, CLASSES, generator=Rng(0).torch())
    y = torch.randint(0, CLASSES - 1, (n,), generator=Rng(1).torch())
    return Split(z, y)


def test_counts_by_class_and_loss_by_hand():
    split = case()
    verdict = judge(lambda x: {"personal": x}, split, CLASSES)["personal"]
    for c in range(CLASSES):
        mine = split.y == c
        assert verdict.total[c] == mine.sum()
        assert verdict.correct[c] == (split.x[mine].argmax(1) == c).sum()
    p = torch.softmax(split.x, 1)[torch.arange(50), split.y]
    assert verdict.loss == pytest.approx(-p.log().mean().item(), rel=1e-5)
    assert verdict.accuracy == int((split.x.argmax(1) == split.y).sum()) / 50


def test_chunks_do_not_matter(monkeypatch):
    split = case()
    whole = judge(lambda x: {"a": x, "b": -x}, split, CLASSES)
    monkeypatch.setattr(chunk, "CHUNK", 7)
    parts = judge(lambda x: {"a": x, "b": -x}, split, CLASSES)
    assert list(whole) == list(parts) == ["a", "b"]
    for name in whole:
        assert np.array_equal(whole[name].correct, parts[name].correct)
        assert np.array_equal(whole[name].total, parts[name].total)
        assert whole[name].loss == pytest.approx(parts[name].loss, rel=1e-5)


def test_log_probabilities_are_judged_as_logits_are():
    split = case()
    outputs = {"logits": split.x + 3, "logp": torch.log_softmax(split.x, 1)}
    found = judge(lambda x: outputs, split, CLASSES)
    assert found["logits"].loss == pytest.approx(found["logp"].loss, rel=1e-5)


def test_an_empty_split_has_no_verdict():
    empty = Split(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.long))
    assert judge(lambda x: {"a": x}, empty, CLASSES) == {}
    nothing = Verdict(np.zeros(2), np.zeros(2), 0.0)
    assert np.isnan(nothing.accuracy)
    assert np.isnan(nothing.loss)


def test_predictors_of_a_network_with_heads():
    net = BlockNet(
        {"a": torch.nn.Linear(CLASSES, 5), "b": torch.nn.Linear(5, 6)}, torch.nn.Linear(6, CLASSES)
    )
    own = {"a": torch.nn.Linear(5, CLASSES)}
    shared = {"a": torch.nn.Linear(5, CLASSES), "b": torch.nn.Linear(6, CLASSES)}
    x = case().x
    with torch.inference_mode():
        found = with_heads(net, own, shared)(x)
        f = torch.softmax(net(x), 1)
        g = [torch.softmax(shared[k](net.features(x, k)), 1) for k in ("a", "b")]
        mine = torch.softmax(own["a"](net.features(x, "a")), 1)
        assert torch.allclose(found["personal"], net(x))
        assert torch.allclose(torch.softmax(found["global_head"], 1), g[1])
        assert torch.allclose(found["ensemble"].exp(), (f + g[0] + g[1]) / 3, atol=1e-6)
        assert torch.allclose(found["own_heads"].exp(), (f + mine) / 2, atol=1e-6)
        assert set(with_heads(net, {}, {})(x)) == {"personal"}
    assert not net.training


def test_mixed_is_the_log_of_the_mean_probability():
    z = [case().x, -case().x]
    expected = (torch.softmax(z[0], 1) + torch.softmax(z[1], 1)) / 2
    assert torch.allclose(mixed(z).exp(), expected, atol=1e-6)
    assert torch.allclose(mixed(z).exp().sum(1), torch.ones(50))


class Counted:
    """A network's predictor that counts how often it is asked."""

    def __init__(self, seed=0, bias=0.0):
        self.net = BlockNet({"fc": torch.nn.Linear(CLASSES, 3)}, torch.nn.Linear(3, CLASSES))
        initialise(self.net, Rng(seed))
        self.asked = 0
        self.bias = bias

    def predictor(self, rule="personal"):
        return ByNetworks(rule, (self.net,), self._answer)

    def _answer(self, x):
        self.asked += 1
        return {"personal": self.net(x) + self.bias}


def once(verdicts, place, predict, split, likely=False):
    return verdicts.judge(place, predict, {"test": split}, CLASSES, likely=likely)["test"]


def same(one, other):
    return all(
        np.array_equal(one[n].correct, other[n].correct) and one[n].loss_sum == other[n].loss_sum
        for n in one | other
    )


def test_equal_weights_are_judged_once_on_a_split():
    split, verdicts, first, copy = case(), Verdicts(), Counted(), Counted()
    found = once(verdicts, "a", first.predictor(), split, likely=True)
    assert same(found, judge(first.predictor(), split, CLASSES))
    assert once(verdicts, "a", copy.predictor(), split) is found
    assert copy.asked == 0
    once(verdicts, "b", copy.predictor(), split)
    assert copy.asked == 1


@pytest.mark.parametrize("where", ["fc.weight", "fc.bias", "head.weight", "head.bias"])
@pytest.mark.parametrize("first", [True, False])
def test_any_other_number_is_judged_anew(where, first):
    split, verdicts, one, other = case(), Verdicts(), Counted(), Counted()
    once(verdicts, "a", one.predictor(), split, likely=True)
    with torch.no_grad():
        other.net.get_parameter(where).view(-1)[0 if first else -1] += 0.5
    found = once(verdicts, "a", other.predictor(), split)
    assert other.asked == 1
    assert same(found, judge(other.predictor(), split, CLASSES))
    assert not same(found, once(verdicts, "a", one.predictor(), split))


def test_another_rule_or_layout_is_judged_anew():
    split, verdicts, one, other = case(), Verdicts(), Counted(), Counted(bias=1.0)
    once(verdicts, "a", one.predictor(), split, likely=True)
    once(verdicts, "a", other.predictor("with bias"), split, likely=True)
    assert other.asked == 1
    assert fingerprint(one.predictor()) != fingerprint(one.predictor("x"))
    plain = fingerprint(one.predictor())
    one.net.fc.weight = torch.nn.Parameter(one.net.fc.weight.detach().t().contiguous().t())
    assert fingerprint(one.predictor()) != plain


def test_weights_that_come_without_notice_are_known_the_third_time():
    split, verdicts, net = case(), Verdicts(), Counted()
    for _ in range(4):
        once(verdicts, "a", net.predictor(), split)
    assert net.asked == 2


def test_what_is_no_network_is_always_judged():
    split, verdicts, asked = case(), Verdicts(), []
    for _ in range(3):
        once(verdicts, "a", lambda x: asked.append(1) or {"a": x}, split, likely=True)
    assert len(asked) == 3


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_count_whether_or_not_they_are_saved(persistent):
    net = Counted()
    net.net.register_buffer("shift", torch.zeros(3), persistent=persistent)
    before = fingerprint(net.predictor())
    assert fingerprint(net.predictor()) == before
    net.net.shift += 5
    assert fingerprint(net.predictor()) != before


def test_seconds_of_judging_are_told_of_judged_rounds_alone(tiny, play):
    run = play(tiny("fedavg", {"rounds": 12, "evaluate.share": 0.01}))
    judged = [r for r in range(1, 13) if any(run.strategy.judges(r))]
    assert 0 < len(judged) < 12
    assert sorted(run.log.series("seconds", "evaluate")) == judged
    assert sorted(run.log.series("seconds", "train")) == list(range(1, 13))
