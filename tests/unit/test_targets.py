"""Soft targets by class and by example."""

import torch

from fedkd.distill.targets import ClassTargets, SampleTargets


def test_class_targets_go_by_label():
    probs = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    targets = ClassTargets(probs, torch.tensor([True, False, True]))
    y, index = torch.tensor([2, 1, 0, 2]), torch.tensor([9, 8, 7, 6])
    found, mask = targets(y, index)
    assert torch.equal(found, probs[y])
    assert mask.tolist() == [True, False, True, True]


def test_sample_targets_go_by_position_and_all_have_one():
    probs = torch.arange(12.0).reshape(4, 3)
    found, mask = SampleTargets(probs)(torch.tensor([0, 0]), torch.tensor([3, 1]))
    assert found.tolist() == [[9.0, 10.0, 11.0], [3.0, 4.0, 5.0]]
    assert mask.tolist() == [True, True]
