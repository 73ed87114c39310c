"""Levenberg-Marquardt on theta: distillation in a few dozen iterations, and without a backward pass.

The loss of BNS (eq. 13) is a mean of log ||r_s||^2 over pairs, r_s = x_n - x(1). Iteratively reweighted least squares
with weights 1/||r_s|| bounds it from above (``solvers.distil.normal_equations``), so each iteration solves a damped
linear system of the size of theta. Split as ``solvers.distil.adam`` is: a state that is plain numbers
(:class:`LMState`), and a function that advances it (:func:`advance`) by asking two questions of whoever has the model
and the pairs. Sources: Levenberg 1944, Marquardt 1963; projected onto bounds as in Bertsekas 1982.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from solvers.distil.batches import batch_indices
from solvers.distil.linear_system import solve_symmetric
from solvers.distil.normal_equations import Jacobian, NormalEquations, evaluations_per_pair
from solvers.distil.state import DistillationState, Status
from solvers.families.base import LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

LOWER, RAISE = 1 / 3, 4.0
"""What the damping is multiplied by after a step that was as good as predicted, and after one that was refused."""

GOOD, POOR = 0.75, 0.25
"""Shares of the predicted decrease above which the damping is lowered, and below which it is raised."""

PATIENCE = 3
"""Iterations in a row without a step, at the largest damping or for want of finite numbers, that end a run."""


class Normal(Protocol):
    """Whoever answers with the normal equations at ``solver``, summed over the training pairs ``indices``.

    The columns of the numbers that ``free`` (mask over flat theta) leaves out may be zero.
    """

    def __call__(
        self, solver: NSSolver, indices: list[int], *, jacobian: Jacobian, free: Tensor
    ) -> NormalEquations: ...


Loss = Callable[[NSSolver, list[int]], float]
"""``loss(solver, indices)``: mean of log ||r_s||^2 over those training pairs."""


@dataclass(frozen=True, kw_only=True)
class LMSettings:
    """What one run is asked to do.

    Attributes:
        iterations: Length of the run.
        batch_size: Pairs per iteration.
        seed: Seed of the batch order.
        training_pairs: Number of pairs to draw from.
        jacobian: 'forward', 'central' or 'jvp'. A run with 'forward' that can take no step any more goes on with
            'central', since then the noise of the differences may exceed the slope.
        damping: Damping lambda to start with, in units of the matrix's diagonal.
        damping_min, damping_max: Its limits.
        retries: How often a refused step is tried again with more damping, for the price of a loss each.
        ridge_floor: What is added to the diagonal before it is damped, as a share of its largest entry: directions
            that the parameters do not determine stay where they are.

    Raises:
        ValueError: A number out of range.
    """

    iterations: int = 25
    batch_size: int = 64
    seed: int = 0
    training_pairs: int = 520
    jacobian: Jacobian = "forward"
    damping: float = 1e-2
    damping_min: float = 1e-5
    damping_max: float = 1e6
    retries: int = 4
    ridge_floor: float = 1e-12

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "training_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.jacobian not in get_args(Jacobian):
            raise ValueError(f"unknown jacobian {self.jacobian!r}; choose one of {', '.join(get_args(Jacobian))}")
        if not 0 < self.damping_min <= self.damping <= self.damping_max < math.inf:
            raise ValueError(
                f"damping must satisfy 0 < damping_min <= damping <= damping_max, got {self.damping_min}, "
                f"{self.damping}, {self.damping_max}"
            )
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, got {self.retries}")
        if not 0 < self.ridge_floor < 1:
            raise ValueError(f"ridge_floor must lie between 0 and 1, got {self.ridge_floor}")


@dataclass(frozen=True)
class LMState(DistillationState):
    """Everything a run needs to go on: plain lists, so that it can be written as JSON.

    Attributes:
        parameters: Parameters of the learnable family; always finite.
        damping: lambda of the next iteration.
        jacobian: The differences in use; 'central' after a run with 'forward' has come to a stand.
        iteration: Iterations done, those without a step included.
        status: 'running', 'finished', 'stalled', 'diverged', or 'stopped' (early, by a search).
        reason: Why the run stalled; None for every other status.
        failures: Iterations in a row that count towards a stall.
        evaluations: Velocity evaluations spent on training pairs; there are no backward passes.
        loss: Mean over the iterations since the last validation of the loss at their start.
        validated: One entry per validation: iteration, psnr_db, parameters. The first is the start itself.
    """

    parameters: list[float]
    damping: float
    jacobian: Jacobian
    iteration: int = 0
    status: Status = "running"
    reason: str | None = None
    failures: int = 0
    evaluations: int = 0
    loss: float | None = None
    validated: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, parameters: Tensor, settings: LMSettings) -> LMState:
        """The state before the first iteration.

        Raises:
            ValueError: Parameters that are not finite.
        """
        wrong = int((~torch.isfinite(parameters)).sum())
        if wrong:
            raise ValueError(f"{wrong} of {len(parameters)} starting parameters are not finite; choose another start")
        return cls(parameters=parameters.tolist(), damping=settings.damping, jacobian=settings.jacobian)


def advance(
    state: LMState,
    steps: int,
    settings: LMSettings,
    family: LearnableFamily,
    scheduler: Scheduler,
    sigma0: float,
    normal: Normal,
    loss: Loss,
) -> LMState:
    """``steps`` more iterations, or fewer where the run ends or stalls.

    An iteration draws a batch, asks for its normal equations once, and takes the first step that lowers the batch's
    loss, from the state's damping upwards. The result depends on the state alone: two calls of k steps equal one of
    2k, bit for bit (but for ``loss``, a mean since the last call). Numbers that are not finite never enter theta.
    """
    problem = _Problem(settings, family, scheduler, sigma0, normal, loss)
    losses: list[float] = []
    last = min(state.iteration + steps, settings.iterations)
    while state.status == "running" and state.iteration < last:
        state, before = problem.iterate(state)
        if math.isfinite(before):
            losses.append(before)
    if losses:
        state = replace(state, loss=sum(losses) / len(losses))
    if state.status == "running" and state.iteration >= settings.iterations:
        state = replace(state, status="finished")
    return state


@dataclass(frozen=True)
class _Problem:
    """What a run minimises, and how."""

    settings: LMSettings
    family: LearnableFamily
    scheduler: Scheduler
    sigma0: float
    normal: Normal
    loss: Loss

    def iterate(self, state: LMState) -> tuple[LMState, float]:
        """The state after one iteration, and the batch's mean loss before it."""
        settings = self.settings
        parameters = torch.tensor(state.parameters, dtype=torch.float64)
        indices = batch_indices(settings.training_pairs, settings.batch_size, settings.seed, state.iteration)
        solver, chain = self.linearised(parameters)
        free = (chain != 0).any(dim=1)
        equations = self.normal(solver, indices, jacobian=state.jacobian, free=free)
        spent = evaluations_per_pair(solver.nfe, state.jacobian, free) * len(indices)
        state = replace(state, iteration=state.iteration + 1, evaluations=state.evaluations + spent)
        before = equations.loss / equations.count
        model = Quadratic(chain.T @ equations.h @ chain / equations.count, chain.T @ equations.g / equations.count)
        if not (math.isfinite(before) and model.is_finite()):
            return self.without_step(state, "not finite"), before
        damping = state.damping
        for _ in range(1 + settings.retries):
            candidate = damped_step(parameters, model, damping, settings.ridge_floor, self.project)
            # A step that is not finite or moves nothing is refused unasked.
            if bool(torch.isfinite(candidate).all()) and not torch.equal(candidate, parameters):
                state = replace(state, evaluations=state.evaluations + solver.nfe * len(indices))
                change = self.loss_at(candidate, indices) - before
                if change < 0:
                    share = change / model.change(candidate - parameters)
                    damping *= LOWER if share > GOOD else RAISE if share < POOR else 1.0
                    damping = min(max(damping, settings.damping_min), settings.damping_max)
                    return replace(state, parameters=candidate.tolist(), damping=damping, failures=0), before
            if damping >= settings.damping_max:
                return self.without_step(replace(state, damping=damping), "no descent"), before
            damping = min(damping * RAISE, settings.damping_max)
        return replace(state, damping=damping, failures=0), before

    def linearised(self, parameters: Tensor) -> tuple[NSSolver, Tensor]:
        """The solver at ``parameters``, and M = d flat / d parameters, (P, p)."""
        leaf = parameters.clone().requires_grad_()
        solver = self.family.to_ns(leaf, self.scheduler, self.sigma0)
        flat = solver.flat()
        rows = [
            torch.autograd.grad(number, leaf, retain_graph=True, allow_unused=True)[0] if number.requires_grad else None
            for number in flat
        ]
        return solver.detach(), torch.stack([torch.zeros_like(parameters) if row is None else row for row in rows])

    def project(self, parameters: Tensor) -> Tensor:
        return self.family.project(parameters, self.scheduler, self.sigma0)

    def loss_at(self, parameters: Tensor, indices: list[int]) -> float:
        """The batch's mean loss; +inf where theta or the loss is not finite."""
        solver = self.family.to_ns(parameters, self.scheduler, self.sigma0).detach()
        if not bool(torch.isfinite(solver.flat()).all()):
            return math.inf
        loss = self.loss(solver, indices)
        return loss if math.isfinite(loss) else math.inf

    def without_step(self, state: LMState, cause: Literal["not finite", "no descent"]) -> LMState:
        """The state after an iteration that counts towards a stall: the differences are refined first."""
        if state.failures + 1 < PATIENCE:
            return replace(state, failures=state.failures + 1)
        if cause == "no descent" and state.jacobian == "forward":
            return replace(state, jacobian="central", damping=self.settings.damping, failures=0)
        reason = {
            "not finite": "the loss or its derivatives are not finite; check that the model's velocity is finite near "
            "the states of the start, or choose another start",
            "no descent": f"no step lowers the loss, up to damping {self.settings.damping_max:g}: theta is as good as "
            f"the precision of the model's velocity tells, or held by the bounds of its times",
        }[cause]
        return replace(
            state, status="stalled", reason=f"{PATIENCE} iterations in a row up to {state.iteration}: {reason}"
        )


