"""What generators are trained for: every loss against numpy, and who gets a gradient."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from fedkd.clients.local import Batch
from fedkd.clients.synthesis import (
    Answers,
    BestBatch,
    Boundary,
    Disagreement,
    Diversity,
    Fidelity,
    GeneratorTraining,
    MatchedStatistics,
    TeacherFidelity,
    codes_for,
    joined,
    sample,
    train_generator,
)
from fedkd.clients.transfer import Ensemble, frozen
from fedkd.distill.fusion_rules import MeanLogits, MeanProbabilities, label_shares
from fedkd.distill.generator import filled, input_generator
from fedkd.errors import RunError
from fedkd.models.base import build
from fedkd.rng import Rng
from fedkd.types import Task

D, C, B, K = 6, 4, 9, 3
TASK = Task(name="toy", input_shape=(D,), classes=C, bounds=(-2.0, 2.0))
COUNTS = torch.tensor([[8.0, 0, 0, 4], [0, 3, 0, 4], [2, 1, 0, 0]])


def network(i, hidden=7):
    net = build("mlp", {"hidden": [hidden, 5]}, TASK, Rng(i, ("net",)))
    with torch.no_grad():
        net.get_parameter("head.weight").mul_(4)
    return net


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed, ("data",)).torch())


@pytest.fixture
def teachers():
    return [network(i) for i in range(K)]


@pytest.fixture
def student():
    with frozen(network(10)) as net:
        yield net


@pytest.fixture
def batch():
    """A generated batch: ``logits`` are the inputs that were made."""
    x, y = normal(B, D, seed=1).requires_grad_(True), torch.arange(B) % C
    return Batch(torch.arange(B), y, torch.arange(B), x, {})


def ensemble(teachers, fusion=None, counts=None):
    return Ensemble(teachers, fusion or MeanLogits(), None if counts is None else counts)


def numbers(net, x):
    with torch.no_grad():
        return net(x).double().numpy()


def test_fidelity_is_the_ensembles_cross_entropy_with_the_label(teachers, batch):
    y = batch.y.numpy()
    fused = np.mean([numbers(t, batch.logits) for t in teachers], axis=0)
    expected = -log_softmax(fused, axis=1)[np.arange(B), y]
    loss = Fidelity(Answers(ensemble(teachers)))(batch)
    assert loss.shape == (B,)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    mixed = np.mean([softmax(numbers(t, batch.logits), axis=1) for t in teachers], axis=0)
    loss = Fidelity(Answers(ensemble(teachers, MeanProbabilities())))(batch)
    np.testing.assert_allclose(loss.detach(), -np.log(mixed[np.arange(B), y]), rtol=1e-4)


def test_hard_samples_count_more_and_their_weight_is_a_constant(teachers, batch):
    plain = Fidelity(Answers(ensemble(teachers)))(batch)
    hard = Fidelity(Answers(ensemble(teachers)), hard=2.0)(batch)
    weights = (1 - torch.exp(-plain.detach())) ** 2
    torch.testing.assert_close(hard, plain * weights)
    grads = [torch.autograd.grad(loss.sum(), batch.logits)[0] for loss in (plain, hard)]
    torch.testing.assert_close(grads[1], grads[0] * weights[:, None])


def test_fidelity_stays_finite_where_the_ensemble_is_sure_of_another_class(teachers, batch):
    with torch.no_grad():
        teachers[0].get_parameter("head.weight").mul_(1e4)
    loss = Fidelity(Answers(ensemble(teachers)))(batch).sum()
    (gradient,) = torch.autograd.grad(loss, batch.logits)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert loss > 80


@pytest.mark.parametrize("known", [True, False], ids=["shares", "no shares"])
def test_each_teacher_answers_for_the_classes_that_it_knows(known, teachers, batch):
    shares = label_shares(COUNTS) if known else None
    y = batch.y.numpy()
    a = shares.numpy() if known else np.full((K, C), 1 / K)
    losses = [-log_softmax(numbers(t, batch.logits), axis=1)[np.arange(B), y] for t in teachers]
    expected = sum(a[k, y] * losses[k] for k in range(K))
    loss = TeacherFidelity(Answers(ensemble(teachers, counts=shares)))(batch)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_without_a_class_does_not_judge_it(teachers, batch):
    """Class 0 is held by teachers 0 and 2: whatever teacher 1 says of it changes nothing."""
    shares = label_shares(COUNTS)
    zeros = dataclasses.replace(batch, y=torch.zeros_like(batch.y))
    before = TeacherFidelity(Answers(ensemble(teachers, counts=shares)))(zeros)
    other = [teachers[0], network(77), teachers[2]]
    torch.testing.assert_close(
        TeacherFidelity(Answers(ensemble(other, counts=shares)))(zeros), before, rtol=0, atol=0
    )


def test_boundary_is_minus_kl_where_student_and_ensemble_disagree(teachers, student, batch):
    t = log_softmax(np.mean([numbers(n, batch.logits) for n in teachers], axis=0), axis=1)
    s = log_softmax(numbers(student, batch.logits), axis=1)
    differ = t.argmax(1) != s.argmax(1)
    assert 0 < differ.sum() < B
    expected = -differ.astype(float) * (np.exp(t) * (t - s)).sum(1)
    loss = Boundary(Answers(ensemble(teachers)), student)(batch)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    assert (loss[torch.from_numpy(differ)] < 0).all()


def test_a_student_like_its_only_teacher_has_no_boundary(student, batch):
    assert not Boundary(Answers(ensemble([student])), student)(batch).any()
    assert not Disagreement(Answers(ensemble([student])), student)(batch).any()


@pytest.mark.parametrize("known", [True, False], ids=["shares", "no shares"])
def test_disagreement_is_minus_the_absolute_gap_of_logits(known, teachers, student, batch):
    shares = label_shares(COUNTS) if known else None
    a = shares.numpy() if known else np.full((K, C), 1 / K)
    s, y = numbers(student, batch.logits), batch.y.numpy()
    gaps = [np.abs(s - numbers(t, batch.logits)).mean(1) for t in teachers]
    expected = -sum(a[k, y] * gaps[k] for k in range(K))
    loss = Disagreement(Answers(ensemble(teachers, counts=shares)), student)(batch)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4, atol=1e-6)


def test_diversity_is_one_for_equal_samples_and_falls_as_they_spread(batch):
    codes = codes_for(B, 5, torch.ones(C), Rng(3))
    e, x = codes.noise.detach().double().numpy(), batch.logits.detach().double().numpy()
    apart = ((e[:, None] - e[None]) ** 2).mean(2)
    spread = np.abs(x[:, None] - x[None]).mean(2)
    term = Diversity(codes)
    assert term(batch).item() == pytest.approx(np.exp(-(apart * spread).mean()), rel=1e-4)
    equal = dataclasses.replace(batch, logits=torch.ones(B, D))
    assert term(equal).item() == 1.0
    wide = dataclasses.replace(batch, logits=batch.logits * 5)
    assert term(wide) < term(batch) < 1
    (gradient,) = torch.autograd.grad(term(batch), batch.logits)
    assert torch.isfinite(gradient).all() and gradient.any()


def test_diversity_follows_the_noise_that_made_each_sample(batch):
    """Codes come in any order and part of them: ``batch.x`` says which."""
    codes = codes_for(2 * B, 5, torch.ones(C), Rng(3))
    order = torch.arange(B).flip(0) + B
    part = dataclasses.replace(batch, x=order)
    e, x = codes.noise.detach().numpy()[order], batch.logits.detach().numpy()
    apart = ((e[:, None] - e[None]) ** 2).mean(2)
    expected = np.exp(-(apart * np.abs(x[:, None] - x[None]).mean(2)).mean())
    assert Diversity(codes)(part).item() == pytest.approx(expected, rel=1e-4)


def statistics(net, x, blocks):
    _, found = net.forward_with_features(x, blocks)
    return {b: (h.mean(0).detach(), h.var(0, unbiased=False).detach()) for b, h in found.items()}


def test_matched_statistics_are_distances_of_mean_and_variance(teachers, batch):
    real = normal(20, D, seed=5) + 1
    sent = [statistics(t, real, ["fc1", "fc2"]) for t in teachers]
    total = 0.0
    for teacher in teachers:
        for block, d in (("fc1", 7), ("fc2", 5)):
            made = teacher.features(batch.logits, block).detach().double().numpy()
            true = teacher.features(real, block).detach().double().numpy()
            total += np.linalg.norm(made.mean(0) - true.mean(0)) / np.sqrt(d)
            total += np.linalg.norm(made.var(0) - true.var(0)) / np.sqrt(d)
    loss = MatchedStatistics(teachers, sent)(batch)
    assert loss.item() == pytest.approx(total / K, rel=1e-4)


def test_matched_statistics_vanish_on_the_clients_own_data(teachers, batch):
    sent = [statistics(t, batch.logits, ["fc2"]) for t in teachers]
    loss = MatchedStatistics(teachers, sent)(batch)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, batch.logits)
    assert torch.isfinite(gradient).all(), "the norm has no derivative at 0"


def test_a_teacher_without_statistics_asks_for_nothing(teachers, batch):
    sent = [statistics(t, normal(20, D), ["fc2"]) for t in teachers]
    some = MatchedStatistics(teachers, [sent[0], {}, {}])(batch)
    alone = MatchedStatistics(teachers[:1], sent[:1])(batch)
    assert some.item() == pytest.approx(alone.item() / K, rel=1e-6)
    assert MatchedStatistics(teachers, [{}, {}, {}])(batch).item() == 0


def test_teachers_answer_once_for_all_terms(teachers, batch, monkeypatch):
    answers, asked = Answers(ensemble(teachers)), []
    logits = Ensemble.logits
    monkeypatch.setattr(Ensemble, "logits", lambda s, x: (asked.append(1), logits(s, x))[1])
    Fidelity(answers)(batch)
    TeacherFidelity(answers)(batch)
    assert len(asked) == 1
    again = dataclasses.replace(batch, logits=batch.logits.detach() * 2)
    assert not torch.equal(answers(again.logits), answers.ensemble.logits(batch.logits))


def test_the_best_batch_is_the_one_of_the_lowest_sum(teachers, student, batch):
    answers = Answers(ensemble(teachers))
    terms = [Fidelity(answers, 0.5), Boundary(answers, student, 2.0)]
    best, sums = BestBatch(terms), []
    made = [normal(B, D, seed=s).requires_grad_(True) for s in range(20, 25)]
    for x in made:
        one = dataclasses.replace(batch, logits=x, y=batch.y.roll(len(sums)))
        expected = sum(t.weight * t(one).mean().item() for t in terms)
        assert best(one).item() == pytest.approx(expected, rel=1e-5)
        sums.append(expected)
    lowest = int(np.argmin(sums))
    assert 0 < lowest < 4, "choose seeds where neither the first nor the last is the best"
    assert torch.equal(best.samples.x, made[lowest]) and not best.samples.x.requires_grad
    assert torch.equal(best.samples.y, batch.y.roll(lowest))
    kept = 0.5 * best.losses["fidelity"] + 2.0 * best.losses["boundary"]
    assert kept == pytest.approx(min(sums), rel=1e-5)


def test_codes_ask_for_classes_in_proportion_and_never_for_weightless_ones():
    codes = codes_for(4000, 5, torch.tensor([3.0, 0, 1, 0]), Rng(0))
    share = torch.bincount(codes.labels, minlength=C) / 4000
    assert share[0] == pytest.approx(0.75, abs=0.03)
    assert share[1] == share[3] == 0
    assert codes.noise.shape == (4000, 5)
    assert codes.noise.mean().item() == pytest.approx(0, abs=0.02)
    assert codes.noise.std().item() == pytest.approx(1, abs=0.02)
    again = codes_for(4000, 5, torch.tensor([3.0, 0, 1, 0]), Rng(0))
    assert torch.equal(again.noise, codes.noise) and torch.equal(again.labels, codes.labels)
    nobody = codes_for(400, 5, torch.zeros(C), Rng(0))
    assert (torch.bincount(nobody.labels, minlength=C) > 0).all()


def test_a_code_is_noise_beside_the_one_hot_label():
    codes = codes_for(7, 5, torch.ones(C), Rng(0))
    index = torch.tensor([4, 0])
    made = codes(index)
    assert made.shape == (2, 5 + C)
    assert torch.equal(made[:, :5], codes.noise[index])
    assert torch.equal(made[:, 5:], torch.eye(C)[codes.labels[index]])


@pytest.mark.parametrize("shape", [(6,), (1, 8, 8), (3, 7, 5), (2, 3, 2)], ids=str)
def test_generated_samples_fit_the_task_and_its_bounds(shape):
    task = dataclasses.replace(TASK, input_shape=shape, bounds=(0.25, 0.5))
    generator = filled(input_generator(5, task, 2), Rng(0))
    codes = codes_for(11, 5, torch.ones(C), Rng(0))
    made = sample(generator, codes)
    assert made.x.shape == (11, *shape)
    assert not made.x.requires_grad
    assert made.x.min() > 0.25 and made.x.max() < 0.5
    assert torch.equal(made.y, codes.labels)


def trained(teachers, student, learned, steps=40, lr=1e-2):
    answers = Answers(ensemble(teachers, counts=label_shares(COUNTS)))
    codes = codes_for(32, 5, torch.ones(C), Rng(1), learned=learned)
    generator = filled(input_generator(5, TASK, 2), Rng(2))
    sent = [statistics(t, normal(20, D), ["fc2"]) for t in teachers]
    terms = [
        Fidelity(answers),
        TeacherFidelity(answers),
        Boundary(answers, student),
        Disagreement(answers, student, 0.1),
        Diversity(codes),
        MatchedStatistics(teachers, sent, 0.1),
    ]
    training = GeneratorTraining(steps=steps, batch_size=16, lr=lr)
    return codes, generator, train_generator(generator, codes, terms, training, Rng(3), "here.lr")


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
def test_only_the_generator_and_learned_codes_are_trained(learned, teachers, student):
    others = [*teachers, student]
    before = [[p.clone() for p in n.parameters()] for n in others]
    noise = codes_for(32, 5, torch.ones(C), Rng(1)).noise
    fresh = filled(input_generator(5, TASK, 2), Rng(2))
    codes, generator, result = trained(teachers, student, learned)
    assert (result.steps, result.examples) == (40, 40 * 16)
    assert set(result.losses) >= {"fidelity", "boundary", "disagreement", "diversity", "statistics"}
    assert torch.equal(codes.noise, noise) is not learned
    pairs = zip(generator.parameters(), fresh.parameters(), strict=True)
    assert all(not torch.equal(one, other) for one, other in pairs)
    for net, old in zip(others, before, strict=True):
        for parameter, value in zip(net.parameters(), old, strict=True):
            assert torch.equal(parameter, value) and parameter.grad is None


def test_training_makes_samples_that_the_ensemble_takes_for_their_label(teachers):
    answers = Answers(ensemble(teachers))
    codes = codes_for(64, 5, torch.tensor([1.0, 1, 0, 1]), Rng(1))
    generator = filled(input_generator(5, TASK, 2), Rng(2))
    training = GeneratorTraining(steps=150, batch_size=64, lr=1e-2)

    def agreement():
        made = sample(generator, codes)
        return (answers.ensemble.targets(made.x, 1.0).argmax(1) == made.y).float().mean()

    before = agreement()
    train_generator(generator, codes, [Fidelity(answers)], training, Rng(3))
    assert before < 0.6 and agreement() > 0.9


def test_a_generator_that_diverges_names_its_option(teachers, student):
    with pytest.raises(RunError, match=r"generator diverged.*lower here\.lr \(now 1e\+38\)"):
        trained(teachers, student, learned=True, steps=3, lr=1e38)


def test_generators_are_trained_with_adam_of_low_momentum():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = GeneratorTraining(weight_decay=0.1).make([parameter], 0.3)
    assert isinstance(optimizer, torch.optim.Adam)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.5, 0.999), 0.1)


def test_a_frozen_network_is_trainable_again_afterwards():
    net = network(0)
    with frozen(net) as held:
        assert not held.training and not any(p.requires_grad for p in held.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_the_best_batch_comes_with_what_the_teachers_said_of_it():
    of = Ensemble([network(i) for i in range(K)], MeanLogits())
    answers = Answers(of)
    best = BestBatch([Fidelity(answers)], answers)
    codes = codes_for(B, D, torch.ones(C), Rng(0), learned=True)
    generator = filled(input_generator(D, TASK, 2), Rng(1))
    training = GeneratorTraining(steps=4, batch_size=B, optimizer="adam", lr=1e-2)
    train_generator(generator, codes, [best], training, Rng(2))
    kept = best.samples
    assert torch.allclose(kept.answers, of.answers(kept.x), atol=1e-6)
    assert not kept.answers.requires_grad
    bank = joined([kept, kept])
    assert bank.answers.shape == (K, 2 * B, C) and len(bank.x) == len(bank.y) == 2 * B
    unknown = dataclasses.replace(kept, answers=None)
    assert joined([kept, unknown]).answers is None
