"""Progressive Distillation (Salimans & Ho 2022): halve the number of DDIM steps, again and again.

A student of k steps learns to do in one DDIM step what its teacher, with 2k, does in two; then it is the teacher. Real
data, no trajectories. Our time runs the other way than the paper's (t=0 is noise here), and the network may predict the
data, v or the velocity; what is compared is always the data prediction x-hat, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.errors import ConfigError, UserError
from orchestrator.models.zoo import ZooModel
from orchestrator.network_distillation.students import Progress, Student, StudentResult, StudentStore, recipe_key
from orchestrator.network_distillation.weights import check_teacher
from orchestrator.storage import Storage
from solvers.distil.adam import AdamSettings
from solvers.grids import UNIFORM
from solvers.prediction import PredictionField, endpoints_from_velocity

FORWARDS_PER_SAMPLE = 3
"""Two of the teacher and one of the student, as BNS appendix D.4 counts them."""

CHECKPOINTS_PER_STAGE = 10


@dataclass(frozen=True, kw_only=True)
class ProgressiveRecipe:
    """A chain of halvings. How far it is followed is not part of it: what is there is gone on from.

    Attributes:
        teacher: Name or path of the zoo model; it must not predict epsilon.
        teacher_digest: Its sha256.
        dataset: Dataset plugin whose reference set is the real data.
        start_steps: DDIM steps of the first teacher, the model itself.
        settings: Adam's of one stage: its rate falls anew in each (the paper's is linear, 'polynomial').
    """

    teacher: str
    teacher_digest: str
    dataset: str
    start_steps: int
    settings: AdamSettings

    @property
    def key(self) -> str:
        return recipe_key(self, leave_out=("teacher",))


def stages(start_steps: int, end_steps: int) -> list[int]:
    """Steps of the students from the first to the last: each half of its teacher's.

    Raises:
        ConfigError: ``start_steps`` is not ``end_steps`` times a power of two, at least two.
    """
    found = []
    steps = start_steps
    while steps > end_steps and steps % 2 == 0:
        steps //= 2
        found.append(steps)
    if steps != end_steps or not found:
        doublings = max(1, round(math.log2(max(start_steps / end_steps, 2))))
        raise ConfigError(
            f"progressive distillation halves its steps, and {end_steps} is not reached from start_steps {start_steps}"
            f"; use start_steps {end_steps * 2**doublings}"
        )
    return found


def check_prediction(model: ZooModel) -> None:
    """Refuse a network that progressive distillation cannot work with.

    Raises:
        ConfigError: It predicts epsilon.
    """
    if model.prediction == "epsilon":
        raise ConfigError(
            f"{model.name} predicts epsilon, which says nothing of the data where all is noise, and progressive "
            f"distillation compares data predictions (Salimans & Ho 2022, section 4); use a model that predicts "
            f"velocity, v_prediction or sample, or leave 'progressive' out"
        )


def distil_progressively(
    recipe: ProgressiveRecipe, end_steps: int, storage: Storage, progress: Progress
) -> list[StudentResult]:
    """Train the chain of students down to ``end_steps``, going on from what is complete and from the last checkpoint.

    Args:
        recipe: The chain.
        end_steps: Steps of the last student.
        storage: Where students go.
        progress: Told how many iterations are done.

    Returns:
        One result a stage, most steps first; passes are those of the whole chain up to there.

    Raises:
        ConfigError: The steps do not halve to ``end_steps``, or the model cannot be distilled so.
        UserError: The loss of a stage is not finite.
    """
    store = StudentStore(storage, recipe.key)
    teacher = check_teacher(recipe.teacher, recipe.teacher_digest)
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
    """One halving: from ``teacher``, with twice ``steps``, to a student."""
    settings = recipe.settings
    data = _RealData.load(recipe.dataset)
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
    """Noisy real data on the student's grid: z_t (B, ...), its step (B,), and its label (B,)."""

    z: Tensor
    step: Tensor
    label: Tensor


