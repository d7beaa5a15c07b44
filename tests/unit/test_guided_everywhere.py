"""Target policies of terms that compare otherwise: peers, generated features, classes, not-true."""

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.clients.class_terms import HeadOnClasses
from fedkd.clients.dp_sgd import DpSgd, poisson
from fedkd.clients.generated_terms import GeneratedTargets
from fedkd.clients.guided import Guide, Guided
from fedkd.clients.local import Batch, fit
from fedkd.clients.teacher_terms import FromPeer, Peer, ToPeer, mutual
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.chosen import chosen_policy
from fedkd.distill.generator import feature_generator
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.policies.base import TargetPolicy
from fedkd.distill.targets import SampleTargets
from fedkd.engine.setup import prepare
from fedkd.engine.simulate import in_process
from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet
from fedkd.options import build
from fedkd.rng import Rng
from fedkd.strategies.base import strategies
from fedkd.types import select

KL = KullbackLeibler()
N, CLASSES = 6, 3
Y = torch.tensor([0, 1, 2, 0, 1, 2])
TAUGHT = {
    "fedgen": {"alpha": 0.0, "beta": 1.0, "generator_steps": 2, "generator_hidden": 8, "noise": 4},
    "fedhkd": {"lam": 1.0, "gamma": 0.0},
    "fml": {},
    "fedntd": {},
    "fedkd-wu2022": {"energy_start": 1, "energy_end": 1, "hidden_weight": 0.0},
}
UNTAUGHT = {
    "fedgen": {"alpha": 0.0, "beta": 0.0},
    "fedhkd": {"lam": 0.0, "gamma": 0.0},
    "fedkd-wu2022": {"kd_weight": 0.0},
}
PLACES = {
    "fml": ["policies/personal", "policies/meme"],
    "fedkd-wu2022": ["policies/mentor", "policies/mentee"],
}
BRIEF = {
    "rounds": 2,
    "evaluate.every": 5,
    "clients.count": 2,
    "clients.training.steps": 3,
    "data.source.limit": 80,
}
SAME = {"name": "weight", "schedule": "constant", "start": 1.0}
NOTHING = {"name": "weight", "schedule": "constant", "start": 0.0}
LEARNED = {"name": "ctkd", "high": 5.0, "strength": 50.0}
each = pytest.mark.parametrize("name", list(TAUGHT))


class Spy(TargetPolicy):
    """Notes what it is told, and changes nothing."""

    def __init__(self, dp="per-example"):
        self.told, self.losses, self.dp = [], [], dp

    def __call__(self, taught):
        self.told.append(taught)
        return taught

    def seen(self, losses):
        self.losses.append(losses)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch())


def network(seed=20):
    net = BlockNet({"fc1": nn.Linear(4, 5)}, nn.Linear(5, CLASSES))
    for i, p in enumerate(net.parameters()):
        p.data.copy_(drawn(*p.shape, seed=seed + i) / 2)
    return net


def batch(net):
    x = drawn(N, 4, seed=2)
    return Batch(x, Y, torch.arange(N), net(x), {})


def led(*policies):
    return Guide(policies, 0.0, 1.0, 4)


@pytest.fixture(scope="module")
def played(tiny, play):
    """Return what plays a strategy, each case once."""
    runs = {}

    def go(name, policies=None, changes=None, **options):
        chosen = {} if policies is None else {"policies": policies}
        made = tiny({"name": name, **TAUGHT[name], **options, **chosen}, BRIEF | (changes or {}))
        if repr(made) not in runs:
            runs[repr(made)] = play(made)
        return runs[repr(made)]

    return go


@pytest.mark.parametrize("name", ["fedgen", "fedhkd", "fml", "fedkd-wu2022"])
def test_a_policy_that_changes_nothing_changes_no_bit(name, played, bits):
    assert bits(played(name, [SAME])) == bits(played(name))


def test_mentor_and_mentee_learn_by_any_objective_and_by_kl_where_none_is_named(played, bits):
    plain = bits(played("fedkd-wu2022"))
    assert bits(played("fedkd-wu2022", objective="kl")) == plain
    assert bits(played("fedkd-wu2022", objective="reverse-kl")) != plain


