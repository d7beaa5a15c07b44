import copy
import itertools

import pytest
import torch
from torch import nn

from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet, block_of, build, pool, row_major
from fedkd.models.cnn import Halving
from fedkd.models.initial import initialise
from fedkd.models.registries import models
from fedkd.models.resnet import Residual
from fedkd.models.vit import Attention
from fedkd.options import options
from fedkd.rng import Rng
from fedkd.types import Task

FASHION = Task(name="fashion", input_shape=(1, 28, 28), classes=10)
CIFAR = Task(name="cifar", input_shape=(3, 32, 32), classes=10)
DIGITS = Task(name="digits", input_shape=(1, 8, 8), classes=10)
FLAT = Task(name="table", input_shape=(7,), classes=3)


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def tiny() -> BlockNet:
    return BlockNet({"a": nn.Linear(4, 3), "b": nn.ReLU(), "c": nn.Linear(3, 3)}, nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("name", "task", "parameters"),
    [
        ("mlp", FASHION, 199_210),
        ("cnn", FASHION, 215_370),
        ("lenet", FASHION, 61_706),
        ("cnn", DIGITS, 31_050),
        ("mlp", FLAT, 7 * 200 + 200 + 200 * 200 + 200 + 200 * 3 + 3),
    ],
)
def test_sizes_of_known_networks(name, task, parameters):
    assert size(build(name, {}, task, Rng(0))) == parameters


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet8", "vit-tiny"])
def test_no_network_has_a_strided_projection(name):
    for layer in build(name, {}, CIFAR, Rng(0)).modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            assert layer.stride == (1, 1)


def test_a_shortcut_picks_the_pixels_that_a_stride_would():
    residual = Residual(4, 8, 2, groups=2)
    x = torch.randn(3, 4, 7, 6)
    projection, norm = residual.shortcut
    strided = norm(nn.functional.conv2d(x, projection.weight, stride=2))
    hidden = residual.norm2(residual.conv2(residual.norm1(residual.conv1(x)).relu()))
    assert torch.allclose(residual(x), (strided + hidden).relu(), atol=1e-6)


def test_options_shape_the_network():
    net = build("mlp", {"hidden": [5, 6, 4]}, FLAT, Rng(0))
    assert net.names == ("fc1", "fc2", "fc3", "head")
    assert [net.feature_size(FLAT, at) for at in net.names] == [5, 6, 4, 3]
    cnn = build("cnn", {"channels": [2, 3, 4], "hidden": 5}, DIGITS, Rng(0))
    assert cnn.names == ("conv1", "conv2", "conv3", "fc1", "head")
    assert [cnn.feature_size(DIGITS, at) for at in cnn.names] == [2 * 16, 3 * 4, 4, 5, 10]
    vit = build("vit-tiny", {"depth": 2, "width": 8, "heads": 2, "hidden": 3}, DIGITS, Rng(0))
    assert vit.names == ("patches", "block1", "block2", "head")


def test_state_keys_start_with_the_block():
    net = build("resnet8", {}, CIFAR, Rng(0))
    assert {key.split(".")[0] for key in net.state_dict()} == set(net.names)


# ---- features


def test_pool_of_large_maps_is_the_mean_of_cells():
    maps = torch.arange(2 * 3 * 8 * 8, dtype=torch.float64).view(2, 3, 8, 8)
    cells = maps.view(2, 3, 4, 2, 4, 2).mean((3, 5))
    assert torch.equal(pool(maps), cells.flatten(1))


def test_pool_leaves_small_maps_and_vectors_alone():
    small = torch.randn(2, 3, 4, 2, generator=Rng(0).torch())
    assert torch.equal(pool(small), small.flatten(1))
    vectors = small.flatten(1)
    assert torch.equal(pool(vectors), vectors)


def test_pool_ignores_the_memory_format():
    maps = torch.randn(2, 3, 7, 7, generator=Rng(0).torch())
    last = maps.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(pool(maps), pool(last), atol=1e-6)