class Quadratic(NamedTuple):
    """The local model of the mean loss, g^T delta + delta^T H delta / 2.

    Attributes:
        h: (p, p), float64, symmetric and positive semidefinite up to rounding; singular where parameters are redundant.
        g: (p,), float64.
    """

    h: Tensor
    g: Tensor

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.h).all() and torch.isfinite(self.g).all())

    def change(self, delta: Tensor) -> float:
        return float(self.g @ delta + delta @ self.h @ delta / 2)


def damped_step(
    parameters: Tensor, model: Quadratic, damping: float, ridge_floor: float, project: Callable[[Tensor], Tensor]
) -> Tensor:
    """The parameters after the step (H + lambda D) delta = -g, D = diag(H) + floor, inside their bounds.

    Where ``project`` changes parameters of the step, those are held at their bounds and the others solved for again:
    clipping a step afterwards would leave the rest of it wrong, since the columns of neighbouring times are far from
    independent.

    Args:
        parameters: (p,), float64.
        model: H and g there.
        damping: lambda > 0.
        ridge_floor: The floor as a share of the largest diagonal entry of H.
        project: The nearest parameters inside the bounds.
    """
    diagonal = model.h.diagonal().clamp_min(0)
    scale = (diagonal + ridge_floor * diagonal.max()).sqrt()
    if float(scale.max()) == 0:  # the loss depends on no parameter
        return parameters
    # In units of the diagonal the system has ones there: its condition is that of the problem and not of its units.
    system = model.h / scale[:, None] / scale + damping * torch.eye(len(scale), dtype=torch.float64)
    target = -model.g / scale
    step = solve_symmetric(system, target) / scale
    projected = project(parameters + step)
    held = projected != parameters + step
    if not bool(held.any()) or bool(held.all()):
        return projected
    fixed = (projected - parameters)[held] * scale[held]
    rest = ~held
    step = (projected - parameters).clone()
    step[rest] = solve_symmetric(system[rest][:, rest], target[rest] - system[rest][:, held] @ fixed) / scale[rest]
    return project(parameters + step)
