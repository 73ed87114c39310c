"""Levenberg-Marquardt on theta: distillation in a few dozen iterations, without a backward pass.

The loss of BNS (eq. 13) is a mean of log ||r_s||^2 over pairs, r_s = x_n - x(1). Iteratively reweighted least squares
with weights 1/||r_s|| bounds it from above (``solvers.distil.normal_equations``), so each iteration solves a damped
linear system of the size of theta. Like Adam, the method is split into a state of plain numbers (:class:`LMState`) and
a generator that advances it (:func:`iterations`). The generator asks for two things: normal equations and losses.

Sources: Levenberg 1944, Marquardt 1963; projected onto bounds as in Bertsekas 1982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from solvers.distil.batches import batch_indices
from solvers.distil.drive import drive
from solvers.distil.linear_system import solve_symmetric
from solvers.distil.methods.base import LossQuery, Method, NormalQuery, Query, RunLength
from solvers.distil.normal_equations import Jacobian, NormalEquations, evaluations_per_pair
from solvers.distil.state import DistillationState, Status
from solvers.families.base import LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

T = TypeVar("T")

LOWER, RAISE = 1 / 3, 4.0
"""Factors of the damping: after a step that decreased the loss as predicted, and after a poor or rejected step."""

GOOD, POOR = 0.75, 0.25
"""Shares of the predicted decrease: above GOOD the damping is lowered, below POOR it is raised."""

PATIENCE = 3
"""Consecutive iterations without a step, due to the largest damping or non-finite numbers, after which a run stalls."""


class Normal(Protocol):
    """Callable that returns the normal equations at ``solver``, summed over the training pairs ``indices``.

    ``free`` is a mask over flat theta. Rows and columns of the entries outside it may be zero.
    """

    def __call__(
        self, solver: NSSolver, indices: list[int], *, jacobian: Jacobian, free: Tensor
    ) -> NormalEquations: ...


Loss = Callable[[NSSolver, list[int]], float]
"""``loss(solver, indices)``: mean of log ||r_s||^2 over these training pairs."""


LMGenerator = Generator[Query, Any, T]
"""Yields queries, receives :class:`NormalEquations` or a float, and returns a T."""


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(Method):
    """Levenberg-Marquardt on the PSNR loss, without a backward pass by default.

    Attributes:
        iterations: Number of iterations of the run.
        batch_size: Pairs per iteration.
        seed: Seed of the batch order.
        training_pairs: Number of pairs to draw from.
        jacobian: 'forward', 'central' or 'jvp'. A run with 'forward' that finds no more steps continues with
            'central', since the noise of the forward differences may then exceed the slope.
        damping: Initial damping lambda, in units of the matrix's diagonal.
        damping_min, damping_max: Limits of the damping.
        retries: How often a rejected step is retried with more damping, at the cost of one loss each.
        ridge_floor: Floor added to the diagonal before damping, as a share of its largest entry. It keeps directions
            that do not affect the loss where they are.

    Raises:
        ValueError: A setting is out of range.
    """

    name = "levenberg_marquardt"
    label = "LM"
    default_length = RunLength(iterations=40, batch_size=64, validate_every=4)
    logged = ("jacobian",)
    psnr_only = True

    iterations: int = 25
    batch_size: int = 64
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

    @classmethod
    def variants(cls, options: Mapping[str, Any], half_precision: bool) -> list[dict[str, Any]]:
        jacobian = options.get("jacobian", "auto")
        if jacobian == "auto":  # central differences tolerate the rounding of half precision
            jacobian = "central" if half_precision else "forward"
        return [{**options, "jacobian": jacobian}]

    @property
    def needs_gradients(self) -> bool:
        return self.jacobian == "jvp"

    def begin(self, parameters: Tensor) -> LMState:
        return LMState.begin(parameters, self)

    def resume(self, saved: Mapping[str, Any]) -> LMState:
        return LMState(**saved)

    def iterate(
        self,
        state: DistillationState,
        steps: int,
        family: LearnableFamily,
        scheduler: Scheduler,
        sigma0: float,
        *,
        in_parameters: bool = False,
    ) -> LMGenerator[DistillationState]:
        assert isinstance(state, LMState)
        assert not in_parameters, "the PSNR loss is a function of theta"
        return iterations(state, steps, self, family, scheduler, sigma0)

    def evaluations(self, state: DistillationState, nfe: int) -> tuple[int, int]:
        assert isinstance(state, LMState)
        return state.evaluations, 0


@dataclass(frozen=True)
class LMState(DistillationState):
    """Everything needed to continue a run, as plain lists that can be written as JSON.

    Attributes:
        parameters: Parameters of the learnable family; always finite.
        damping: lambda of the next iteration.
        jacobian: The derivatives in use; 'central' once a run with 'forward' takes no further step.
        iteration: Number of completed iterations, including those without a step.
        status: 'running', 'finished', 'stalled', 'diverged', or 'stopped' (early, by a search).
        reason: Why the run stalled; None for every other status.
        failures: Consecutive iterations that count towards a stall.
        evaluations: Velocity evaluations spent on training pairs; it needs no backward pass.
        loss: Loss at the start of an iteration, averaged over the iterations since the last validation.
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
    def begin(cls, parameters: Tensor, settings: LevenbergMarquardt) -> LMState:
        """The state before the first iteration.

        Raises:
            ValueError: Some parameters are not finite.
        """
        non_finite = int((~torch.isfinite(parameters)).sum())
        if non_finite:
            raise ValueError(
                f"{non_finite} of {len(parameters)} starting parameters are not finite; choose another start"
            )
        return cls(parameters=parameters.tolist(), damping=settings.damping, jacobian=settings.jacobian)


