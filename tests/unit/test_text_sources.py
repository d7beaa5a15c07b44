"""Texts become rows that cover them, each owner's last ones kept for testing."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkd.data import hub
from fedkd.data import text as text_module
from fedkd.data.federated import UNLABELLED, Federation
from fedkd.data.partition import divide
from fedkd.data.public import foreign_pool, take_public
from fedkd.data.registries import partitions, sources
from fedkd.data.roles import from_windows, read_roles
from fedkd.data.text_sources import PydocTopics, Shakespeare, cut, divide_rows
from fedkd.errors import ConfigError, DataError
from fedkd.options import build, describe
from fedkd.rng import Rng

ROLES = Path(__file__).parents[3] / "shared" / "data" / "shakespeare_roles.jsonl.gz"
real = pytest.mark.skipif(not ROLES.is_file(), reason="the roles of Shakespeare are not here")
TEXTS = {
    "hamlet/HAMLET": "To be, or not to be: that is the question:\n" * 40,
    "hamlet/GHOST": "Adieu, adieu! Hamlet, remember me.\n" * 25,
    "lear/FOOL": "Nuncle, " * 12,
    "lear/SERVANT": "Ay.",
}


def written(tmp_path, texts=None, name="roles.jsonl"):
    lines = [
        json.dumps({"play": o.split("/")[0], "role": o.split("/")[1], "text": t})
        for o, t in (TEXTS if texts is None else texts).items()
    ]
    content = ("\n".join(lines) + "\n").encode()
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(file)


def load(tmp_path, **values):
    return build(Shakespeare, {"path": written(tmp_path), "length": 16, **values}).load()


def of(data, owner):
    """The training and test rows of one owner, in order."""
    return data.train_x[data.train_ids == owner], data.test_x[data.test_ids == owner]


@given(n=st.integers(0, 60), length=st.integers(1, 12))
def test_rows_predict_every_token_but_the_first_once(n, length):
    tokens = np.arange(1, n + 1)
    rows = cut(tokens, length)
    assert rows.dtype == np.int64 and rows.shape == (max(0, -(-(n - 1) // length)), length + 1)
    predicted = rows[:, 1:].ravel()
    assert predicted[predicted > 0].tolist() == tokens[1:].tolist()
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])
    assert (rows[:-1] > 0).all() and (rows[-1:, :2] > 0).all()
    if len(rows):
        assert rows[0, 0] == 1


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5), share=st.floats(0.01, 0.99))
def test_the_last_rows_of_each_owner_are_its_test_rows(sizes, share):
    owned = {f"o{i}": 100 * i + np.arange(3 * n).reshape(n, 3) for i, n in enumerate(sizes)}
    if max(sizes) < 2:
        return
    train, test = divide_rows(owned, share)
    for owner, rows in owned.items():
        mine, held = (x[ids == owner] for x, ids in (train, test))
        assert np.array_equal(np.concatenate([mine, held]), rows)
        assert len(mine) >= 1 and (len(rows) == 1 or len(held) >= 1)
        assert abs(len(held) - share * len(rows)) <= 1
    assert train[1].tolist() == sorted(train[1])


def test_the_rows_of_a_role_are_its_text(tmp_path):
    data = load(tmp_path)
    assert data.name == "shakespeare" and data.classes == 98 and len(data.class_names) == 98
    assert not data.train_y.any() and not data.test_y.any()
    assert data.task().sequence and data.task().input_shape == (16,)
    owners = ["hamlet/GHOST", "hamlet/HAMLET", "lear/FOOL"]
    assert np.unique(data.train_ids).tolist() == np.unique(data.test_ids).tolist() == owners
    for owner in owners:
        train, test = of(data, owner)
        rows = np.concatenate([train, test])
        text = data.tokenizer.decode(rows[0, :1]) + data.tokenizer.decode(rows[:, 1:])
        assert text == TEXTS[owner]
        assert len(test) == round(0.2 * len(rows))
        # What the last training row predicts last is what the first test row reads first.
        assert train[-1, -1] == test[0, 0]


def test_roles_with_most_text_and_the_first_rows_are_kept(tmp_path):
    everything, some = load(tmp_path), load(tmp_path, roles=2, rows_per_role=10)
    assert np.unique(some.train_ids).tolist() == ["hamlet/GHOST", "hamlet/HAMLET"]
    for owner in np.unique(some.train_ids):
        train, test = of(some, owner)
        assert (len(train), len(test)) == (8, 2)
        assert np.array_equal(np.concatenate([train, test]), of(everything, owner)[0][:10])
    assert set(load(tmp_path, min_rows=1).train_ids) == set(everything.train_ids) | {"lear/SERVANT"}
    assert set(load(tmp_path, min_rows=50).train_ids) == {"hamlet/GHOST", "hamlet/HAMLET"}


def test_limits_and_repetition(tmp_path):
    data, again = load(tmp_path), load(tmp_path)
    assert data.fingerprint() == again.fingerprint()
    small = load(tmp_path, limit=30, test_limit=7)
    assert (len(small.train_x), len(small.test_x)) == (30, 7)
    assert {x.tobytes() for x in small.train_x} <= {x.tobytes() for x in data.train_x}
    assert small.fingerprint() == data.limited(30, 7).fingerprint()


def test_the_tokenizer_is_the_one_that_is_named(tmp_path):
    pieces = load(tmp_path, tokenizer="wordpiece", tokenizer_options={"size": 150})
    assert pieces.classes == len(pieces.class_names) == 150
    assert len(pieces.train_x) < len(load(tmp_path).train_x)
    assert load(tmp_path, tokenizer_options={"lowercase": True}).classes == 72
    with pytest.raises(ConfigError, match="unknown tokenizer 'chars'; did you mean 'char'"):
        load(tmp_path, tokenizer="chars")
    with pytest.raises(ConfigError, match=r"unknown key 'tokenizer_options\.sise'; did you mean"):
        load(tmp_path, tokenizer="wordpiece", tokenizer_options={"sise": 150})
    with pytest.raises(ConfigError, match=r"tokenizer_options\.size = 5: Input should be greater"):
        load(tmp_path, tokenizer="wordpiece", tokenizer_options={"size": 5})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"length": 5000}, r"no text left: none of 4 owners has min_rows = 2 rows of 5001 tokens"),
        ({"roles": 4}, "4 owners are asked for, but 3 of 4 have 2 rows"),
        ({"rows_per_role": 1}, "no owner has two rows"),
    ],
)
def test_too_little_text_is_refused(tmp_path, values, words):
    with pytest.raises(DataError, match=words):
        load(tmp_path, **values)


def test_ranges_and_defaults_are_shown(tmp_path):
    shown = {doc.name: doc for doc in describe(Shakespeare)}
    assert shown["tokenizer_options"].default == "{}" and shown["length"].default == "64"
    for values in ({"length": 0}, {"test_share": 0}, {"test_share": 1}, {"roles": -1}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            build(Shakespeare, values)


def test_gzip_and_plain_are_the_same_and_parts_of_a_role_are_joined(tmp_path):
    assert read_roles(written(tmp_path)) == read_roles(written(tmp_path, name="a.jsonl.gz"))
    assert read_roles(written(tmp_path)) == TEXTS
    file = tmp_path / "twice.jsonl"
    line = json.dumps({"play": "p", "role": "r", "text": "x\u2028y", "more": 1}, ensure_ascii=False)
    file.write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    assert read_roles(str(file)) == {"p/r": "x\u2028y\nx\u2028y"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'play': 1}", "line 2 is not JSON.*expected"),
        ('["a"]', "line 2 is no object but list"),
        ('{"play": "a", "rolle": "b", "text": "c"}', "line 2 has no key 'role'; did you mean 'rol"),
        ("{}", r"line 2 has no key 'play' \(found: nothing\)"),
        ('{"play": "a", "role": "b", "text": null}', "line 2: text is None"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    file = tmp_path / "roles.jsonl"
    file.write_text('{"play": "a", "role": "b", "text": "c"}\n' + line + "\n")
    with pytest.raises(DataError, match=words):
        Shakespeare(path=str(file)).load()


def test_missing_and_damaged_files_are_named(tmp_path):
    absent = Shakespeare(path=str(tmp_path / "none.jsonl"))
    assert "none.jsonl" in absent.missing()
    with pytest.raises(DataError, match="there is no such file"):
        absent.load()
    packed = Path(written(tmp_path, name="roles.jsonl.gz"))
    assert Shakespeare(path=str(packed)).missing() == ""
    for name, content in [
        ("plain.jsonl.gz", b'{"play": 1}'),
        ("half.jsonl.gz", packed.read_bytes()[:-20]),
        ("flipped.jsonl.gz", packed.read_bytes()[:12] + b"\xff\xff" + packed.read_bytes()[14:]),
        ("packed.jsonl", packed.read_bytes()),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} is no .*UTF-8 text"):
            Shakespeare(path=str(tmp_path / name)).load()
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no text left: none of 0 owners"):
        Shakespeare(path=str(tmp_path / "empty.jsonl")).load()
    with pytest.raises(DataError, match="name two places"):
        Shakespeare(path=str(packed), folder=str(tmp_path)).load()


def test_without_a_file_the_hub_is_asked(monkeypatch):
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"flwrlabs/shakespeare needs an extra: pip install"):
        Shakespeare().load()
    assert "flwrlabs/shakespeare" in Shakespeare().missing()
    assert "file of roles as path" in Shakespeare().missing()


def windows(texts, step=1, width=80):
    """The texts as LEAF's windows: the character that follows each, owners one by one."""
    rows = [
        (owner, text[i : i + width], text[i + width])
        for owner, text in texts.items()
        for i in range(0, len(text) - width, step)
    ]
    return rows