def test_a_policy_that_changes_nothing_leaves_not_true_distillation_as_it_is(played):
    """Up to rounding: policies read probabilities, and without them it is of logits."""
    found, plain = (played("fedntd", p).state for p in ([SAME], None))
    for key, value in select(plain, "model").items():
        assert np.allclose(found[f"model/{key}"], value, rtol=0, atol=1e-5)


@each
def test_a_weight_of_nothing_teaches_nothing(name, played):
    found = played(name, [NOTHING]).state
    if name == "fml":
        # Half the labels' gradient is what a rate half as large makes of all of it.
        plain = played(name, changes={"clients.training.lr": 0.1}, alpha=1, beta=1).state
    else:
        plain = played(name, **UNTAUGHT.get(name, {"beta": 0.0})).state
    assert select(found, "model").keys() == select(plain, "model").keys()
    for key, value in select(plain, "model").items():
        assert np.allclose(found[f"model/{key}"], value, rtol=0, atol=1e-6)
    taught = played(name).state
    assert any(
        not np.allclose(taught[f"model/{key}"], value, rtol=0, atol=1e-5)
        for key, value in select(plain, "model").items()
    )


@each
def test_what_policies_learn_is_trained_along_and_kept_by_each_client(name, played):
    run = played(name, [LEARNED, "taid"])
    places = PLACES.get(name, ["policies"])
    thetas = []
    for k in range(2):
        state = run.client_state(k)
        for place in places:
            kept = select(state, place)
            assert set(kept) == {"0/theta", "1/t", "1/momentum", "1/loss"}
            thetas.append(float(kept["0/theta"][0]))
            assert np.isfinite(kept["1/loss"])
    assert all(theta != 1.0 for theta in thetas)
    assert len(set(thetas)) == len(thetas)


def test_peers_teach_each_other_under_policies_of_their_own():
    net, other = network(), Peer(network(40))
    own, meme = Spy(), Spy()
    given = batch(net)
    guides = (led(own), led(meme))
    for term in mutual(other, (0.5, 0.5), (0.5, 0.5), objective=KL, guides=guides):
        term(given)
    (to_own,), (to_meme,) = own.told, meme.told
    mine, theirs = given.logits, other(given)[0]
    assert to_own.logits is mine and to_meme.logits is theirs
    assert torch.equal(to_own.probs, theirs.softmax(1)) and not to_own.probs.requires_grad
    assert torch.equal(to_meme.probs, mine.softmax(1)) and not to_meme.probs.requires_grad
    assert torch.equal(to_own.labels, Y) and torch.equal(to_meme.labels, Y)
    assert (guides[0].step, guides[1].step) == (1, 1)


def head_term(spy=None, **more):
    features, probs = drawn(2, 5, seed=3), drawn(2, CLASSES, seed=4).softmax(1)
    guide = None if spy is None else led(spy)
    labels = torch.tensor([0, 2])
    return HeadOnClasses(network().head, features, probs, KL, 0.5, 1.0, guide, labels, **more)


def test_to_policies_a_class_is_an_example_that_has_its_label():
    spy = Spy("batch-coupled")
    term, given = head_term(spy), batch(network())
    assert torch.equal(term(given), head_term()(given))
    assert spy.told[0].labels.tolist() == [0, 2] and spy.told[0].temperature == 0.5
    assert len(spy.losses[0]) == 2 and term.dp == "weights-only"


def generated(prior, guide=None):
    net = network()
    return GeneratedTargets(
        BlockNet({"shaped": nn.Identity()}, net.head),
        feature_generator(4, CLASSES, 5, 8),
        torch.tensor(prior),
        objective=KL,
        noise=4,
        rng=Rng(7),
        weight=1.0,
        guide=guide,
    )


