"""Distillation of network weights (BST K.4): the two losses, the cost, and resuming after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import StoreError
from orchestrator.models.zoo import ZooModel
from orchestrator.network_distillation.students import Student, StudentResult, StudentStore
from orchestrator.network_distillation.weights import (
    WeightsRecipe,
    _Run,
    distil_weights,
    trajectories,
)
from orchestrator.pairs import PairSet, PairSpec, PairStore
from orchestrator.storage import Storage
from solvers.distil.methods.adam import Adam
from solvers.grids import Grid
from solvers.losses import rmse_loss

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
    """A function that makes a short recipe; keywords change the recipe or Adam's settings."""

    def make(**changes: Any) -> WeightsRecipe:
        defaults = {"learning_rate": 2e-4, "iterations": 6, "batch_size": 16, "training_pairs": 48}
        settings = Adam(**{name: changes.pop(name, value) for name, value in defaults.items()})
        content: dict[str, Any] = {
            "teacher": "digits_fm_ot",
            "teacher_digest": model.digest,
            "train": specs[PairKey("train", 1.0, 0)].name,
            "validation": specs[PairKey("validation", 1.0, 0)].name,
            "nfe": 4,
            "loss": "rmse",
            "settings": settings,
            "validate_every": 2,
        }
        return WeightsRecipe(**{**content, **changes})

    return make


@pytest.fixture
def run(recipe: Callable[..., WeightsRecipe], copied: Storage) -> Run:
    """A function that trains the student of a recipe."""

    def train(progress: Callable[[int], object] = lambda n: None, **changes: Any) -> StudentResult:
        return distil_weights(recipe(**changes), copied, progress)

    return train


def test_trajectories_go_from_the_noise_to_the_ground_truth(
    model: ZooModel, copied: Storage, pairs: PairSet, specs: dict[PairKey, PairSpec]
) -> None:
    """Solved from one grid time to the next, they end at the ground truth, within the tolerances of both."""
    times = Grid().times(3, model.scheduler)
    states, forwards = trajectories(model, copied, specs[PairKey("train", 1.0, 0)].name, times)
    assert states.shape == (48, 4, 1, 8, 8)
    torch.testing.assert_close(states[:, 0], pairs.x0)
    assert rmse_loss(states[:, -1], pairs.x1).max() < 5e-3, "tolerances are 1e-4 per step"
    assert forwards >= 48 * 3 * 7


def test_trajectories_are_computed_once(model: ZooModel, copied: Storage, specs: dict[PairKey, PairSpec]) -> None:
    """The second call reads them, even without the pairs they were computed from."""
    digest, times = specs[PairKey("train", 1.0, 0)].name, Grid().times(2, model.scheduler)
    states, forwards = trajectories(model, copied, digest, times)
    copied.delete(f"pairs/{digest}/manifest.json")
    again, counted = trajectories(model, copied, digest, times)
    assert torch.equal(states, again)
    assert counted == forwards


def test_the_norm_is_the_root_of_the_mean_over_dimensions() -> None:
    """The papers' ||x||: for a constant it is the constant, for any number of dimensions."""
    torch.testing.assert_close(rmse_loss(torch.full((2, 3, 4), 2.5), torch.zeros(2, 3, 4)), torch.tensor([2.5, 2.5]))


def test_both_losses_agree_for_a_single_step(recipe: Callable[..., WeightsRecipe], copied: Storage) -> None:
    """One midpoint step from x(0) to x(1) gives the sample, so eq. 80 and eq. 6 agree at NFE 2."""
    indices = list(range(48))
    lte, rmse = (_Run(recipe(nfe=2, loss=loss), copied).objective(indices) for loss in ("lte", "rmse"))
    torch.testing.assert_close(lte, rmse, rtol=0.02, atol=2e-3)


def test_the_local_loss_is_the_sum_of_the_errors_of_midpoint_steps(
    recipe: Callable[..., WeightsRecipe], copied: Storage, model: ZooModel, pairs: PairSet
) -> None:
    """eq. 80 written out for the untrained network: every step starts from the ground-truth trajectory."""
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
def test_training_brings_a_student_closer_to_ground_truth(run: Run, loss: str) -> None:
    """Measured on validation pairs, against the network it is a copy of."""
    result = run(loss=loss, iterations=30, validate_every=10)
    values = [value for _, value in result.history]
    assert max(values) > values[0] + 0.3
    assert [step for step, _ in result.history] == [0, 10, 20, 30]


def test_passes_data_and_parameters_are_counted(run: Run, model: ZooModel, pairs: PairSet) -> None:
    """Training and validation forwards, backwards, ground-truth forwards and all weights."""
    result = run()
    assert result.forwards == 4 * (6 * 16 + 4 * 32)
    assert result.backwards == 4 * 6 * 16
    assert result.data_forwards == int(pairs.nfe.sum())
    assert (result.training_set, result.parameters) == (48, model.parameters)


def test_the_best_validated_iterate_is_the_result(run: Run, copied: Storage, model: ZooModel) -> None:
    """With a learning rate that ruins the network, the result is the initial network."""
    result = run(learning_rate=0.3)
    assert max(value for _, value in result.history) == result.history[0][1]
    student = StudentStore(copied, result.key).load_student(model, 4)
    assert all(torch.equal(a, b) for a, b in zip(student.net.parameters(), model.net.parameters(), strict=True))


def test_a_run_that_diverges_ends_with_its_best_iterate(run: Run) -> None:
    """A loss that is not finite ends the run, and the result is the best iterate before it."""
    progress: list[int] = []
    result = run(progress.append, learning_rate=1e30)
    assert result.status == "diverged"
    assert len(result.history) == 1
    assert sum(progress) == 6, "the progress bar is completed even so"


def test_a_step_of_a_student_leaves_its_model_frozen(model: ZooModel) -> None:
    """A student is a copy: training it neither changes nor unfreezes weights of the model."""
    student = Student(model)
    student.descend(sum((p.square().sum() for p in student.model.net.parameters()), torch.tensor(0.0)), 0.1)
    fresh = ZooModel("digits_fm_ot")
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), fresh.net.parameters(), strict=True))
    assert not any(p.requires_grad for p in model.net.parameters())


def test_missing_pairs_are_refused(recipe: Callable[..., WeightsRecipe], storage: Storage) -> None:
    """The message has the command that makes them."""
    with pytest.raises(StoreError, match=r"no complete pair store .* make it with `bespoke pairs`"):
        distil_weights(recipe(), storage, lambda n: None)