def test_features_skip_deeper_blocks():
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("a block behind the cut was computed")

    net = BlockNet({"a": nn.Linear(4, 3), "b": Never()}, nn.Linear(3, 2))
    assert net.features(torch.zeros(1, 4), "a").shape == (1, 3)
    with pytest.raises(AssertionError):
        net.features(torch.zeros(1, 4), "b")


def test_gradient_of_features_stops_at_the_cut():
    net = build("cnn", {}, DIGITS, Rng(0))
    net.features(torch.ones(2, 1, 8, 8), "conv2").sum().backward()
    touched = {key.split(".")[0] for key, p in net.named_parameters() if p.grad is not None}
    assert touched == {"conv1", "conv2"}


def test_unknown_block_names_the_nearest():
    net = build("cnn", {}, DIGITS, Rng(0))
    x = torch.zeros(1, 1, 8, 8)
    for call in (
        lambda: net.features(x, "conv3"),
        lambda: net.forward_with_features(x, ["conv1", "conv3"]),
        lambda: net.feature_size(DIGITS, "conv3"),
    ):
        with pytest.raises(ConfigError, match=r"unknown block 'conv3'; did you mean 'conv2'"):
            call()


def test_a_block_used_at_two_places_runs_twice():
    double = nn.Identity()
    calls = []
    double.register_forward_hook(lambda *_: calls.append(1))
    BlockNet({"a": double, "b": double}, nn.Linear(2, 2))(torch.zeros(1, 2))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["head", "features", "a.b", ""])
def test_impossible_block_names(name):
    with pytest.raises(ConfigError, match="cannot be named"):
        BlockNet({name: nn.Identity()}, nn.Linear(2, 2))


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="at least one block"):
        BlockNet({}, nn.Linear(2, 2))


def test_copies_are_independent_and_keep_names():
    net = build("cnn", {}, DIGITS, Rng(0))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert twin.names == net.names
    assert next(net.parameters()).abs().sum() > 0


def test_attention_equals_torchs():
    ours, theirs = Attention(12, heads=3), nn.MultiheadAttention(12, 3, batch_first=True)
    initialise(ours, Rng(0))
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.mix_in.weight)
        theirs.in_proj_bias.copy_(ours.mix_in.bias)
        theirs.out_proj.load_state_dict(ours.mix_out.state_dict())
        x = torch.randn(2, 5, 12, generator=Rng(1).torch())
        assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)


# ---- initial parameters


def test_initial_parameters_follow_the_defaults_of_torch():
    net = build("cnn", {}, FASHION, Rng(3))
    for key, fan_in in {"conv2.0": 16 * 25, "fc1.1": 1568}.items():
        bound = fan_in**-0.5
        weight = net.state_dict()[f"{key}.weight"]
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.99 * bound
        assert abs(weight.std().item() - bound / 3**0.5) < 0.02 * bound
        bias = net.state_dict()[f"{key}.bias"]
        assert 0.5 * bound < bias.abs().max() <= bound