class Halving:
    """The arithmetic of one stage: a student of ``steps`` DDIM steps, a teacher of twice as many, uniform in time.

    Everything that depends on time alone is tabulated on the teacher's grid, in float64, by running the model's own
    field on the coefficients of (z, network output), as ``solvers.to_ns`` does: with any prediction and scheduler,
    x-hat and eps-hat are linear in the two. A batch then mixes times freely.

    Args:
        model: Teacher or student: they differ in their weights only.
        steps: The student's steps.
    """

    def __init__(self, model: ZooModel, steps: int):
        self.steps = steps
        scheduler = model.scheduler
        times = UNIFORM.times(2 * steps, scheduler)
        points = [scheduler(t) for t in times]
        self.alpha = torch.stack([point.alpha for point in points])
        self.sigma = torch.stack([point.sigma for point in points])
        rows = [self._coefficients(model, t) for t in times[:-1]]  # the last time is never asked
        #: Per time: native time, scale of the network's input, and x-hat's and eps-hat's weights on (z, output).
        self.native_time, self.scale = (torch.stack([row[i] for row in rows]) for i in (0, 1))
        self.data, self.noise = (torch.stack([row[i] for row in rows]) for i in (2, 3))

    @staticmethod
    def _coefficients(model: ZooModel, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, output = torch.eye(2, dtype=torch.float64)
        asked: list[tuple[Tensor, Tensor]] = []

        def record(native_x: Tensor, native_t: Tensor) -> Tensor:
            asked.append((native_t, native_x[0]))
            return output

        field = PredictionField(record, model.prediction, model.native, model.scheduler)
        data, noise = endpoints_from_velocity(field(z, t), z, model.scheduler(t))
        ((native_t, scale),) = asked
        return torch.as_tensor(native_t, dtype=torch.float64), scale, data, noise

    def endpoints(self, model: ZooModel, z: Tensor, index: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """x-hat and eps-hat of ``model`` at z, each (B, ...), at the teacher's times of these indices, (B,)."""
        output = model.predict(_wide(self.scale[index], z) * z, self.native_time[index], label)
        data, noise = self.data[index], self.noise[index]
        return (
            _wide(data[:, 0], z) * z + _wide(data[:, 1], z) * output,
            _wide(noise[:, 0], z) * z + _wide(noise[:, 1], z) * output,
        )

    def target(self, teacher: ZooModel, batch: Batch) -> Tensor:
        """x-tilde: the data prediction whose one DDIM step lands where two steps of the teacher do (algorithm 2)."""
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
        """max(alpha^2 / sigma^2, 1) ||x-tilde - x-hat||^2 of each sample, (B,): the truncated-SNR weighting (eq. 9).

        The signal-to-noise ratio does not depend on which way time runs. Mean over a sample's dimensions.
        """
        index = 2 * batch.step
        data, _ = self.endpoints(student, batch.z, index, batch.label)
        weight = (self.alpha[index] / self.sigma[index]).square().clamp_min(1)
        return weight.to(data.dtype) * (target - data).square().flatten(1).mean(dim=1)


def _wide(values: Tensor, z: Tensor) -> Tensor:
    """(B,) coefficients as they multiply (B, ...) samples."""
    return values.to(z.dtype).view(-1, *(1,) * (z.ndim - 1))


@dataclass(frozen=True)
class _RealData:
    samples: Tensor
    labels: Tensor

    @classmethod
    def load(cls, dataset: str) -> _RealData:
        reference: Any = plugins.build("datasets", dataset).reference()
        if reference is None:
            raise ConfigError(f"dataset {dataset!r} has no samples to train on; choose one that has, e.g. digits")
        return cls(torch.from_numpy(reference.samples), torch.from_numpy(reference.labels))

    def draw(self, halving: Halving, settings: AdamSettings, iteration: int) -> Batch:
        """The batch of an iteration: a function of (seed, stage, iteration) alone, so a resumed run draws the same."""
        random = np.random.Generator(np.random.Philox(key=[settings.seed, halving.steps * 2**40 + iteration]))
        chosen = random.integers(len(self.labels), size=settings.batch_size)
        step = torch.from_numpy(random.integers(halving.steps, size=settings.batch_size))
        x = self.samples[chosen]
        noise = torch.from_numpy(random.standard_normal(x.shape, dtype=np.float32))
        z = _wide(halving.alpha[2 * step], x) * x + _wide(halving.sigma[2 * step], x) * noise
        return Batch(z, step, self.labels[chosen])
