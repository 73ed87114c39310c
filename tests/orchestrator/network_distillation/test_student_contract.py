"""What every baseline that trains a copy of the network guarantees: resuming, reuse, and a teacher left as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from orchestrator import plugins
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import ConfigError
from orchestrator.models.zoo import ZooModel
from orchestrator.network_distillation.progressive import ProgressiveRecipe, distil_progressively
from orchestrator.network_distillation.students import Student, StudentResult, StudentStore
from orchestrator.network_distillation.weights import WeightsRecipe, distil_weights
from orchestrator.pairs import PairSpec
from orchestrator.storage import Storage
from solvers.distil.methods.adam import Adam

Progress = Callable[[int], object]
REAL = plugins.build("datasets", "digits").real_content


class Baseline(NamedTuple):
    """A short run of one baseline.

    Attributes:
        recipe: What is trained.
        run: Trains it and returns the results of all its students.
        iterations: Iterations of the whole run, as its progress counts them.
        interrupt: An iteration between two checkpoints, in the middle of the run.
        nfe: Steps of the last student.
    """

    recipe: ProgressiveRecipe | WeightsRecipe
    run: Callable[[ProgressiveRecipe | WeightsRecipe, Progress], list[StudentResult]]
    iterations: int
    interrupt: int
    nfe: int


@pytest.fixture(scope="module")
def model() -> ZooModel:
    return ZooModel("digits_fm_ot")


@pytest.fixture(params=["progressive", "weights"])
def baseline(
    request: pytest.FixtureRequest, model: ZooModel, copied: Storage, specs: dict[PairKey, PairSpec]
) -> Baseline:
    shared: dict[str, Any] = {"teacher": "digits_fm_ot", "teacher_digest": model.digest}
    if request.param == "progressive":
        settings = Adam(learning_rate=1e-4, iterations=4, batch_size=8, training_pairs=1797)
        return Baseline(
            ProgressiveRecipe(**shared, dataset="digits", real_content=REAL, start_steps=16, settings=settings),
            lambda recipe, progress: distil_progressively(recipe, 4, copied, progress),
            iterations=8,
            interrupt=7,
            nfe=4,
        )
    settings = Adam(learning_rate=2e-4, iterations=6, batch_size=16, training_pairs=48)
    train, validation = (specs[PairKey(role, 1.0, 0)].name for role in ("train", "validation"))
    return Baseline(
        WeightsRecipe(
            **shared,
            train=train,
            validation=validation,
            nfe=4,
            loss="rmse",
            settings=settings,
            validate_every=2,
        ),
        lambda recipe, progress: [distil_weights(recipe, copied, progress)],
        iterations=6,
        interrupt=5,
        nfe=4,
    )


def test_every_field_of_a_recipe_is_part_of_its_key_except_places(baseline: Baseline) -> None:
    """A student is found again by the content of its teacher and data, wherever they lie."""
    recipe = baseline.recipe
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        other = dataclasses.replace(value, seed=9) if isinstance(value, Adam) else value * 2
        changed = dataclasses.replace(recipe, **{field.name: other}).key != recipe.key
        assert changed == (field.name not in ("teacher", "dataset")), field.name


def test_an_interrupted_run_ends_with_the_same_weights(baseline: Baseline, copied: Storage) -> None:
    """It resumes from its checkpoint, bit for bit, and counts no pass twice."""
    store = StudentStore(copied, baseline.recipe.key)
    expected, weights = baseline.run(baseline.recipe, lambda n: None), copied.read(store.weights_key(baseline.nfe))
    for name in copied.names(f"students/{store.key}"):
        copied.delete(f"students/{store.key}/{name}")
    done = 0

    def interrupt(iterations: int) -> None:
        nonlocal done
        done += iterations
        if done == baseline.interrupt:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baseline.run(baseline.recipe, interrupt)
    assert not store.is_complete(baseline.nfe)
    assert store.load_checkpoint() is not None
    assert baseline.run(baseline.recipe, lambda n: None) == expected
    assert copied.read(store.weights_key(baseline.nfe)) == weights
    assert store.load_checkpoint() is None


def test_a_complete_student_is_not_trained_again(baseline: Baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run reads the stored results, and its progress bar is complete even so."""
    first = baseline.run(baseline.recipe, lambda n: None)
    monkeypatch.setattr(Student, "descend", None)
    progress: list[int] = []
    assert baseline.run(baseline.recipe, progress.append) == first
    assert sum(progress) == baseline.iterations


def test_a_student_is_a_zoo_model(baseline: Baseline, copied: Storage, model: ZooModel) -> None:
    """Its weights file loads like any model of the zoo, with the student's weights."""
    result = baseline.run(baseline.recipe, lambda n: None)[-1]
    store = StudentStore(copied, result.key)
    loaded, student = ZooModel(copied.path(store.weights_key(baseline.nfe))), store.load_student(model, baseline.nfe)
    assert loaded.digest != model.digest
    assert all(torch.equal(a, b) for a, b in zip(loaded.net.parameters(), student.net.parameters(), strict=True))


def test_training_does_not_change_the_teacher(baseline: Baseline) -> None:
    """A student is a copy: training it leaves the zoo's file and its weights alone."""
    teacher = ZooModel("digits_fm_ot")
    before = [parameter.clone() for parameter in teacher.net.parameters()]
    baseline.run(baseline.recipe, lambda n: None)
    after = ZooModel("digits_fm_ot")
    assert after.digest == teacher.digest
    assert all(torch.equal(a, b) for a, b in zip(before, after.net.parameters(), strict=True))


def test_another_model_under_the_same_name_is_refused(baseline: Baseline) -> None:
    """Otherwise the student would be recorded as one of a model that was replaced."""
    changed = dataclasses.replace(baseline.recipe, teacher_digest="0" * 64)
    with pytest.raises(
        ConfigError, match=r"model 'digits_fm_ot' has digest \w{12}, but the recipe of its student names 0{12}"
    ):
        baseline.run(changed, lambda n: None)
