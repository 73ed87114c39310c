"""Distillation of the weights (BST K.4): the two losses, what is counted, and that stopping changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import ConfigError, StoreError
from orchestrator.models.zoo import ZooModel
from orchestrator.network_distillation.students import Student, StudentResult, StudentStore
from orchestrator.network_distillation.weights import (
    WeightsRecipe,
    _Run,
    distil_weights,
    rms,
    trajectories,
)
from orchestrator.pairs import PairSet, PairSpec, PairStore
from orchestrator.storage import Storage
from solvers.distil.adam import AdamSettings
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid

Run = Callable[..., StudentResult]


@pytest.fixture(scope="module")
def model() -> ZooModel:
    return ZooModel("digits_fm_ot")


@pytest.fixture
def pairs(copied: Storage, specs: dict[PairKey, PairSpec]) -> PairSet:
    """The 48 training pairs."""
    return PairStore(copied, specs[PairKey("train", 1.0, 0)]).load()


@pytest.fixture
def recipe(model: ZooModel, specs: dict[PairKey, PairSpec]) -> Callable[..., WeightsRecipe]:
    """A short recipe; keywords change it or Adam's settings."""

    def make(**changes: Any) -> WeightsRecipe:
        numbers = {"learning_rate": 2e-4, "iterations": 6, "batch_size": 16, "training_pairs": 48}
        settings = AdamSettings(**{name: changes.pop(name, value) for name, value in numbers.items()})
        content: dict[str, Any] = {
            "teacher": "digits_fm_ot",
            "teacher_digest": model.digest,
            "train": specs[PairKey("train", 1.0, 0)].digest,
            "validation": specs[PairKey("validation", 1.0, 0)].digest,
            "nfe": 4,
            "loss": "rmse",
            "settings": settings,
            "validate_every": 2,
        }
        return WeightsRecipe(**{**content, **changes})

    return make


@pytest.fixture
def run(recipe: Callable[..., WeightsRecipe], copied: Storage) -> Run:
    """Trains a student of a recipe."""

    def train(progress: Callable[[int], object] = lambda n: None, **changes: Any) -> StudentResult:
        return distil_weights(recipe(**changes), copied, progress)

    return train


def test_trajectories_go_from_the_noise_to_the_ground_truth(
    model: ZooModel, copied: Storage, pairs: PairSet, specs: dict[PairKey, PairSpec]
) -> None:
    """Solved from grid time to grid time they end where the pairs do, to the tolerance of both."""
    times = Grid().times(3, model.scheduler)
    states, forwards = trajectories(model, copied, specs[PairKey("train", 1.0, 0)].digest, times)
    assert states.shape == (48, 4, 1, 8, 8)
    torch.testing.assert_close(states[:, 0], pairs.x0)
    assert rms(states[:, -1], pairs.x1).max() < 5e-3, "tolerances are 1e-4 a step"
    assert forwards >= 48 * 3 * 7


def test_trajectories_are_made_once(model: ZooModel, copied: Storage, specs: dict[PairKey, PairSpec]) -> None:
    """The second time they are read: without the pairs they came from."""
    digest, times = specs[PairKey("train", 1.0, 0)].digest, Grid().times(2, model.scheduler)
    states, forwards = trajectories(model, copied, digest, times)
    copied.delete(f"pairs/{digest}/manifest.json")
    again, counted = trajectories(model, copied, digest, times)
    assert torch.equal(states, again)
    assert counted == forwards


def test_the_norm_is_the_root_of_the_mean_over_dimensions() -> None:
    """The papers' ||x||: that of a constant is the constant, whatever the number of dimensions."""
    torch.testing.assert_close(rms(torch.full((2, 3, 4), 2.5), torch.zeros(2, 3, 4)), torch.tensor([2.5, 2.5]))


def test_in_one_step_both_losses_are_the_same(recipe: Callable[..., WeightsRecipe], copied: Storage) -> None:
    """One midpoint step from x(0) to x(1) is the sample: eq. 80 and eq. 6 agree at NFE 2."""
    indices = list(range(48))
    local, whole = (_Run(recipe(nfe=2, loss=loss), copied).objective(indices) for loss in ("lte", "rmse"))
    torch.testing.assert_close(local, whole, rtol=0.02, atol=2e-3)


def test_the_local_loss_is_the_sum_of_midpoints_own_errors(
    recipe: Callable[..., WeightsRecipe], copied: Storage, model: ZooModel, pairs: PairSet
) -> None:
    """eq. 80 for the untrained network, written out: every step starts from the ground-truth trajectory."""
    run = _Run(recipe(loss="lte"), copied)
    x, h = run.trajectories, 0.5
    field = model.field(pairs.condition, 1.0)
    expected = torch.zeros(48)
    with torch.no_grad():
        for i in range(2):
            t = torch.tensor(i * h, dtype=torch.float64)
            half = x[:, i] + h / 2 * field(x[:, i], t)
            step = x[:, i] + h * field(half, t + h / 2)
            expected += (step - x[:, i + 1]).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(run.objective(list(range(48))), expected)