def advance(
    state: LMState,
    steps: int,
    settings: LevenbergMarquardt,
    family: LearnableFamily,
    scheduler: Scheduler,
    sigma0: float,
    normal: Normal,
    loss: Loss,
) -> LMState:
    """Run :func:`iterations` with functions that evaluate the model; otherwise arguments and result are the same."""

    def answer(query: Query) -> NormalEquations | float:
        if isinstance(query, NormalQuery):
            return normal(query.solver, query.indices, jacobian=query.jacobian, free=query.free)
        assert isinstance(query, LossQuery)
        return loss(query.solver, query.indices)

    return drive(iterations(state, steps, settings, family, scheduler, sigma0), answer)


def iterations(
    state: LMState,
    steps: int,
    settings: LevenbergMarquardt,
    family: LearnableFamily,
    scheduler: Scheduler,
    sigma0: float,
) -> LMGenerator[LMState]:
    """Run ``steps`` more iterations, or fewer if the run ends or stalls; yields the evaluations they need.

    An iteration draws a batch, requests its normal equations once, and takes the first step that lowers the batch's
    loss, starting at the state's damping and raising it. The result depends on the state alone: two calls with k steps
    equal one call with 2k, bit for bit, except for ``loss``, which is a mean over the last call. Non-finite numbers
    never enter theta.
    """
    problem = _Problem(settings, family, scheduler, sigma0)
    losses: list[float] = []
    last = min(state.iteration + steps, settings.iterations)
    while state.status == "running" and state.iteration < last:
        state, before = yield from problem.iterate(state)
        if math.isfinite(before):
            losses.append(before)
    if losses:
        state = replace(state, loss=sum(losses) / len(losses))
    if state.status == "running" and state.iteration >= settings.iterations:
        state = replace(state, status="finished")
    return state