def arrow(rows):
    pa = pytest.importorskip("pyarrow", reason="needs the extra fedkd[datasets]")
    columns = [list(column) for column in zip(*rows, strict=True)]
    return pa.table(dict(zip(("character_id", "x", "y"), columns, strict=True)))


LONG = {
    "A_B": " ".join(f"{n * n} of clubs" for n in range(60)),
    "A_C": "".join(map(str, range(90))),
}


@pytest.mark.parametrize("step", [1, 7, 40])
def test_windows_are_put_together_again(step):
    texts = from_windows(arrow(windows(LONG, step)))
    assert texts.keys() == LONG.keys()
    for owner, text in texts.items():
        assert LONG[owner].startswith(text) and len(LONG[owner]) - len(text) < step


def test_mixed_owners_and_a_gap_are_no_matter_but_shuffled_windows_are_refused():
    rows = windows(LONG)
    mixed = sorted(rows, key=lambda row: row[0] == "A_B")
    assert from_windows(arrow(mixed)) == LONG
    # Forty windows are lost: the next one still overlaps; of a hundred, a new passage begins.
    assert from_windows(arrow(rows[:50] + rows[90:])) == LONG
    torn = from_windows(arrow(rows[:50] + rows[150:]))["A_B"]
    assert torn == LONG["A_B"][:130] + "\n" + LONG["A_B"][150:]
    shuffled = [rows[i] for i in Rng(0).numpy().permutation(len(rows))]
    with pytest.raises(DataError, match="do not continue the one before them"):
        from_windows(arrow(shuffled))


