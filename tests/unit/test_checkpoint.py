from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.engine.checkpoint import MANIFEST, Checkpoint, from_bytes, to_bytes
from fedkd.errors import CheckpointError, RunError
from fedkd.types import Arrays

SERVER: Arrays = {"model/w": np.arange(6, dtype=np.float32).reshape(2, 3), "model/n": np.array(7)}


def client(value: float) -> Arrays:
    return {"model/w": np.full(5, value)}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: Arrays, b: Arrays) -> bool:
    return list(a) == list(b) and all(
        (a[k].dtype, a[k].shape, a[k].tobytes()) == (b[k].dtype, b[k].shape, b[k].tobytes())
        for k in a
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Checkpoint(tmp_path, "abc").save(3, SERVER, {0: client(0), 11: client(1)}, {"spent": 0.1})
    return tmp_path


def test_state_comes_back(saved: Path) -> None:
    loaded = Checkpoint(saved, "abc").load()
    assert loaded is not None
    assert (loaded.round, loaded.extra) == (3, {"spent": 0.1})
    assert same(loaded.server, SERVER)
    assert list(loaded.clients) == [0, 11]
    assert same(loaded.clients[11], client(1))
    loaded.server["model/w"][0, 0] = 5


def test_empty_folder_has_no_state(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path).load() is None
    assert Checkpoint(tmp_path / "nowhere").load() is None


def test_arrays_of_any_layout_are_exact_and_keep_their_order() -> None:
    arrays = {
        "z": np.array(1.5),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(10, dtype=np.uint8)[::3],
        "": np.zeros((0, 2), np.int64),
        "ü/ 😀": np.array([True, False]),
        "a": np.array([np.nan, -0.0], np.float16),
    }
    back = from_bytes(to_bytes(arrays))
    assert same(back, {key: np.ascontiguousarray(a).reshape(a.shape) for key, a in arrays.items()})
    assert from_bytes(to_bytes({})) == {}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text().filter(lambda k: k != "__metadata__"), unique=True, max_size=5))
def test_any_key_is_kept(keys: list[str]) -> None:
    arrays = {key: np.full(2, i) for i, key in enumerate(keys)}
    assert same(from_bytes(to_bytes(arrays)), arrays)


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoint = Checkpoint(tmp_path / name, "abc")
        checkpoint.save(1, SERVER, {i: client(i) for i in range(3)}, {"x": [1, 2.5]})
        checkpoint.save(2, SERVER, {1: client(9)}, {"x": [1, 2.5]})
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_only_changed_clients_are_written_and_the_rest_is_kept(saved: Path) -> None:
    untouched = next(saved.glob("client-0-*"))
    inode = untouched.stat().st_ino
    checkpoint = Checkpoint(saved, "abc")
    checkpoint.load()
    checkpoint.save(4, SERVER, {11: client(2)}, {})
    assert untouched.stat().st_ino == inode
    assert [name.split("-")[:-1] for name in files(saved)] == [
        [],
        ["client", "0", "00003"],
        ["client", "11", "00004"],
        ["server", "00004"],
    ]
    loaded = Checkpoint(saved, "abc").load()
    assert loaded is not None
    assert same(loaded.clients[0], client(0))
    assert same(loaded.clients[11], client(2))


def test_a_new_run_in_an_old_folder_inherits_nothing(saved: Path) -> None:
    (saved / "server-best.safetensors").write_bytes(b"the user's own")
    Checkpoint(saved, "new").save(1, SERVER, {5: client(5)})
    loaded = Checkpoint(saved, "new").load()
    assert loaded is not None
    assert list(loaded.clients) == [5]
    assert len(files(saved)) == 4
    assert (saved / "server-best.safetensors").exists()


@pytest.mark.parametrize("what", ["server-", "client-11-", MANIFEST])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damage_is_found_and_named(saved: Path, what: str, how: str) -> None:
    path = next(saved.glob(f"{what}*"))
    data = path.read_bytes()
    if how == "missing" and what == MANIFEST:
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-9])
    else:
        at = data.index(b"0.1") if what == MANIFEST else len(data) - 3
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(CheckpointError, match="run without resuming") as error:
        Checkpoint(saved, "abc").load()
    assert path.name in str(error.value)


def test_another_experiment_and_another_schema_are_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another experiment.*'abc'.*'xyz'"):
        Checkpoint(saved, "xyz").load()
    document = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**document, "schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99"):
        Checkpoint(saved, "abc").load()


@pytest.mark.parametrize("broken_at", range(5))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_leaves_the_checkpoint_before(
    saved: Path, monkeypatch: pytest.MonkeyPatch, broken_at: int, number: int
) -> None:
    before = files(saved)
    checkpoint = Checkpoint(saved, "abc")
    checkpoint.load()
    calls = []

    def fail(path: Path, data: bytes, write=Path.write_bytes) -> int:
        calls.append(path)
        if len(calls) == broken_at + 1:
            write(path, data[: len(data) // 2])
            raise OSError(number, "it failed")
        return write(path, data)

    changed = {0: client(8), 11: client(9), 12: client(10)}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail)
        says = "disk is full.*resume" if number == errno.ENOSPC else "it failed.*resume"
        with pytest.raises(RunError, match=says):
            checkpoint.save(4, {"model/w": np.zeros(3)}, changed)
    assert len(calls) == broken_at + 1
    assert files(saved) == before
    loaded = Checkpoint(saved, "abc").load()
    assert loaded is not None
    assert loaded.round == 3
    assert same(loaded.clients[0], client(0))

    checkpoint.save(4, SERVER, changed)
    assert set(checkpoint.load().clients) == {0, 11, 12}  # type: ignore[union-attr]


def test_a_kill_before_the_rename_leaves_the_checkpoint_before(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, target: Path, replace=Path.replace) -> Path:
        if target.name == MANIFEST:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        # A process that is killed tidies nothing up.
        patched.setattr(Checkpoint, "_remove_unused", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            Checkpoint(saved, "abc").save(4, {}, {0: client(5)})
    assert f"{MANIFEST}.partial" in files(saved)
    checkpoint = Checkpoint(saved, "abc")
    loaded = checkpoint.load()
    assert loaded is not None
    assert same(loaded.clients[0], client(0))
    checkpoint.save(5, SERVER, {})
    assert len(files(saved)) == 4


@pytest.mark.parametrize(
    ("state", "extra", "says"),
    [
        ({"x": 3.0}, {}, "'x' cannot be stored as an array: float"),
        ({"__metadata__": np.zeros(1)}, {}, "reserved"),
        ({"x": np.array(["text"])}, {}, "cannot be stored"),
        ({"x": np.array([1j])}, {}, "complex128"),
        (SERVER, {"x": {1, 2}}, "extra cannot be stored"),
        (SERVER, {"x": np.float32(1)}, "extra cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_said_and_nothing_is_lost(
    saved: Path, state: Arrays, extra: dict[str, Any], says: str
) -> None:
    before = files(saved)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(saved, "abc").save(4, state, {0: client(1)}, extra)
    assert files(saved) == before