@dataclass(frozen=True)
class _Problem:
    """The minimisation problem of a run."""

    settings: LevenbergMarquardt
    family: LearnableFamily
    scheduler: Scheduler
    sigma0: float

    def iterate(self, state: LMState) -> LMGenerator[tuple[LMState, float]]:
        """Return the state after one iteration, and the batch's mean loss before it."""
        settings = self.settings
        parameters = torch.tensor(state.parameters, dtype=torch.float64)
        indices = batch_indices(settings.training_pairs, settings.batch_size, settings.seed, state.iteration)
        solver, chain = self.linearised(parameters)
        free = (chain != 0).any(dim=1)
        equations: NormalEquations = yield NormalQuery(solver, indices, state.jacobian, free)
        spent = evaluations_per_pair(solver.nfe, state.jacobian, free) * len(indices)
        state = replace(state, iteration=state.iteration + 1, evaluations=state.evaluations + spent)
        before = equations.loss / equations.count
        model = Quadratic(chain.T @ equations.h @ chain / equations.count, chain.T @ equations.g / equations.count)
        if not (math.isfinite(before) and model.is_finite()):
            return self.without_step(state, "not finite"), before
        damping = state.damping
        for _ in range(1 + settings.retries):
            candidate = damped_step(parameters, model, damping, settings.ridge_floor, self.project)
            # A step that is not finite or changes nothing is rejected without evaluating its loss.
            if bool(torch.isfinite(candidate).all()) and not torch.equal(candidate, parameters):
                state = replace(state, evaluations=state.evaluations + solver.nfe * len(indices))
                change = (yield from self.loss_at(candidate, indices)) - before
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
        """Return the solver at ``parameters``, and M = d flat / d parameters, (P, p)."""
        leaf = parameters.clone().requires_grad_()
        solver = self.family.to_ns(leaf, self.scheduler, self.sigma0)
        flat = solver.flat()
        rows = [
            torch.autograd.grad(entry, leaf, retain_graph=True, allow_unused=True)[0] if entry.requires_grad else None
            for entry in flat
        ]
        return solver.detach(), torch.stack([torch.zeros_like(parameters) if row is None else row for row in rows])

    def project(self, parameters: Tensor) -> Tensor:
        return self.family.project(parameters, self.scheduler, self.sigma0)

    def loss_at(self, parameters: Tensor, indices: list[int]) -> LMGenerator[float]:
        """The batch's mean loss; +inf if theta or the loss is not finite."""
        solver = self.family.to_ns(parameters, self.scheduler, self.sigma0).detach()
        if not bool(torch.isfinite(solver.flat()).all()):
            return math.inf
        loss: float = yield LossQuery(solver, indices)
        return loss if math.isfinite(loss) else math.inf

    def without_step(self, state: LMState, cause: Literal["not finite", "no descent"]) -> LMState:
        """The state after an iteration without a step: a failure, a switch to central differences, or a stall."""
        if state.failures + 1 < PATIENCE:
            return replace(state, failures=state.failures + 1)
        if cause == "no descent" and state.jacobian == "forward":
            return replace(state, jacobian="central", damping=self.settings.damping, failures=0)
        reason = {
            "not finite": "the loss or its derivatives are not finite; check that the model's velocity is finite near "
            "the states of the start, or choose another start",
            "no descent": f"no step lowers the loss, up to damping {self.settings.damping_max:g}: theta is as good as "
            f"the precision of the model's velocity allows, or is held by the bounds of its times",
        }[cause]
        return replace(
            state, status="stalled", reason=f"{PATIENCE} iterations in a row up to {state.iteration}: {reason}"
        )


class Quadratic(NamedTuple):
    """The local model of the mean loss, g^T delta + delta^T H delta / 2.

    Attributes:
        h: (p, p), float64, symmetric and positive semidefinite up to rounding; singular if parameters are redundant.
        g: (p,), float64.
    """

    h: Tensor
    g: Tensor

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.h).all() and torch.isfinite(self.g).all())

    def change(self, delta: Tensor) -> float:
        """The predicted change of the loss after the step ``delta``, shape (p,)."""
        return float(self.g @ delta + delta @ self.h @ delta / 2)


def damped_step(
    parameters: Tensor, model: Quadratic, damping: float, ridge_floor: float, project: Callable[[Tensor], Tensor]
) -> Tensor:
    """The parameters after the step (H + lambda D) delta = -g, D = diag(H) + floor, inside their bounds.

    If ``project`` changes some parameters, these are held at their bounds and the others are solved for again. Clipping
    the step alone would leave the other parameters wrong, since the columns of neighbouring times are strongly
    correlated.

    Args:
        parameters: (p,), float64.
        model: H and g at ``parameters``.
        damping: lambda > 0.
        ridge_floor: The floor as a share of the largest diagonal entry of H.
        project: Returns the nearest parameters inside the bounds.
    """
    diagonal = model.h.diagonal().clamp_min(0)
    scale = (diagonal + ridge_floor * diagonal.max()).sqrt()
    if float(scale.max()) == 0:  # the loss does not depend on any parameter
        return parameters
    # Scaling by the diagonal gives a unit diagonal, so the conditioning does not depend on the units of the parameters.
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


METHOD = LevenbergMarquardt
