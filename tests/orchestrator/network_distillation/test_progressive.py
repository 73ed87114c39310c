"""Progressive Distillation: DDIM's arithmetic, chains that can be interrupted and extended, and their cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.errors import ConfigError, UserError
from orchestrator.models.zoo import ZooModel
from orchestrator.network_distillation.progressive import (
    Batch,
    Halving,
    ProgressiveRecipe,
    check_prediction,
    distil_progressively,
    stages,
)
from orchestrator.network_distillation.students import StudentResult, StudentStore
from orchestrator.storage import Storage
from solvers.distil.methods.adam import Adam
from solvers.families import GridSolver
from solvers.families.ddim import DDIM
from solvers.grids import Grid
from solvers.prediction import endpoints_from_velocity

MODELS = ["digits_fm_ot", "digits_fm_v_cs", "digits_eps_vp"]
LABELS = torch.arange(6)


@pytest.fixture(scope="module")
def model() -> ZooModel:
    return ZooModel("digits_fm_ot")


@pytest.fixture
def x0() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _steps(step: int) -> Tensor:
    return torch.full((6,), step)


@pytest.mark.parametrize("name", MODELS)
def test_a_perfect_student_reproduces_its_teacher(name: str, x0: Tensor) -> None:
    """DDIM in 4 steps, with the target as data prediction, lands where the teacher's 8 steps do (algorithm 2).

    This covers all the arithmetic of a stage, for every prediction and scheduler of the zoo.
    """
    teacher = ZooModel(name)
    halving = Halving(teacher, 4)
    z = float(teacher.scheduler.sigma(teacher.scheduler.t_min)) * x0
    for step in range(4):
        data = halving.target(teacher, Batch(z, _steps(step), LABELS))
        now, then = 2 * step, 2 * step + 2
        noise = (z - halving.alpha[now].float() * data) / halving.sigma[now].float()
        z = halving.alpha[then].float() * data + halving.sigma[then].float() * noise
    with torch.no_grad():
        expected = GridSolver(DDIM(), 8, Grid()).sample(teacher.field(LABELS, 1.0), x0)
    torch.testing.assert_close(z, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_endpoints_at_mixed_times_agree_with_the_field(name: str, x0: Tensor) -> None:
    """Each row of the batch has the endpoints of the model's field at its own time."""
    model = ZooModel(name)
    halving = Halving(model, 3)
    times = Grid().times(6, model.scheduler)
    with torch.no_grad():
        data, noise = halving.endpoints(model, x0, LABELS, LABELS)
        for i in range(6):
            velocity = model.field(LABELS[i : i + 1], 1.0)(x0[i : i + 1], times[i])
            expected = endpoints_from_velocity(velocity, x0[i : i + 1], model.scheduler(times[i]))
            scale = float(expected.data.abs().max())
            torch.testing.assert_close(data[i : i + 1], expected.data.float(), rtol=0, atol=1e-4 * scale)
            torch.testing.assert_close(noise[i : i + 1], expected.noise.float(), rtol=0, atol=1e-4)


def test_the_loss_is_the_larger_of_the_errors_in_data_and_in_noise(model: ZooModel, x0: Tensor) -> None:
    """max(||x - x-hat||^2, ||eps - eps-hat||^2), the truncated-SNR weighting (Salimans & Ho 2022, eq. 9)."""
    halving = Halving(model, 6)
    batch = Batch(x0, LABELS, LABELS)
    with torch.no_grad():
        target = halving.target(model, batch)
        loss = halving.loss(model, batch, target)
        data, noise = halving.endpoints(model, x0, 2 * LABELS, LABELS)
    alpha, sigma = (v[2 * LABELS].float().view(-1, 1, 1, 1) for v in (halving.alpha, halving.sigma))
    errors = ((target - data).square(), ((x0 - alpha * target) / sigma - noise).square())
    expected = torch.stack([error.flatten(1).mean(1) for error in errors]).amax(0)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("start", "end", "expected"), [(8, 4, [4]), (64, 4, [32, 16, 8, 4]), (24, 3, [12, 6, 3])])
