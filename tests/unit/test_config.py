"""Experiments: TOML and overrides in, messages that help out, a digest of what matters."""

import dataclasses
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.config import Component, experiment, load, override, parse
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError

FULL = {
    "name": "all-of-it",
    "seed": 3,
    "seeds": [1, 2],
    "rounds": 7,
    "strategy": {"name": "fedd2s", "reading": "cut", "cuts": ["fc2", "fc1"], "temperature": 2.5},
    "model": {"name": "mlp", "hidden": [16, 12]},
    "data": {
        "source": {"name": "digits", "limit": 100},
        "partition": {"name": "dirichlet", "alpha": 0.3},
        "validation": 0.2,
    },
    "clients": {
        "count": 5,
        "participation": {"scheme": "poisson", "ratio": 0.3},
        "training": {"lr": 0.01, "optimizer": "adam", "schedule": "cosine"},
        "models": ["cnn", {"name": "mlp", "hidden": [8]}],
    },
    "engine": {"executor": "serial", "workers": 1},
    "evaluate": {"every": 2},
    "compare": {"fedavg + ft": {"strategy": "fedavg-ft", "clients.training.lr": 0.5}},
}


@pytest.mark.parametrize("table", [{}, FULL], ids=["defaults", "everything"])
def test_toml_and_back(table):
    made = experiment(table)
    assert experiment(tomllib.loads(made.toml())) == made
    assert experiment(made.table()) == made
    assert experiment(tomllib.loads(made.toml())).digest() == made.digest()


def test_frozen():
    made = experiment({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.rounds = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.clients.training.lr = 3.0


def test_the_table_given_is_left_alone():
    table = {"strategy": "fedavg", "clients": {"count": 3}}
    experiment(table)
    load(None, ["rounds=3"])
    assert table == {"strategy": "fedavg", "clients": {"count": 3}}


def test_overrides_win_and_names_become_tables():
    made = load(
        None,
        [
            "strategy=fedprox",
            "strategy.mu=0.5",
            "clients.training.lr=0.3",
            "clients.count=7",
            "data.partition=iid",
            "seeds=0,1,2",
            "name=x",
        ],
    )
    assert made.strategy == Component("fedprox", {"mu": 0.5})
    assert made.clients.training.lr == 0.3
    assert made.clients.count == 7
    assert made.data.partition == Component("iid")
    assert made.seeds == (0, 1, 2)


def test_a_new_name_drops_the_old_ones_options():
    table = {"strategy": {"name": "fedprox", "mu": 0.5}}
    override(table, "strategy", "fedavg")
    assert experiment(table).strategy == Component("fedavg")
    override(table, "strategy", {"name": "fedper", "personal_layers": 2})
    assert experiment(table).strategy == Component("fedper", {"personal_layers": 2})


def test_tables_are_merged_into_tables():
    table = {"clients": {"training": {"lr": 0.1, "momentum": 0.5}}}
    override(table, "clients", {"training": {"lr": 0.2}})
    assert table == {"clients": {"training": {"lr": 0.2, "momentum": 0.5}}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-3", 1e-3),
        ("false", False),
        ("fedavg", "fedavg"),
        ('"1"', "1"),
        ("[1, 2]", [1, 2]),
        ("fc1,conv2", ["fc1", "conv2"]),
        ("0,1", [0, 1]),
        ("", ""),
        ("{ name = 'mlp' }", {"name": "mlp"}),
    ],
)
def test_values_of_overrides(text, value):
    assert parse(text) == value
    assert type(parse(text)) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["round=5"], r"unknown key 'round'; did you mean 'rounds'\?"),
        (["clients.participation.ration=1"], r"clients\.participation.*ratio"),
        (["clients.participation.ratio=1.5"], r"clients\.participation\.ratio = 1\.5.*1"),
        (["rounds=0"], r"rounds = 0: .*greater than or equal to 1"),
        (["rounds=many"], r"rounds = 'many': .*integer"),
        (["clients.training.optimizer=lion"], r"optimizer = 'lion': .*'sgd' or 'adam'"),
        (["name=../x"], r"name = '\.\./x'"),
        (["rounds"], r"'rounds' is not an override; write key\.sub=value"),
        (["=5"], "is not an override"),
        (["rounds.x=5", "rounds.x.y=5"], "cannot set 'rounds.x.y': 'x' holds 5"),
        (["clients=nowhere"], r"unknown clients preset 'nowhere'"),
        (["data.validation=1"], r"data\.validation = 1.*less than 1"),
    ],
)
def test_bad_input_is_answered_with_key_rule_and_nearest_match(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(None, overrides)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "fedavgg"}, r"unknown strategy 'fedavgg'; did you mean 'fedavg'\?"),
        ({"strategy.weight": 1}, r"unknown key 'strategy\.weight'; did you mean 'weighting'\?"),
        ({"model": "cnnn"}, r"unknown model 'cnnn'; did you mean 'cnn'\?"),
        ({"model.hiden": 1}, r"hiden.*did you mean 'hidden'\?"),
        ({"data.source": "digit"}, r"'digit'; did you mean 'digits'\?"),
        ({"data.partition": "dirichle"}, r"'dirichle'; did you mean 'dirichlet'\?"),
        ({"data.partition.alpha": 0}, r"data\.partition\.alpha = 0"),
        ({"privacy": "strong"}, r"unknown privacy preset 'strong'"),
        ({"engine.device": "cuda"}, "CUDA|cuda"),
    ],
)
def test_what_does_not_exist_is_found_before_round_one(changes, message, tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        prepare(tiny("fedavg", changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reading": "cut", "cuts": ["fc9"]}, r"cuts names 'fc9', which model 'mlp' does not have"),
        ({"reading": "cut", "cuts": ["fc1", "fc2"]}, "deep to shallow"),
        ({"reading": "cut", "cuts": ["fc1", "fc1"]}, "each point once"),
        ({"reading": "averaging", "predict": "ensemble"}, "needs a global head"),
        ({"reading": "cut", "cuts": ["output"], "predict": "global_head"}, "no global head"),
        ({"reading": "up_to_cut", "cuts": ["output"], "predict": "ensemble"}, "no global head"),
        ({"objective": "kl-div"}, r"unknown objective 'kl-div'"),
    ],
)
def test_impossible_fedd2s_settings_are_refused(options, message, tiny):
    with pytest.raises(ConfigError, match=message):
        prepare(tiny({"name": "fedd2s", **options}))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no experiment file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text("rounds = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(bad)


def test_a_file_gives_its_name(tmp_path):
    file = tmp_path / "my run (1).toml"
    file.write_text("rounds = 4\n")
    made = load(file, ["rounds=5"])
    assert (made.name, made.rounds) == ("my-run--1", 5)


def shuffled(table, draw):
    keys = draw(st.permutations(list(table)))
    return {k: shuffled(table[k], draw) if isinstance(table[k], dict) else table[k] for k in keys}


@given(st.data())
def test_the_digest_does_not_depend_on_order(data):
    assert experiment(shuffled(FULL, data.draw)).digest() == experiment(FULL).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"engine.executor": "thread"},
        {"engine.workers": 3},
        {"engine.checkpoint_every": 9},
        {"seeds": [4, 5]},
        {"compare": {"a": {"strategy": "ditto"}}},
    ],
    ids=str,
)
def test_the_digest_ignores_what_changes_no_result(change):
    assert changed(change).digest() == experiment(FULL).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"rounds": 8},
        {"strategy.temperature": 2.6},
        {"strategy": "fedavg"},
        {"model.hidden": [16, 13]},
        {"data.source.limit": 101},
        {"data.partition.alpha": 0.31},
        {"data.validation": 0.21},
        {"clients.count": 6},
        {"clients.participation.ratio": 0.31},
        {"clients.training.lr": 0.011},
        {"clients.training.momentum": 0.1},
        {"clients.models": ["cnn"]},
        {"evaluate.every": 3},
    ],
    ids=str,
)
def test_the_digest_sees_every_hyper_parameter(change):
    assert changed(change).digest() != experiment(FULL).digest()


