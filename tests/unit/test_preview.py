import numpy as np
import pytest

from fedkd.data.federated import Federation
from fedkd.data.partition import divide
from fedkd.data.preview import plot_labels
from fedkd.data.registries import partitions, sources
from fedkd.rng import Rng


def test_a_federation_is_drawn_as_png_and_pdf(tmp_path):
    data = sources.get("digits")().load()
    partition = divide(data, partitions.get("dirichlet")(), 6, Rng(0))
    federation = Federation.build(data, partition, rng=Rng(0))
    files = plot_labels(federation, data.class_names, tmp_path / "plots" / "labels.v1", "digits")
    assert [f.name for f in files] == ["labels.v1.png", "labels.v1.pdf"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert files[1].read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("shape", [(1, 2), (60, 30)])
def test_any_number_of_clients_and_classes_can_be_drawn(tmp_path, shape):
    counts = Rng(0).numpy().integers(0, 50, shape)
    first, second = (plot_labels(counts, (), tmp_path / name, "")[1] for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_nobody_holding_anything_can_be_drawn(tmp_path):
    assert all(f.is_file() for f in plot_labels(np.zeros((3, 4), int), (), tmp_path / "none"))