def test_windows_from_a_folder_become_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra fedkd[datasets]")
    parquet.write_table(arrow(windows(LONG)), tmp_path / "train-00000-of-00001.parquet")
    data = Shakespeare(folder=str(tmp_path), length=16).load()
    roles = {f"{owner}/x": text for owner, text in LONG.items()}
    same = Shakespeare(path=written(tmp_path, roles), length=16).load()
    assert np.array_equal(data.train_x, same.train_x) and np.array_equal(data.test_x, same.test_x)
    assert np.unique(data.train_ids).tolist() == ["A_B", "A_C"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.rename_columns(["id", "x", "y"]), "no column 'character_id'.*found: id, x, y"),
        (lambda t: t.set_column(2, "y", [[None] * len(t)]), "row 0 holds .*None.*expected three"),
    ],
)
def test_other_columns_are_refused(change, words):
    with pytest.raises(DataError, match=words):
        from_windows(change(arrow(windows(LONG))))


def test_topics_are_public_text_with_an_owner_each(monkeypatch):
    data = sources.get("pydoc-topics")(rows_per_topic=20).load()
    assert data.name == "pydoc-topics" and data.train_x.shape[1] == 65
    topics = text_module.public_topics()
    assert set(np.unique(data.train_ids)) <= topics.keys()
    owner = max(topics, key=lambda name: len(topics[name]))
    first = data.tokenizer.decode(of(data, owner)[0][0])
    foreign = text_module.FOREIGN.sub(text_module.UNKNOWN, topics[owner])
    assert foreign.startswith(first) and len(first) == 65
    assert PydocTopics(topics=3, rows_per_topic=5).load().train_x.shape == (12, 65)
    assert PydocTopics().missing() == ""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "pydoc_data.topics" in PydocTopics().missing()