def test_initial_parameters_match_torch_in_distribution():
    ours = build("mlp", {}, FASHION, Rng(0)).state_dict()["fc2.0.weight"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = nn.Linear(200, 200).weight.detach()
    levels = torch.linspace(0.05, 0.95, 19)
    gap = torch.quantile(ours.flatten(), levels) - torch.quantile(theirs.flatten(), levels)
    assert gap.abs().max() < 0.03 * theirs.max()


def test_initial_norms_and_positions():
    vit = build("vit-tiny", {}, CIFAR, Rng(0)).state_dict()
    assert torch.equal(vit["block1.norm1.weight"], torch.ones(64))
    assert torch.equal(vit["block1.norm1.bias"], torch.zeros(64))
    assert abs(vit["patches.positions.position"].std().item() - 0.02) < 0.001
    resnet = build("resnet8", {}, CIFAR, Rng(0)).state_dict()
    assert torch.equal(resnet["stage2.norm2.weight"], torch.ones(32))


def test_each_parameter_has_its_own_stream():
    # Equal layers at different places, or behind a different body, must not share or shift draws.
    net = build("mlp", {"hidden": [8, 8, 8]}, FLAT, Rng(0)).state_dict()
    assert not torch.equal(net["fc2.0.weight"], net["fc3.0.weight"])
    deeper = build("mlp", {"hidden": [8, 8, 8, 8]}, FLAT, Rng(0)).state_dict()
    assert torch.equal(net["fc3.0.weight"], deeper["fc3.0.weight"])


def test_initial_values_do_not_depend_on_precision_or_memory_format():
    plain, other = nn.Conv2d(3, 4, 5), nn.Conv2d(3, 4, 5).double()
    other.to(memory_format=torch.channels_last)
    initialise(plain, Rng(1))
    initialise(other, Rng(1))
    assert torch.equal(plain.weight.double(), other.weight)


def test_convolutions_are_channels_last():
    net = build("cnn", {}, FASHION, Rng(0))
    maps = net.conv1(torch.zeros(2, 1, 28, 28))
    assert maps.is_contiguous(memory_format=torch.channels_last)


def test_row_major_changes_the_format_but_no_value():
    net = build("cnn", {}, CIFAR, Rng(0))
    before = copy.deepcopy(net)
    x = torch.zeros(2, 3, 32, 32)
    assert not net.conv1(x).is_contiguous()
    assert row_major(net).conv1(x).is_contiguous()
    for key, value in before.state_dict().items():
        assert torch.equal(value, net.state_dict()[key])


@pytest.mark.parametrize("layer", [nn.PReLU(), nn.Bilinear(2, 2, 2)])
def test_layers_without_known_initial_values_are_refused(layer):
    with pytest.raises(ConfigError, match=type(layer).__name__):
        initialise(layer, Rng(0))


# ---- bad input


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet8", "vit-tiny"])
def test_image_models_refuse_flat_inputs(name):
    with pytest.raises(ConfigError, match=r"needs images .*\(7,\); use model 'mlp'"):
        build(name, {}, FLAT, Rng(0))


@pytest.mark.parametrize(("name", "side"), [("cnn", 3), ("lenet", 11), ("resnet8", 3)])
def test_image_models_refuse_small_images(name, side):
    small = Task(name="small", input_shape=(1, side, side), classes=2)
    with pytest.raises(ConfigError, match=f"at least .* has {side}x{side}"):
        build(name, {}, small, Rng(0))
    fits = Task(name="fits", input_shape=(1, side + 1, side + 1), classes=2)
    assert build(name, {}, fits, Rng(0))(torch.zeros(1, *fits.input_shape)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("cnnn", {}, "unknown model 'cnnn'; did you mean 'cnn'"),
        ("cnn", {"hiden": 3}, "unknown key 'model.hiden'; did you mean 'hidden'"),
        ("cnn", {"channels": []}, "model.channels"),
        ("cnn", {"channels": [0]}, "model.channels.0 = 0"),
        ("mlp", {"hidden": "many"}, "model.hidden = 'many'"),
        ("resnet8", {"groups": 3}, "groups = 3 does not divide width = 16"),
        ("vit-tiny", {"heads": 7}, "not a multiple of heads = 7; use 63"),
        ("vit-tiny", {"patch": 3}, "allowed: 1, 2, 4, 8"),
    ],
)
def test_bad_options_say_what_and_how(name, values, message):
    with pytest.raises(ConfigError) as caught:
        build(name, values, DIGITS, Rng(0))
    assert message in str(caught.value)


@pytest.fixture
def drop_in():
    """Registers one more model for the length of a test."""
    models.names()
    before = dict(models._items)
    counter = itertools.count()

    def add(make):
        name = f"drop-in-{next(counter)}"

        class DropIn:
            def build(self, task):
                return make(task)

        DropIn.__qualname__ = name
        models.register(name)(options(DropIn))
        return name

    yield add
    models._items.clear()
    models._items.update(before)