def changed(changes):
    table = experiment(FULL).table()
    for key, value in changes.items():
        override(table, key, value)
    return experiment(table)


def test_cells_are_this_run_and_the_compared_ones_for_each_seed():
    cells = list(experiment(FULL).cells())
    assert [(c.label, c.seed) for c in cells] == [
        ("fedd2s", 1),
        ("fedd2s", 2),
        ("fedavg + ft", 1),
        ("fedavg + ft", 2),
    ]
    first, other = cells[0].experiment, cells[2].experiment
    assert (first.seed, first.seeds, first.compare) == (1, (), {})
    assert other.strategy == Component("fedavg-ft")
    assert (other.clients.training.lr, first.clients.training.lr) == (0.5, 0.01)
    assert other.data == first.data
    assert len({c.experiment.digest() for c in cells}) == 4


def test_a_bad_variant_is_named():
    with pytest.raises(ConfigError, match=r"compare\.odd.*rouds"):
        list(experiment({"compare": {"odd": {"rouds": 3}}}).cells())


@pytest.mark.parametrize(
    ("given", "displaced"),
    [
        (["privacy.noise_multiplier=1.0"], "epsilon"),
        (["privacy.epsilon=2.0"], "noise_multiplier"),
        (["privacy.epsilon=2.0", "privacy.noise_multiplier=1.0"], "delta"),
    ],
)
def test_what_is_given_displaces_one_of_three_in_a_privacy_preset(given, displaced):
    found = load(None, ["privacy=client-eps8", *given]).privacy
    names = ("epsilon", "noise_multiplier", "delta")
    assert [name for name in names if getattr(found, name) is None] == [displaced]


def test_a_misspelt_option_of_an_inner_table_has_a_nearest_match():
    with pytest.raises(ConfigError, match="norn'; did you mean 'norm'"):
        load(None, ["privacy.clipping.norn=1"])