def test_natural_clients_are_roles_and_predict_the_next_token(tmp_path):
    data = load(tmp_path, rows_per_role=30, tokenizer="wordpiece")
    owners = np.unique(data.train_ids)
    partition = divide(data, partitions.get("natural")(), len(owners), Rng(0))
    made = Federation.build(data, partition, validation=0.1, rng=Rng(1))
    for k, owner in enumerate(owners):
        assert set(data.train_ids[partition.train[k]]) == {owner}
        assert set(data.test_ids[partition.test[k]]) == {owner}
        mine = made.client(k)
        assert mine.train.x.shape == mine.train.y.shape and mine.train.x.dtype == torch.int64
        assert torch.equal(mine.train.x[:, 1:][mine.train.y[:, :-1] >= 0],
                           mine.train.y[:, :-1][mine.train.y[:, :-1] >= 0])  # fmt: skip
        # Only the last row of a text has an end, and nothing is predicted behind it.
        ended = (mine.test.y == UNLABELLED).any(1)
        assert ended.sum() <= 1 and (mine.test.y[ended][:, 0] >= 0).all()
    assert len(made.global_test()) == len(data.test_x)


def test_each_source_can_be_the_others_public_pool(tmp_path):
    roles = load(tmp_path, length=64)
    topics = PydocTopics(rows_per_topic=8).load()
    for mine, other in ((roles, topics), (topics, roles)):
        pool = foreign_pool(other, mine.task(), 15, Rng(0))
        assert pool.x.shape == (15, 64) and (pool.x < mine.classes).all()
        known = {row[:-1].tobytes() for row in other.train_x}
        assert all(row.numpy().tobytes() in known for row in pool.x)
    rest, pool = take_public(roles, 5, Rng(0))
    assert len(rest.train_x) == len(roles.train_x) - 5 and len(pool) == 5
    pieces = PydocTopics(tokenizer="wordpiece", rows_per_topic=4).load()
    with pytest.raises(DataError, match="give both sources the same tokenizer"):
        foreign_pool(pieces, roles.task(), 5, Rng(0))
    with pytest.raises(DataError, match=r"shape \(64,\), but an input of 'shakespeare'.*\(16,\)"):
        foreign_pool(topics, load(tmp_path).task(), 5, Rng(0))


@real
def test_the_roles_of_35_plays_are_all_there():
    data = Shakespeare(path=str(ROLES)).load()
    texts = read_roles(str(ROLES))
    assert len(texts) == 588 and len({owner.split("/")[0] for owner in texts}) == 35
    assert set(data.train_ids) == set(data.test_ids) == set(texts)
    predicted = (data.train_x[:, 1:] > 0).sum() + (data.test_x[:, 1:] > 0).sum()
    assert predicted == sum(len(text) - 1 for text in texts.values())
    assert data.class_names.index("\N{REPLACEMENT CHARACTER}") not in data.train_x


@real
def test_pieces_write_the_roles_exactly_and_shorter():
    data = Shakespeare(path=str(ROLES), tokenizer="wordpiece", roles=4, rows_per_role=50).load()
    texts = read_roles(str(ROLES))
    for owner in np.unique(data.train_ids):
        rows = np.concatenate(of(data, owner))
        text = data.tokenizer.decode(rows[0, :1]) + data.tokenizer.decode(rows[:, 1:])
        assert texts[owner].startswith(text) and len(text) > 1.5 * rows[:, 1:].size
