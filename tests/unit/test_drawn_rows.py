"""Rows that are taken out of their table when somebody asks for them: in all else a split."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

from fedkd.clients.noise import Noise
from fedkd.clients.stacked.request import Request, stacked
from fedkd.clients.terms import Supervised
from fedkd.clients.training import Training
from fedkd.data.dataset import Dataset
from fedkd.data.federated import Drawn, Federation, Rows, Split
from fedkd.data.partition import divide
from fedkd.data.registries import partitions
from fedkd.models.book import ModelBook
from fedkd.rng import Rng

TABLE = torch.arange(60.0).reshape(10, 1, 2, 3)


def drawn(index=(1, 4, 7)):
    return Drawn(Rows(TABLE, np.array(index)), torch.tensor([0, 1, 0][: len(index)]))


def test_rows_are_taken_once_and_only_when_asked_for():
    split = drawn()
    assert len(split) == 3
    assert split.like.shape == (0, 1, 2, 3)
    assert "x" not in vars(split)
    assert torch.equal(split.x, TABLE[[1, 4, 7]])
    assert split.x is split.x


def test_rows_that_a_judge_was_the_first_to_ask_for_can_be_trained_on():
    split = drawn()
    with torch.inference_mode():
        assert split.x.shape == (3, 1, 2, 3)
    assert not split.x.is_inference()
    weight = torch.ones(6, requires_grad=True)
    (split.x.flatten(1) * weight).sum().backward()


def test_other_labels_of_the_same_rows():
    split = drawn()
    flipped = dataclasses.replace(split, y=1 - split.y)
    assert flipped.y.tolist() == [1, 0, 1]
    assert flipped.x is split.x, "who holds it against the client's own rows finds them"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_have_the_rows(copied):
    other = copied(drawn())
    assert torch.equal(other.x, TABLE[[1, 4, 7]])
    assert other.y.tolist() == [0, 1, 0]


def federation(x):
    y = np.arange(len(x)) % 2
    data = Dataset("numbered", x, y, x, y, 2)
    scheme = partitions.get("iid")()
    return Federation.build(data, divide(data, scheme, 2, Rng(0)), validation=0.0, rng=Rng(1))


@pytest.mark.parametrize("kind", ["as it is", "mirrored", "read-only", "mapped"])
def test_any_array_is_a_table(kind, tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 2, 3)).astype(np.float32)
    whole = x
    if kind == "mirrored":
        whole = x[..., ::-1]
    elif kind == "read-only":
        whole = x.copy()
        whole.flags.writeable = False
    elif kind == "mapped":
        np.save(tmp_path / "x.npy", x)
        whole = np.load(tmp_path / "x.npy", mmap_mode="r")
    made = federation(whole)
    for k in range(2):
        assert np.array_equal(made.client(k).train.x.numpy(), whole[made.partition.train[k]])


class Doubled(Drawn):
    """Somebody's own rows, which are not those of the table."""

    @property
    def x(self):
        return 2 * TABLE[torch.from_numpy(self.rows.index)]


def trained(*splits):
    shape, training = TABLE.shape[1:], Training(batch_size=2, lr=0.1)
    made = Dataset(
        "numbered", TABLE.numpy(), np.zeros(10, int), TABLE.numpy(), np.zeros(10, int), 2
    )
    assert made.task().input_shape == tuple(shape)
    book = ModelBook(made.task(), {"mlp": ("mlp", {"hidden": [4]})}, 0)
    requests = [
        Request(book.make("mlp"), split, [Supervised()], training, 0.01, Rng(k))
        for k, split in enumerate(splits)
    ]
    stacked(requests)
    return [dict(r.model.named_parameters())["head.weight"].detach() for r in requests]


def test_a_stack_reads_the_table_and_nothing_is_taken_out():
    rows = [drawn(), drawn((2, 3, 5))]
    found = trained(*rows)
    assert all("x" not in vars(split) for split in rows)
    apart = trained(*(Split(split.x, split.y) for split in rows))
    assert all(torch.equal(a, b) for a, b in zip(found, apart, strict=True))


def test_who_changes_rows_is_asked_for_them():
    doubled = Doubled(Rows(TABLE, np.array([1, 4, 7])), torch.tensor([0, 1, 0]))
    found = trained(doubled, drawn((2, 3, 5)))
    apart = trained(Split(doubled.x, doubled.y), drawn((2, 3, 5)))
    plain = trained(drawn(), drawn((2, 3, 5)))
    assert torch.equal(found[0], apart[0])
    assert not torch.equal(found[0], plain[0])


def test_noise_is_the_same_whatever_torch_makes_by_default():
    def noise():
        found = torch.zeros(7, dtype=torch.float32)
        Noise(Rng(3), 1.0, "auto").add([found])
        return found

    plain = noise()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(noise(), plain)
    finally:
        torch.set_default_dtype(torch.float32)