def test_buffers_and_shared_parameters_are_refused(drop_in):
    name = drop_in(lambda task: BlockNet({"norm": nn.BatchNorm1d(7)}, nn.Linear(7, 3)))
    with pytest.raises(ConfigError, match=r"buffer 'norm.running_mean'.*GroupNorm"):
        build(name, {}, FLAT, Rng(0))

    def shared(task):
        layer = nn.Linear(7, 7)
        return BlockNet({"a": layer, "b": layer}, nn.Linear(7, 3))

    with pytest.raises(ConfigError, match=r"one parameter twice, the second time as 'b.weight'"):
        build(drop_in(shared), {}, FLAT, Rng(0))


def test_own_blocks_work(drop_in):
    name = drop_in(lambda task: tiny())
    net = build(name, {}, Task(name="t", input_shape=(4,), classes=2), Rng(0))
    assert net.names == ("a", "b", "c", "head")
    assert net(torch.zeros(5, 4)).shape == (5, 2)


# ---- cut in two


CUTS = [
    (m, b)
    for m, blocks in {
        "mlp": ["fc1", "fc2"],
        "cnn": ["conv1", "fc1"],
        "resnet8": ["stem", "stage3"],
        "vit-tiny": ["patches", "block4"],
    }.items()
    for b in blocks
]


@pytest.mark.parametrize(("name", "at"), CUTS)
def test_the_two_sides_of_a_cut_are_the_network(name, at):
    net = build(name, {}, DIGITS, Rng(0)).eval()
    x = torch.randn(3, 1, 8, 8, generator=Rng(1).torch())
    hidden = net.raw_features(x, at)
    assert torch.equal(pool(hidden), net.features(x, at))
    assert torch.equal(net.behind(at)(hidden), net(x))
    assert torch.equal(net.up_to(at, net.head).raw_features(x, at), hidden)


def test_the_sides_of_a_cut_share_parameters_under_their_names():
    net = build("mlp", {"hidden": [5, 4, 3]}, FLAT, Rng(0))
    edge, rest = net.up_to("fc2", nn.Linear(4, 3)), net.behind("fc2")
    assert edge.names == ("fc1", "fc2", "head")
    assert rest.names == ("fc2", "fc3", "head")
    own = dict(net.named_parameters())
    for key, parameter in rest.named_parameters():
        assert parameter is own.pop(key)
    for key, parameter in edge.named_parameters():
        assert (parameter is own.pop(key)) if block_of(key) != "head" else key not in own
    assert own == {}


def test_behind_the_last_block_there_is_the_head_alone():
    net = build("mlp", {"hidden": [5, 4]}, FLAT, Rng(0))
    assert [k for k, _ in net.behind("fc2").named_parameters()] == ["head.weight", "head.bias"]


def test_a_network_cannot_be_cut_at_its_head_or_at_no_block():
    net = build("cnn", {}, DIGITS, Rng(0))
    for call in (lambda: net.up_to("conv3", net.head), lambda: net.behind("conv3")):
        with pytest.raises(ConfigError, match=r"unknown block 'conv3'; did you mean 'conv2'"):
            call()
    for call in (lambda: net.up_to("head", net.head), lambda: net.behind("head")):
        with pytest.raises(ConfigError, match=r"unknown block 'head'.*allowed: conv1, conv2, fc1"):
            call()
    with pytest.raises(ConfigError, match=r"unknown block 'conv3'; did you mean 'conv2'"):
        net.raw_features(torch.zeros(1, 1, 8, 8), "conv3")


@pytest.mark.parametrize("shape", [(5, 3, 8, 6), (2, 4, 7, 9), (0, 2, 4, 4), (3, 4, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_gives_the_same_with_and_without_gradients(shape, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x[x > 1.0] = float("nan")
    if x.dim() == 4:
        x = x.to(memory_format=layout)
    learning = Halving()(x)
    with torch.inference_mode():
        plain = Halving()(x)
    assert plain.shape == learning.shape
    assert torch.equal(torch.isnan(plain), torch.isnan(learning))
    assert torch.equal(plain.nan_to_num(), learning.nan_to_num())
    with torch.no_grad():
        many = torch.func.vmap(Halving())(x.expand(2, *shape))
    assert torch.equal(many[1].nan_to_num(), plain.nan_to_num())
