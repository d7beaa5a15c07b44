"""Students of a finished run: what they are taught, that they start alike, that they are kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkd.audit import students
from fedkd.audit.finished import Finished
from fedkd.audit.students import distilled, lesson
from fedkd.engine.simulation import run
from fedkd.errors import CheckpointError, ConfigError
from fedkd.models.book import to_arrays
from fedkd.privacy.auditing.options import Student
from fedkd.privacy.options import Swing

IMAGES = {
    "rounds": 1,
    "data.public.size": 30,
    "canaries.kind": "random-image",
    "canaries.count": 5,
    "canaries.repetitions": [1, 3],
    "canaries.references": 30,
}
TEXT = {
    **IMAGES,
    "data.source": {"name": "pydoc-topics", "topics": 4, "rows_per_topic": 8, "length": 16},
    "data.partition": "natural",
    "data.public.size": 6,
    "model": {"name": "gpt-tiny"},
    "canaries.kind": "text",
    "canaries.pattern": "pin {}{}{}",
    "clients.training.lr": 0.01,
}
QUICK = Student(epochs=1, lr=0.01)


def finished(tiny, folder, changes) -> Finished:
    run(tiny("fedavg", changes), folder)
    return Finished.load(folder)


@pytest.fixture(scope="module")
def images(tiny, tmp_path_factory) -> Finished:
    return finished(tiny, tmp_path_factory.mktemp("images") / "run", IMAGES)


@pytest.fixture(scope="module")
def text(tiny, tmp_path_factory) -> Finished:
    return finished(tiny, tmp_path_factory.mktemp("text") / "run", TEXT)


@pytest.fixture
def lessons(monkeypatch):
    """Notice every training of a student: its initial weights, batches, targets."""
    seen = []

    def teach(network, x, probs, **more):
        seen.append({"initial": to_arrays(network), "probs": probs, **more})
        return plain(network, x, probs, **more)

    plain = students.transfer
    monkeypatch.setattr(students, "transfer", teach)
    return seen


def learn(run_: Finished, options: Student, cache, name="s") -> dict[str, np.ndarray]:
    return to_arrays(distilled(run_, name, options, run_.teacher(), cache))


def same(one, other) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in one)


def test_a_student_is_kept_and_trained_once(images, lessons, tmp_path):
    first = learn(images, QUICK, tmp_path)
    assert same(first, learn(images, QUICK, tmp_path, "another name"))
    assert len(lessons) == 1
    assert same(first, learn(images, QUICK, tmp_path / "elsewhere"))
    assert len(lessons) == 2
    assert not list(tmp_path.glob("*.part"))
    assert not distilled(images, "s", QUICK, images.teacher(), tmp_path).training


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 2.0},
        {"epochs": 2},
        {"transfer": "public"},
        {"swing": Swing(map="constant", t_max=3.0)},
        {"model": "mlp", "model_options": {"hidden": [8]}},
    ],
)
def test_other_options_are_another_student(images, lessons, tmp_path, change):
    learn(images, QUICK, tmp_path)
    learn(images, replace(QUICK, **change), tmp_path)
    assert len(lessons) == 2
    assert len(list(tmp_path.glob("student-*.safetensors"))) == 2


def test_another_teacher_has_another_student(images, lessons, tmp_path):
    first = learn(images, QUICK, tmp_path)
    moved = {k: v * 1.01 if v.dtype.kind == "f" else v for k, v in images.state.items()}
    other = learn(replace(images, state=moved), QUICK, tmp_path)
    assert len(lessons) == 2
    assert not same(first, other)


def test_students_start_alike_and_see_the_same_batches(images, lessons, tmp_path):
    for temperature in (1.0, 4.0):
        learn(images, replace(QUICK, temperature=temperature), tmp_path)
    one, two = lessons
    assert same(one["initial"], two["initial"])
    assert same(one["initial"], images.prepared.setting.book.initial("mlp"))
    assert not same(one["initial"], to_arrays(images.teacher()))
    assert (
        one["rng"].numpy().integers(1000, size=9) == two["rng"].numpy().integers(1000, size=9)
    ).all()
    assert not torch.equal(one["probs"], two["probs"])


def test_a_student_comes_near_its_teacher(images, tmp_path):
    options = Student(epochs=15, lr=0.01)
    teacher = images.teacher()
    student = distilled(images, "s", options, teacher, tmp_path)
    given = lesson(images, "s", options, teacher)

    def away(network) -> float:
        with torch.no_grad():
            logp = torch.log_softmax(network(given.data.x), 1)
        return float((given.probs * (given.probs.log() - logp)).sum(1).mean())

    untaught = images.prepared.setting.book.make("mlp")
    assert away(student) < away(untaught) / 3


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_student_is_refused_and_named(images, tmp_path, damage):
    learn(images, QUICK, tmp_path)
    (file,) = tmp_path.glob("student-*.safetensors")
    file.write_bytes(file.read_bytes()[:-9] if damage == "cut" else b"no weights at all")
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged.*remove it"):
        learn(images, QUICK, tmp_path)
    file.unlink()
    learn(images, QUICK, tmp_path)


def test_a_public_lesson_needs_a_pool(images, tmp_path):
    setting = replace(images.prepared.setting, public=None)
    poor = replace(images, prepared=replace(images.prepared, setting=setting))
    asked = replace(QUICK, transfer="public")
    with pytest.raises(ConfigError, match=r"audit\.students\.s\.transfer = 'public'.*public\.size"):
        learn(poor, asked, tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_of_a_students_network_are_checked(images, tmp_path):
    with pytest.raises(ConfigError, match=r"hiden"):
        learn(images, Student(model="mlp", model_options={"hiden": [3]}), tmp_path)
    with pytest.raises(ConfigError, match=r"mlpp"):
        learn(images, Student(model="mlpp"), tmp_path)


def test_private_lessons_hold_the_canaries_that_were_planted(images):
    private = lesson(images, "s", QUICK, images.teacher())
    public = lesson(images, "s", replace(QUICK, transfer="public"), images.teacher())
    canaries = images.canaries
    for i, canary in enumerate(images.examples.x):
        times = int((private.data.x == canary).flatten(1).all(1).sum())
        assert times == (canaries.copies[i] if canaries.inside[i] else 0)
        assert not (public.data.x == canary).flatten(1).all(1).any()
    assert torch.equal(public.data.x, images.prepared.setting.public.x)


def test_targets_are_the_teachers_at_the_temperature(images, text):
    for given, run_ in ((images, images), (text, text)):
        teacher = run_.teacher()
        hot = lesson(given, "s", Student(temperature=5.0), teacher)
        with torch.no_grad():
            logits = teacher(hot.data.x)
        assert torch.allclose(hot.probs, torch.softmax(logits / 5.0, dim=-1), atol=1e-6)
        assert hot.temperature == 5.0
        assert hot.weights is None


SWUNG = {"t_min": 1.0, "t_max": 6.0}


@pytest.mark.parametrize("transfer", ["private", "public"])
@pytest.mark.parametrize(("what", "scorer"), [("images", "knn"), ("text", "rarity")])
def test_swing_gives_every_item_its_temperature(request, lessons, tmp_path, what, scorer, transfer):
    run_ = request.getfixturevalue(what)
    swing = Swing(map="adaptive", scorer=scorer, **SWUNG)
    options = replace(QUICK, transfer=transfer, swing=swing)
    given = lesson(run_, "s", options, run_.teacher())
    assert given.temperature.shape == (given.data.y.shape if what == "text" else (len(given.data),))
    assert 1.0 <= given.temperature.min() < given.temperature.max() <= 6.0
    with torch.no_grad():
        logits = run_.teacher()(given.data.x)
    at = given.temperature[..., None].float()
    assert torch.allclose(
        given.probs, torch.softmax(logits / at, dim=-1).to(given.probs), atol=1e-5
    )
    taught = learn(run_, options, tmp_path)
    assert len(lessons) == 1
    assert all(np.isfinite(v).all() for v in taught.values())
    plain = learn(run_, replace(options, swing=Swing()), tmp_path)
    assert not same(taught, plain)


@pytest.mark.parametrize("what", ["images", "text"])
def test_noise_keeps_targets_distributions_and_is_addressed(request, what):
    run_ = request.getfixturevalue(what)
    quiet, noisy = (
        lesson(
            run_,
            "s",
            replace(QUICK, transfer="public", swing=Swing(map="constant", t_max=2.0, noise=z)),
            run_.teacher(),
        )
        for z in (0.0, 0.05)
    )
    again = lesson(
        run_,
        "s",
        replace(QUICK, transfer="public", swing=Swing(map="constant", t_max=2.0, noise=0.05)),
        run_.teacher(),
    )
    assert torch.equal(noisy.probs, again.probs)
    assert not torch.allclose(noisy.probs, quiet.probs, atol=1e-3)
    assert noisy.probs.min() >= 0
    assert torch.allclose(noisy.probs.sum(-1), torch.ones(()).to(noisy.probs), atol=1e-5)
