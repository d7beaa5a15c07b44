"""The local loop under autocast: close to float32, not the same, and known as another result."""

import pytest
import torch
from torch import nn

from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.local import Term, fit
from fedkd.clients.terms import HeadSupervised, Proximal, Supervised
from fedkd.clients.training import Training
from fedkd.config import Experiment, load
from fedkd.data.federated import Split
from fedkd.errors import ConfigError
from fedkd.models.base import build
from fedkd.rng import Rng
from fedkd.types import Task

IMAGES = Task(name="images", input_shape=(1, 8, 8), classes=4)
TEXT = Task(name="text", input_shape=(6,), classes=9, sequence=True)
NAMES = {"mlp": IMAGES, "cnn": IMAGES, "resnet8": IMAGES, "gpt-tiny": TEXT, "lstm": TEXT}


def data(task, n=24):
    if task.sequence:
        rows = torch.randint(1, 9, (n, 7), generator=Rng(1).torch())
        return Split(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    y = torch.arange(n) % 4
    x = torch.randn(n, *task.input_shape, generator=Rng(1).torch()) + y[:, None, None, None]
    return Split(x, y)


def trained(name, precision, dp=None):
    task = NAMES[name]
    net = build(name, {}, task, Rng(0))
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    training = Training(batch_size=8, epochs=2, momentum=0.5, precision=precision)
    result = fit(net, data(task), [Supervised(), Proximal(net, start, 0.1)], training, 0.05, Rng(0))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    return torch.cat([p.detach().flatten() for p in net.parameters()]), result.losses["supervised"]


@pytest.mark.parametrize("name", NAMES)
def test_bf16_trains_and_ends_near_float32_but_not_there(name):
    (half, loss), (full, reference) = trained(name, "bf16"), trained(name, "float32")
    again, _ = trained(name, "bf16")
    start = torch.cat(
        [p.detach().flatten() for p in build(name, {}, NAMES[name], Rng(0)).parameters()]
    )
    assert torch.equal(half, again)
    assert 0 < (half - full).norm() < 0.5 * (full - start).norm()
    assert loss == pytest.approx(reference, rel=0.1)


def test_terms_see_float32_and_their_heads_are_halved():
    class Seen(Term):
        name, weight = "seen", 1.0

        def __call__(self, batch):
            found.append((batch.logits.dtype, batch.features["fc1"].dtype))
            return batch.logits.sum(1)

        def at(self):
            return frozenset({"fc1"})

    found, net, head = [], build("mlp", {}, IMAGES, Rng(0)), nn.Linear(200, 4)
    seen = []
    head.register_forward_hook(lambda _, given, out: seen.append(out.dtype))
    terms = [Seen(), HeadSupervised(head, "fc1", 1.0)]
    fit(net, data(IMAGES), terms, Training(steps=1, precision="bf16"), 0.1, Rng(0))
    assert found == [(torch.float32, torch.float32)]
    assert seen == [torch.bfloat16]


def test_dp_sgd_is_refused_by_the_loop_and_by_the_configuration():
    net = build("mlp", {}, IMAGES, Rng(0))
    training, split = Training(precision="bf16"), data(IMAGES)
    with pytest.raises(ConfigError, match=r"DP-SGD.*precision = 'bf16'.*'float32'"):
        fit(net, split, [Supervised()], training, 0.1, Rng(0), DpSgd(1.0))
    both = ["privacy.unit=example", "clients.training.precision=bf16"]
    with pytest.raises(ConfigError, match=r"precision = 'bf16'.*privacy.unit = 'example'"):
        load(None, both)
    assert load(None, both[1:]).clients.training.precision == "bf16"
    with pytest.raises(ConfigError, match=r"precision = 'fp16'"):
        load(None, ["clients.training.precision=fp16"])


def test_only_another_precision_is_another_result():
    plain = Experiment().digest()
    assert plain == "ad7fcc0bfe08bed5"
    assert load(None, ["clients.training.precision=float32"]).digest() == plain
    assert load(None, ["clients.training.precision=bf16"]).digest() != plain