def test_stages_halve(start: int, end: int, expected: list[int]) -> None:
    """From the first student, which has half the model's steps, to the last."""
    assert stages(start, end) == expected


@pytest.mark.parametrize(("start", "end", "use"), [(60, 8, 64), (4, 4, 8), (2, 4, 8), (48, 5, 40)])
def test_steps_that_do_not_halve_to_the_nfe_are_refused(start: int, end: int, use: int) -> None:
    """The message suggests a number that does."""
    with pytest.raises(ConfigError, match=rf"{end} is not reached from start_steps {start}; use start_steps {use}$"):
        stages(start, end)


def test_a_model_that_predicts_noise_is_refused() -> None:
    """At alpha near 0 it has no information about the data. The message says what to use instead."""
    with pytest.raises(ConfigError, match=r"digits_eps_vp predicts epsilon, .* use a model that predicts velocity"):
        check_prediction(ZooModel("digits_eps_vp"))


def _recipe(model: ZooModel, **changes: Any) -> ProgressiveRecipe:
    settings = {"learning_rate": 1e-4, "iterations": 4, "batch_size": 8, "training_pairs": 1797} | changes
    return ProgressiveRecipe(
        teacher="digits_fm_ot",
        teacher_digest=model.digest,
        dataset="digits",
        real_content=plugins.build("datasets", "digits").real_content,
        start_steps=16,
        settings=Adam(**settings),
    )


Run = Callable[..., list[StudentResult]]


@pytest.fixture
def run(model: ZooModel, storage: Storage) -> Run:
    """A function that runs a chain to a number of steps; keywords change Adam's settings."""

    def chain(end: int, progress: Callable[[int], object] = lambda n: None, **changes: Any) -> list[StudentResult]:
        return distil_progressively(_recipe(model, **changes), end, storage, progress)

    return chain


def test_passes_of_the_whole_chain_are_counted(run: Run) -> None:
    """Per sample and stage, two forwards of the teacher, and one forward and backward of the student (BNS D.4)."""
    counts = [(r.nfe, r.forwards, r.backwards, r.training_set, r.data_forwards) for r in run(4)]
    assert counts == [(8, 96, 32, 1797, 0), (4, 192, 64, 1797, 0)]


def test_extending_a_chain_trains_only_its_new_stage(run: Run, storage: Storage, model: ZooModel) -> None:
    """Existing students are kept as they are, and only the new ones are trained."""
    run(8)
    store = StudentStore(storage, _recipe(model).key)
    before = storage.read(store.weights_key(8))
    progress: list[int] = []
    run(4, progress.append)
    assert progress == [4, 1, 1, 1, 1]
    assert storage.read(store.weights_key(8)) == before


def test_a_student_learns_two_steps_of_its_teacher(run: Run, storage: Storage, model: ZooModel, x0: Tensor) -> None:
    """After a few iterations its 8 steps are closer to the model's 16 steps than the model's own 8 steps are."""
    (result,) = run(8, iterations=60, batch_size=32, learning_rate=3e-4)
    student = StudentStore(storage, result.key).load_student(model, 8)
    with torch.no_grad():
        teacher, plain = (GridSolver(DDIM(), n, Grid()).sample(model.field(LABELS, 1.0), x0) for n in (16, 8))
        sampled = result.build_solver().sample(student.field(LABELS, 1.0), x0)
    assert (sampled - teacher).square().mean() < 0.7 * (plain - teacher).square().mean()


def test_a_loss_that_is_not_finite_ends_the_run(run: Run) -> None:
    """The message has the iteration and the setting to lower."""
    with pytest.raises(UserError, match=r"to 8 steps has a loss that is not finite at iteration .*lower progressive\."):
        run(8, learning_rate=1e30)


def test_a_dataset_without_samples_is_refused(model: ZooModel, storage: Storage) -> None:
    """Progressive Distillation needs real data."""
    recipe = dataclasses.replace(_recipe(model), dataset="labels")
    with pytest.raises(ConfigError, match="dataset 'labels' has no samples to train on"):
        distil_progressively(recipe, 8, storage, lambda n: None)
