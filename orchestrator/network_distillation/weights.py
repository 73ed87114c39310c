"""Distillation of the weights towards ground truth (BST appendix K.4): RK2 is fixed, the network is trained.

Two losses, both with the papers' norm ||x|| = sqrt(mean over dimensions), averaged over the batch, on the uniform grid:

- ``lte`` is BST eq. 80, sum_i || x(t_{i+1}) - step_x(x(t_i), t_i; u^theta) ||: every midpoint step starts from the
  ground-truth trajectory. (The paper prints ``x_i`` for the start, but describes the loss as the Bespoke objective with
  the weights as parameters, whose steps start from x(t_i), eq. 24.)
- ``rmse`` is BST eq. 6, || x(1) - x_n^theta ||: the error of the sample, differentiated through all steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from safetensors.torch import load, save
from torch import Tensor

from orchestrator.models.zoo import ZooModel
from orchestrator.network_distillation.students import (
    Progress,
    Recipe,
    Student,
    StudentResult,
    StudentStore,
    student_solver,
)
from orchestrator.pairs import PairSet, PairSpec, PairStore
from orchestrator.pairs.ground_truth import solve
from orchestrator.storage import Storage
from solvers.distil.batches import batch_indices
from solvers.families.midpoint import Midpoint
from solvers.field import FunctionField
from solvers.losses import per_sample_mse, psnr_db, rmse_loss

Loss = Literal["lte", "rmse"]


@dataclass(frozen=True, kw_only=True)
class WeightsRecipe(Recipe):
    """The training of a student of K.4; the batch size of its settings is in trajectories.

    Attributes:
        train, validation: Names of pairs (``PairSpec.name``). The result is the best iterate on the validation pairs.
        nfe: Evaluations per sample, even: nfe / 2 midpoint steps.
        loss: 'lte' (eq. 80) or 'rmse' (eq. 6).
        validate_every: Iterations between validations. A checkpoint is saved at each of them.
    """

    train: str
    validation: str
    nfe: int
    loss: Loss
    validate_every: int


def distil_weights(recipe: WeightsRecipe, storage: Storage, progress: Progress) -> StudentResult:
    """Train a student, resuming from its last checkpoint. The result is the best validated iterate.

    On the validation pairs, the result is never worse than the teacher with the same solver, which is the first
    validated iterate.

    Args:
        recipe: The student to train.
        storage: Storage of the pairs and the student.
        progress: Called with the number of newly completed iterations.

    Raises:
        ConfigError: The teacher's file is a different model than the recipe's.
        StoreError: A pair store is not complete.
    """
    store = StudentStore(storage, recipe.key)
    if store.is_complete(recipe.nfe):
        progress(recipe.settings.iterations)
        return store.result(recipe.nfe)
    run = _Run(recipe, storage)
    saved = store.load_checkpoint()
    if saved is None:
        run.validate()
    else:
        run.restore(saved)
        progress(run.student.iteration)
    while run.status == "running":
        before = run.student.iteration
        run.advance(recipe.validate_every, progress)
        if run.student.iteration > before:
            run.validate()
        store.save_checkpoint(run.state())
    progress(recipe.settings.iterations - run.student.iteration)  # a diverged run has skipped these
    return store.publish(
        recipe.teacher,
        run.best,
        nfe=recipe.nfe,
        solver="midpoint",
        forwards=run.student.forwards,
        backwards=run.student.backwards,
        data_forwards=run.data_forwards,
        training_set=recipe.settings.training_pairs,
        status=run.status,
        history=run.history,
    )


class _Run:
    """One training run: the student, its best iterate, and its training data."""

    def __init__(self, recipe: WeightsRecipe, storage: Storage):
        self.recipe = recipe
        teacher = recipe.load_teacher()
        self.solver = student_solver("midpoint", recipe.nfe)
        self.times = self.solver.grid.times(recipe.nfe // 2, teacher.scheduler)
        self.spec, self.pairs = _open(storage, recipe.train)
        _, self.validation = _open(storage, recipe.validation)
        self.objective: Callable[[list[int]], Tensor]
        if recipe.loss == "lte":
            self.trajectories, self.data_forwards = trajectories(teacher, storage, recipe.train, self.times)
            self.objective = self._local_errors
        else:
            self.data_forwards = int(self.pairs.nfe.sum())
            self.objective = self._sample_errors
        self.student = Student(teacher)
        self.history: list[list[float]] = []
        self.best: dict[str, Tensor] = {}
        self.status = "running"

    def advance(self, steps: int, progress: Progress) -> None:
        """Run ``steps`` iterations, or fewer if the run ends or diverges."""
        settings, student = self.recipe.settings, self.student
        last = min(student.iteration + steps, settings.iterations)
        while student.iteration < last:
            indices = batch_indices(
                settings.training_pairs, settings.batch_size, settings.seed, iteration=student.iteration
            )
            loss = self.objective(indices).mean()
            student.forwards += self.recipe.nfe * len(indices)
            if not math.isfinite(loss.item()):
                self.status = "diverged"
                return
            student.descend(loss, settings.rate(student.iteration))
            student.backwards += self.recipe.nfe * len(indices)
            progress(1)
        if student.iteration >= settings.iterations:
            self.status = "finished"

    def _local_errors(self, indices: list[int]) -> Tensor:
        """The summands of eq. 80 for these trajectories, shape (B,)."""
        states = self.trajectories[indices]
        field = self.student.model.field(self.pairs.stored[indices], self.spec.guidance_scale)
        steps = [
            rmse_loss(Midpoint().integrate(field, states[:, i], torch.stack(ends)), states[:, i + 1])
            for i, ends in enumerate(pairwise(self.times))
        ]
        return torch.stack(steps).sum(dim=0)

    def _sample_errors(self, indices: list[int]) -> Tensor:
        """The summands of eq. 6 for these pairs, shape (B,)."""
        return rmse_loss(self._sample(self.pairs.select(indices)), self.pairs.x1[indices])

    def _sample(self, pairs: PairSet) -> Tensor:
        return self.solver.sample(self.student.model.field(pairs.condition, self.spec.guidance_scale), pairs.x0)

    def validate(self) -> None:
        """Record the mean PSNR on the validation pairs, in dB, and keep the best iterate."""
        with torch.no_grad():
            error = per_sample_mse(self._sample(self.validation), self.validation.x1)
        self.student.forwards += self.recipe.nfe * len(self.validation)
        psnr = float(psnr_db(error, self.student.model.data_range).mean())
        if not math.isfinite(psnr):
            self.status = "diverged"
            return
        if not self.history or psnr > max(value for _, value in self.history):
            self.best = self.student.weights()
        self.history.append([float(self.student.iteration), psnr])

    def state(self) -> dict[str, object]:
        return {"student": self.student.state(), "best": self.best, "history": self.history, "status": self.status}

    def restore(self, state: dict[str, object]) -> None:
        self.student.restore(state["student"])  # type: ignore[arg-type]
        self.best, self.history, self.status = state["best"], state["history"], state["status"]  # type: ignore[assignment]


def trajectories(teacher: ZooModel, storage: Storage, pairs: str, times: Tensor) -> tuple[Tensor, int]:
    """x(t_i) of a pair set on a time grid, and the forwards spent on them. Computed once and stored.

    The adaptive solver stops at every grid time, with the pairs' own tolerances, so nothing is interpolated.

    Args:
        teacher: Model that made the pairs.
        storage: Storage of the pairs and of the trajectories.
        pairs: Name of the pairs.
        times: Grid, shape (n + 1,), from the scheduler's first time to its last.

    Returns:
        States, shape (N, n + 1, \\*sample shape), float32, and network forwards, counted per sample.
    """
    key = f"trajectories/{pairs}-uniform{len(times) - 1}.safetensors"
    if not storage.exists(key):
        spec, pair_set = _open(storage, pairs)
        forwards = 0
        parts = []
        for batch in spec.batches(range(spec.count)):
            states, nfe = _solve_between(teacher, spec, pair_set.select(list(batch)), times)
            parts.append(states)
            forwards += nfe * len(batch) * teacher.forwards_per_evaluation(spec.guidance_scale)
        storage.write(key, save({"states": torch.cat(parts), "forwards": torch.tensor(forwards)}))
    tensors = load(storage.read(key))
    return tensors["states"], int(tensors["forwards"])


def _solve_between(teacher: ZooModel, spec: PairSpec, batch: PairSet, times: Tensor) -> tuple[Tensor, int]:
    field = teacher.field(batch.condition, spec.guidance_scale)
    x = float(field.scheduler.start(times[0])) * batch.x0.to(torch.float64)
    states = [x]
    total = 0
    for t, t_next in pairwise(times.tolist()):
        # The solver starts from sigma(t_min) x0. On this interval alone, x0 = x(t) / sigma(t) makes it start from x(t).
        scheduler = dataclasses.replace(field.scheduler, t_min=t, t_max=t_next, start_scale=None)
        solution = solve(FunctionField(field, scheduler), x / float(scheduler.sigma(t)), spec.rtol, spec.atol)
        x, nfe = solution[0], solution[1]
        states.append(x)
        total += nfe
    return torch.stack(states, dim=1).float(), total


def _open(storage: Storage, name: str) -> tuple[PairSpec, PairSet]:
    store = PairStore.open(storage, name)
    return store.spec, store.load()
