"""Progressive Distillation (Salimans & Ho 2022): repeated halving of the number of DDIM steps.

A student of k steps learns to do in one DDIM step what its teacher of 2k steps does in two, and then becomes the next
teacher. It trains on real data and needs no trajectories. Time runs in the opposite direction to the paper's (t=0 is
noise here), and the network may predict the data, v or the velocity. The loss compares data predictions x-hat, as in
the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.errors import ConfigError, UserError
from orchestrator.models.zoo import ZooModel
from orchestrator.network_distillation.students import Progress, Recipe, Student, StudentResult, StudentStore
from orchestrator.storage import Storage
from solvers.distil.methods.adam import Adam
from solvers.grids import UNIFORM
from solvers.prediction import PredictionField, endpoints_from_velocity

FORWARDS_PER_SAMPLE = 3
"""Two by the teacher and one by the student, as counted in BNS appendix D.4."""

CHECKPOINTS_PER_STAGE = 10


@dataclass(frozen=True, kw_only=True)
class ProgressiveRecipe(Recipe):
    """A chain of halvings. Its length is not part of the recipe, so an existing chain can be continued.

    The settings are those of one stage; each stage restarts the decay (linear in the paper, 'polynomial').

    Attributes:
        dataset: Dataset plugin whose reference set is the real data.
        real_content: sha256 of the real data.
        start_steps: DDIM steps of the first teacher, the model itself.
    """

    places: ClassVar[tuple[str, ...]] = ("teacher", "dataset")

    dataset: str
    real_content: str
    start_steps: int


def stages(start_steps: int, end_steps: int) -> list[int]:
    """Steps of the students, first to last; each has half the steps of its teacher.

    Raises:
        ConfigError: ``start_steps`` is not ``end_steps`` times a power of two that is at least two.
    """
    steps_of_students = []
    steps = start_steps
    while steps > end_steps and steps % 2 == 0:
        steps //= 2
        steps_of_students.append(steps)
    if steps != end_steps or not steps_of_students:
        doublings = max(1, round(math.log2(max(start_steps / end_steps, 2))))
        raise ConfigError(
            f"progressive distillation halves its steps, but {end_steps} is not reached from start_steps {start_steps}"
            f"; use start_steps {end_steps * 2**doublings}"
        )
    return steps_of_students


def check_prediction(model: ZooModel) -> None:
    """Refuse a network that progressive distillation does not support.

    Raises:
        ConfigError: It predicts epsilon.
    """
    if model.prediction == "epsilon":
        raise ConfigError(
            f"{model.name} predicts epsilon, which says nothing about the data at pure noise, and progressive "
            f"distillation compares data predictions (Salimans & Ho 2022, section 4); use a model that predicts "
            f"velocity, v_prediction or sample, or leave 'progressive' out"
        )


def distil_progressively(
    recipe: ProgressiveRecipe, end_steps: int, storage: Storage, progress: Progress
) -> list[StudentResult]:
    """Train the chain of students down to ``end_steps``, resuming from complete stages and the last checkpoint.

    Args:
        recipe: The chain.
        end_steps: Steps of the last student.
        storage: Storage for the students.
        progress: Called with the number of newly completed iterations.

    Returns:
        One result per stage, most steps first. Passes are cumulative over the chain.

    Raises:
        ConfigError: Halving does not reach ``end_steps``, or the model is not supported.
        UserError: The loss of a stage is not finite.
    """
    store = StudentStore(storage, recipe.key)
    teacher = recipe.load_teacher()
    check_prediction(teacher)
    results: list[StudentResult] = []
    for steps in stages(recipe.start_steps, end_steps):
        if store.is_complete(steps):
            progress(recipe.settings.iterations)
            results.append(store.result(steps))
        else:
            results.append(_run_stage(recipe, store, teacher, steps, results[-1] if results else None, progress))
        teacher = store.load_student(teacher, steps)
    return results


def _run_stage(
    recipe: ProgressiveRecipe,
    store: StudentStore,
    teacher: ZooModel,
    steps: int,
    before: StudentResult | None,
    progress: Progress,
) -> StudentResult:
    """Train a student of ``steps`` steps from ``teacher``, which has twice as many."""
    settings = recipe.settings
    data = _RealData.load(recipe)
    student = Student(teacher)
    student.forwards, student.backwards = (before.forwards, before.backwards) if before else (0, 0)
    saved = store.load_checkpoint()
    if saved is not None and saved["steps"] == steps:
        student.restore(saved["student"])
        progress(student.iteration)
    halving = Halving(teacher, steps)
    every = max(1, settings.iterations // CHECKPOINTS_PER_STAGE)
    while student.iteration < settings.iterations:
        batch = data.draw(halving, settings, student.iteration)
        target = halving.target(teacher, batch)
        loss = halving.loss(student.model, batch, target).mean()
        student.forwards += FORWARDS_PER_SAMPLE * settings.batch_size
        if not math.isfinite(loss.item()):
            raise UserError(
                f"progressive distillation to {steps} steps has a loss that is not finite at iteration "
                f"{student.iteration}; lower progressive.learning_rate, {settings.learning_rate:g}"
            )
        student.descend(loss, settings.rate(student.iteration))
        student.backwards += settings.batch_size
        progress(1)
        if student.iteration % every == 0 and student.iteration < settings.iterations:
            store.save_checkpoint({"steps": steps, "student": student.state()})
    return store.publish(
        recipe.teacher,
        student.weights(),
        nfe=steps,
        solver="ddim",
        forwards=student.forwards,
        backwards=student.backwards,
        data_forwards=0,
        training_set=len(data.labels),
    )


class Batch(NamedTuple):
    """Noisy real data on the student's grid: z_t (B, ...), its step index (B,), and its label (B,)."""

    z: Tensor
    step: Tensor
    label: Tensor