@pytest.mark.parametrize("loss", ["lte", "rmse"])
def test_a_student_comes_nearer_to_ground_truth(run: Run, loss: str) -> None:
    """On pairs it was not trained on, and better than the network it is a copy of."""
    result = run(loss=loss, iterations=30, validate_every=10)
    values = [value for _, value in result.history]
    assert max(values) > values[0] + 0.3
    assert [step for step, _ in result.history] == [0, 10, 20, 30]


def test_passes_data_and_parameters_are_counted(run: Run, model: ZooModel, pairs: PairSet) -> None:
    """Training and validation forwards, backwards, ground truth, and every weight."""
    result = run()
    assert result.forwards == 4 * (6 * 16 + 4 * 32)
    assert result.backwards == 4 * 6 * 16
    assert result.data_forwards == int(pairs.nfe.sum())
    assert (result.training_set, result.parameters) == (48, model.parameters)


def test_the_best_validated_iterate_is_the_result(run: Run, copied: Storage, model: ZooModel) -> None:
    """A learning rate that ruins the network leaves the network as it was."""
    result = run(learning_rate=0.3)
    assert max(value for _, value in result.history) == result.history[0][1]
    student = StudentStore(copied, result.key).load_student(model, 4)
    assert all(torch.equal(a, b) for a, b in zip(student.net.parameters(), model.net.parameters(), strict=True))


def test_a_run_that_diverges_says_so(run: Run) -> None:
    """A loss that is not finite ends it, and the result is what was best before."""
    told: list[int] = []
    result = run(told.append, learning_rate=1e30)
    assert result.status == "diverged"
    assert len(result.history) == 1
    assert sum(told) == 6, "the progress bar is filled all the same"


def test_a_training_that_was_killed_ends_with_the_same_weights(
    run: Run, recipe: Callable[..., WeightsRecipe], copied: Storage
) -> None:
    """It goes on from its checkpoint, bit for bit, and counts no pass twice."""
    store = StudentStore(copied, recipe().key)
    undisturbed, weights = run(), copied.read(store.weights_key(4))
    for name in copied.names(f"students/{store.key}"):
        copied.delete(f"students/{store.key}/{name}")
    done = 0

    def killed(iterations: int) -> None:
        nonlocal done
        done += iterations
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert not store.is_complete(4)
    assert run() == undisturbed
    assert copied.read(store.weights_key(4)) == weights


def test_what_is_complete_is_not_trained_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run reads the result."""
    first = run()
    monkeypatch.setattr("orchestrator.network_distillation.weights._Run", None)
    told: list[int] = []
    assert run(told.append) == first
    assert told == [6]


def test_a_student_is_a_zoo_model(run: Run, copied: Storage, model: ZooModel, pairs: PairSet) -> None:
    """Its weights' file loads as any model of the zoo, and samples as the student does."""
    result = run(iterations=20, validate_every=10)
    store = StudentStore(copied, result.key)
    loaded, student = ZooModel(copied.path(store.weights_key(4))), store.load_student(model, 4)
    assert loaded.digest != model.digest

    def sampled(source: ZooModel) -> Tensor:
        with torch.no_grad():
            return GridSolver(Midpoint(), 4, Grid()).sample(source.field(pairs.condition, 1.0), pairs.x0)

    assert torch.equal(sampled(loaded), sampled(student))
    assert not torch.equal(sampled(loaded), sampled(model))


def test_the_teacher_is_left_as_it_is(model: ZooModel) -> None:
    """A student is a copy: training it moves no weight of the model, nor thaws one."""
    student = Student(model)
    student.descend(sum((p.square().sum() for p in student.model.net.parameters()), torch.tensor(0.0)), 0.1)
    fresh = ZooModel("digits_fm_ot")
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), fresh.net.parameters(), strict=True))
    assert not any(p.requires_grad for p in model.net.parameters())


def test_another_model_under_the_same_name_is_refused(recipe: Callable[..., WeightsRecipe], copied: Storage) -> None:
    """A student of a model that was replaced would be described wrongly."""
    changed = dataclasses.replace(recipe(), teacher_digest="0" * 64)
    with pytest.raises(ConfigError, match=r"model 'digits_fm_ot' is \w{12}, but its student was to be one of 0{12}"):
        distil_weights(changed, copied, lambda n: None)


def test_pairs_that_are_not_there_are_refused(recipe: Callable[..., WeightsRecipe], storage: Storage) -> None:
    """With how to make them."""
    with pytest.raises(StoreError, match=r"no complete pair store .* make it with `bespoke pairs`"):
        distil_weights(recipe(), storage, lambda n: None)