def test_policies_see_the_examples_whose_label_the_generator_knows():
    torch.manual_seed(0)
    spy = Spy("batch-coupled")
    term, given = generated([0.5, 0.0, 0.5], led(spy)), batch(network())
    found = term(given)
    assert term.dp == "batch-coupled" and generated([0.5, 0.5, 0.0]).dp == "per-example"
    assert spy.told[0].labels.tolist() == [0, 2, 0, 2] and len(spy.losses[0]) == 4
    assert (found == 0).tolist() == (Y == 1).tolist()
    torch.manual_seed(0)
    assert torch.equal(found, generated([0.5, 0.0, 0.5])(given))
    nobody = generated([0.0, 0.0, 0.0], led(spy))(given)
    assert not nobody.any() and len(spy.told) == 1


def test_terms_that_a_guide_leads_are_not_merged():
    peers = [Peer(network(seed)) for seed in (20, 30)]
    weighing = chosen_policy(SAME)
    for kind in (FromPeer, ToPeer):
        assert kind.merged([kind(p, 0.5) for p in peers], [None, None]) is not None
        for some in (peers, peers[:1]):
            terms = [kind(p, 0.5, guide=led(weighing)) for p in some]
            assert kind.merged(terms, [None] * len(some)) is None
    assert HeadOnClasses.merged([head_term(), head_term()], [None, None]) is not None
    assert HeadOnClasses.merged([head_term(weighing)], [None]) is None


@pytest.mark.parametrize("name", ["fedhkd", "fml"])
def test_clients_trained_together_learn_what_they_do_one_by_one(name, played):
    gathered = {"engine.executor": "cohort"}
    policies = [{"name": "confidence-gate", "least": 0.3}, "taid"]
    found, alone = (played(name, policies, changes).state for changes in (gathered, None))
    for key, value in select(alone, "model").items():
        assert np.allclose(found[f"model/{key}"], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["fedgen", "fml", "fedntd"])
def test_policies_that_mix_examples_are_told_to_whoever_clips_them(name):
    made = build(strategies.get(name), {**TAUGHT[name], "policies": ["weight", "taid"]})
    (found,) = made.coupled()
    assert found.startswith("strategy.policies = 'taid' makes what one example is taught depend")


def test_policies_of_classes_mix_no_examples_but_are_not_to_be_given_noise():
    def told(*names, **options):
        return build(strategies.get("fedhkd"), {"policies": names, **options}).coupled()

    assert told("taid", "weight") == told("ctkd", lam=0) == []
    (found,) = told("taid", "ctkd")
    assert found.startswith("strategy.policies = 'ctkd' is trained along with the network")


def test_policies_of_nothing_are_refused(tiny):
    strategy = {"name": "fedgen", "policies": ["taid"]}
    with pytest.raises(ConfigError, match=r"strategy.beta = 0: there are none"), in_process():
        prepare(tiny(strategy))


@pytest.mark.parametrize("physical", [0, 1])
def test_under_noise_the_run_goes_on_by_steps_and_not_by_parts_of_them(physical):
    """Nor by examples: how many a Poisson batch has is nobody's to know."""
    data, training = Split(drawn(N, 4, seed=2), Y), Training(batch_size=2, steps=20)
    sizes = [len(y) for _, y, _ in poisson(data, training, Rng(5))]
    assert min(sizes) == 0 and max(sizes) > 2
    spies = Spy(), Spy()
    one, other = (Guide((spy,), 0.0, 1.0, 20) for spy in spies)
    targets = SampleTargets(drawn(N, CLASSES, seed=4).softmax(1))
    classes = (drawn(2, 5, seed=3), targets.probs[:2], KL, 1.0, 1.0)
    net = network()
    terms = [Guided(KL, targets, 1.0, 1.0, guide=one), HeadOnClasses(net.head, *classes, other)]
    fit(net, data, terms, training, 0.1, Rng(5), DpSgd(1.0, max_physical_batch_size=physical))
    told = [[t.progress for t in spy.told] for spy in spies]
    calls = [n if physical else min(n, 1) for n in sizes]
    assert told[0] == [step / 20 for step, n in enumerate(calls) for _ in range(n)]
    assert told[1] == [step / 20 for step in range(20)]