class Halving:
    """Targets and loss of one stage: a student of ``steps`` DDIM steps, a teacher of twice as many, uniform in time.

    For any prediction and scheduler, x-hat and eps-hat are linear in (z, network output). The coefficients depend on
    time alone and are tabulated on the teacher's grid, in float64, by running the model's own field on unit vectors, as
    ``solvers.to_ns`` does. A batch can then mix times freely.

    Args:
        model: Teacher or student; they differ in their weights only.
        steps: Steps of the student.
    """

    def __init__(self, model: ZooModel, steps: int):
        self.steps = steps
        scheduler = model.scheduler
        times = UNIFORM.times(2 * steps, scheduler)
        points = [scheduler(t) for t in times]
        self.alpha = torch.stack([point.alpha for point in points])
        self.sigma = torch.stack([point.sigma for point in points])
        rows = [self._coefficients(model, t) for t in times[:-1]]  # the network is never evaluated at the last time
        #: Per time: native time, scale of the network's input, and coefficients of x-hat and eps-hat on (z, output).
        self.native_time, self.scale = (torch.stack([row[i] for row in rows]) for i in (0, 1))
        self.data, self.noise = (torch.stack([row[i] for row in rows]) for i in (2, 3))

    @staticmethod
    def _coefficients(model: ZooModel, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, output = torch.eye(2, dtype=torch.float64)
        calls: list[tuple[Tensor, Tensor]] = []

        def record(native_x: Tensor, native_t: Tensor) -> Tensor:
            calls.append((native_t, native_x[0]))
            return output

        field = PredictionField(record, model.prediction, model.native, model.scheduler)
        data, noise = endpoints_from_velocity(field(z, t), z, model.scheduler(t))
        ((native_t, scale),) = calls
        return torch.as_tensor(native_t, dtype=torch.float64), scale, data, noise

    def endpoints(self, model: ZooModel, z: Tensor, index: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """x-hat and eps-hat of ``model`` at z, each (B, ...); ``index``, (B,), refers to the teacher's times."""
        output = model.predict(_wide(self.scale[index], z) * z, self.native_time[index], label)
        data, noise = self.data[index], self.noise[index]
        return (
            _wide(data[:, 0], z) * z + _wide(data[:, 1], z) * output,
            _wide(noise[:, 0], z) * z + _wide(noise[:, 1], z) * output,
        )

    def target(self, teacher: ZooModel, batch: Batch) -> Tensor:
        """x-tilde: the data prediction with which one DDIM step equals two steps of the teacher (algorithm 2)."""
        first = 2 * batch.step
        z = batch.z
        with torch.no_grad():
            for index in (first, first + 1):
                data, noise = self.endpoints(teacher, z, index, batch.label)
                z = _wide(self.alpha[index + 1], z) * data + _wide(self.sigma[index + 1], z) * noise
        ratio = self.sigma[first + 2] / self.sigma[first]
        gain = 1 / (self.alpha[first + 2] - ratio * self.alpha[first])
        return _wide(gain, z) * (z - _wide(ratio, z) * batch.z)

    def loss(self, student: ZooModel, batch: Batch, target: Tensor) -> Tensor:
        """max(alpha^2 / sigma^2, 1) ||x-tilde - x-hat||^2 per sample, (B,): the truncated-SNR weighting (eq. 9).

        The norm is a mean over dimensions. The signal-to-noise ratio does not depend on the direction of time.
        """
        index = 2 * batch.step
        data, _ = self.endpoints(student, batch.z, index, batch.label)
        weight = (self.alpha[index] / self.sigma[index]).square().clamp_min(1)
        return weight.to(data.dtype) * (target - data).square().flatten(1).mean(dim=1)


def _wide(values: Tensor, z: Tensor) -> Tensor:
    """Reshape (B,) coefficients to broadcast over (B, ...) samples."""
    return values.to(z.dtype).view(-1, *(1,) * (z.ndim - 1))


@dataclass(frozen=True)
class _RealData:
    samples: Tensor
    labels: Tensor

    @classmethod
    def load(cls, recipe: ProgressiveRecipe) -> _RealData:
        dataset = plugins.build("datasets", recipe.dataset)
        reference: Any = dataset.reference()
        if reference is None:
            raise ConfigError(
                f"dataset {recipe.dataset!r} has no samples to train on; choose one that has, e.g. digits"
            )
        if dataset.real_content != recipe.real_content:
            raise ConfigError(
                f"dataset {recipe.dataset!r} holds other samples than the recipe of its student names; run the same "
                f"command again to start from the current ones"
            )
        return cls(torch.from_numpy(reference.samples), torch.from_numpy(reference.labels))

    def draw(self, halving: Halving, settings: Adam, iteration: int) -> Batch:
        """The batch of an iteration. It depends on (seed, stage, iteration) only, so a resumed run draws the same."""
        random = np.random.Generator(np.random.Philox(key=[settings.seed, halving.steps * 2**40 + iteration]))
        chosen = random.integers(len(self.labels), size=settings.batch_size)
        step = torch.from_numpy(random.integers(halving.steps, size=settings.batch_size))
        x = self.samples[chosen]
        noise = torch.from_numpy(random.standard_normal(x.shape, dtype=np.float32))
        z = _wide(halving.alpha[2 * step], x) * x + _wide(halving.sigma[2 * step], x) * noise
        return Batch(z, step, self.labels[chosen])
