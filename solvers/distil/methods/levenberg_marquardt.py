"""Levenberg-Marquardt on theta: distillation in a few dozen iterations, without a backward pass.

The loss of BNS (eq. 13) is a mean of log ||r_s||^2 over pairs, r_s = x_n - x(1). Iteratively reweighted least squares
with weights 1/||r_s|| bounds it from above (``solvers.distil.normal_equations``), so each iteration solves a damped
linear system of the size of theta. It asks for two things: normal equations and losses.

Sources: Levenberg 1944, Marquardt 1963; projected onto bounds as in Bertsekas 1982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from solvers.distil.batches import BatchSizes, batch_indices
from solvers.distil.linear_system import solve_symmetric
from solvers.distil.methods.base import Asking, LossQuery, Method, NormalQuery, Problem, RunLength, ask_all
from solvers.distil.normal_equations import Jacobian, NormalEquations, evaluations_per_pair
from solvers.distil.sizes import sizes
from solvers.distil.state import DistillationState
from solvers.ns import NSSolver

RAISE = 4.0
"""Factor of the damping after a poor or rejected step."""

FIXED_BATCH_FACTOR, FIXED_BATCH_DAMPING = 1 / 3, 1e-5
"""Factor of the damping after a good step, and its lower limit, unless they are set."""
FOR_GROWING_BATCHES: dict[str, Any] = {"damping_factor": 0.1, "damping_min": 1e-7, "memory_share": 0.5}
"""The same, and the share of earlier equations, for batches that grow by default
(benchmarks/results/2026-11-28-growing-batches.md)."""

GOOD, POOR = 0.75, 0.25
"""Shares of the predicted decrease: above GOOD the damping is lowered, below POOR it is raised."""

PATIENCE = 3
"""Consecutive iterations without a step, due to the largest damping or non-finite numbers, after which a run stalls."""


@dataclass(frozen=True, kw_only=True)
class LMState(DistillationState):
    """The state of a run, whose parameters are always finite.

    Attributes:
        damping: lambda of the next iteration.
        jacobian: The derivatives in use; 'central' once a run with 'forward' takes no further step.
        reason: Why the run stalled; None for every other status.
        failures: Consecutive iterations without a step, which count towards a stall.
        evaluations: Velocity evaluations spent on training pairs; it needs no backward pass.
        earlier: Sums of the normal equations of earlier batches, moved to the current parameters; None without memory.
    """

    damping: float
    jacobian: Jacobian
    reason: str | None = None
    failures: int = 0
    evaluations: int = 0
    earlier: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(Method):
    """Levenberg-Marquardt on the PSNR loss, without a backward pass by default.

    Attributes:
        jacobian: 'forward', 'central' or 'jvp'. A run with 'forward' that finds no more steps continues with
            'central', since the noise of the forward differences may then exceed the slope.
        damping: Initial damping lambda, in units of the matrix's diagonal.
        damping_min, damping_max: Limits of the damping.
        damping_factor: Factor of the damping after a step that decreased the loss as predicted.
        retries: How often a rejected step is retried with more damping, at the cost of one loss each.
        ridge_floor: Floor added to the diagonal before damping, as a share of its largest entry. It keeps directions
            that do not affect the loss where they are.
        first_batch_size, batch_growth: Iteration k takes ``first_batch_size * batch_growth^k`` pairs, at most
            ``batch_size``. Early steps are far from precise, so few pairs suffice for them. None: every iteration
            takes ``batch_size`` pairs.
        memory_share: Share of the earlier batches' normal equations that is added to those of a batch. It keeps a step
            on a few pairs from fitting these alone, but delays the last steps. 0: each batch stands alone.
        memory_pairs: Batch size at which the share has faded to 0, linearly; None: it stays as it is.
        patience: Validations in a row without a gain after which the run ends; None: it takes all its iterations.

    Raises:
        ValueError: A setting is out of range.
    """

    name = "levenberg_marquardt"
    label = "LM"
    state_type = LMState
    default_length = RunLength(iterations=40, batch_size=64, validate_every=4)
    logged = ("jacobian",)
    neutral: ClassVar[Mapping[str, Any]] = {
        "damping_factor": FIXED_BATCH_FACTOR,
        "memory_share": 0.0,
        "memory_pairs": None,
        "patience": None,
    }
    psnr_only = True
    solves_for_all = True
    several_sets = True

    iterations: int = 25
    batch_size: int = 64
    jacobian: Jacobian = "forward"
    damping: float = 1e-2
    damping_min: float = FIXED_BATCH_DAMPING
    damping_max: float = 1e6
    retries: int = 4
    ridge_floor: float = 1e-12
    first_batch_size: int | None = None
    batch_growth: float = 1.0
    damping_factor: float = FIXED_BATCH_FACTOR
    memory_share: float = 0.0
    memory_pairs: int | None = None
    patience: int | None = None

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
        if not 0 < self.damping_factor <= 1:
            raise ValueError(f"damping_factor must be more than 0 and at most 1, got {self.damping_factor}")
        if not 0 <= self.memory_share < 1:
            raise ValueError(f"memory_share must be at least 0 and less than 1, got {self.memory_share}")
        if self.memory_pairs is not None and self.memory_pairs < 1:
            raise ValueError(f"memory_pairs must be at least 1, got {self.memory_pairs}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, got {self.retries}")
        if not 0 < self.ridge_floor < 1:
            raise ValueError(f"ridge_floor must lie between 0 and 1, got {self.ridge_floor}")
        if self.first_batch_size is None:
            if self.batch_growth != 1:
                raise ValueError(f"batch_growth {self.batch_growth:g} needs first_batch_size, the pairs to grow from")
        elif not 1 <= self.first_batch_size < self.batch_size:
            raise ValueError(
                f"first_batch_size must be at least 1 and less than batch_size {self.batch_size}, "
                f"got {self.first_batch_size}"
            )
        elif not 1 < self.batch_growth <= 10:
            raise ValueError(f"batch_growth must be more than 1 and at most 10, got {self.batch_growth}")

    @classmethod
    def variants(cls, options: Mapping[str, Any], half_precision: bool) -> list[dict[str, Any]]:
        jacobian = options.get("jacobian", "auto")
        if jacobian == "auto":  # central differences tolerate the rounding of half precision
            jacobian = "central" if half_precision else "forward"
        return [{**options, "jacobian": jacobian}]

    @classmethod
    def defaults(cls, numbers: int, dimensions: int, nfe: int, training_pairs: int) -> dict[str, Any]:
        chosen = sizes(numbers, dimensions, nfe)
        largest = min(chosen.largest_batch, training_pairs)
        if chosen.first_batch >= largest:
            return {"batch_size": largest}
        return {
            "batch_size": largest,
            "first_batch_size": chosen.first_batch,
            "batch_growth": chosen.batch_growth,
            "memory_pairs": chosen.memory_pairs,
            "patience": chosen.patience,
            **FOR_GROWING_BATCHES,
        }

    @property
    def validations_without_gain(self) -> int | None:
        return self.patience

    @property
    def needs_gradients(self) -> bool:
        return self.jacobian == "jvp"

    def memory(self, count: int) -> dict[str, Any]:
        return {"damping": self.damping, "jacobian": self.jacobian}

    def batch(self, iteration: int, pair_set: int = 0) -> list[int]:
        first = self.batch_size if self.first_batch_size is None else self.first_batch_size
        sizes = BatchSizes(first, self.batch_size, self.batch_growth)
        return batch_indices(self.training_pairs, sizes, self.seed_of(pair_set), iteration)

    def evaluations(self, state: DistillationState, nfe: int) -> tuple[int, int]:
        assert isinstance(state, LMState)
        return state.evaluations, 0

    def step(self, state: LMState, problem: Problem) -> Asking[tuple[LMState, float]]:
        """Request the batch's normal equations once, and take the first step that lowers its loss.

        The damping starts at the state's and rises. Numbers that are not finite never enter theta.
        """
        assert not problem.in_parameters, "the PSNR loss is a function of theta"
        parameters = torch.tensor(state.parameters, dtype=torch.float64)
        batches = [self.batch(state.iteration, pair_set) for pair_set in range(problem.sets)]
        sums, before, spent = yield from _equations(problem, parameters, batches, state.jacobian)
        state = replace(state, iteration=state.iteration + 1, evaluations=state.evaluations + spent)
        if not (math.isfinite(before) and sums.is_finite()):
            return self.without_step(state, "not finite"), before
        if state.earlier is not None:
            sums = sums.with_earlier(Sums.of(state.earlier), self._share(len(batches[0])))
        model = sums.mean()
        state = replace(state, earlier=self._remembered(sums))
        damping = state.damping
        for _ in range(1 + self.retries):
            candidate = damped_step(parameters, model, damping, self.ridge_floor, problem.project)
            # A step that is not finite or changes nothing is rejected without evaluating its loss.
            if bool(torch.isfinite(candidate).all()) and not torch.equal(candidate, parameters):
                after, spent = yield from _loss(problem, candidate, batches)
                state = replace(state, evaluations=state.evaluations + spent)
                change = after - before
                if change < 0:
                    share = change / model.change(candidate - parameters)
                    damping *= self.damping_factor if share > GOOD else RAISE if share < POOR else 1.0
                    damping = min(max(damping, self.damping_min), self.damping_max)
                    earlier = self._remembered(sums.moved(candidate - parameters))
                    taken = replace(state, parameters=candidate.tolist(), damping=damping, failures=0, earlier=earlier)
                    return taken, before
            if damping >= self.damping_max:
                return self.without_step(replace(state, damping=damping), "no descent"), before
            damping = min(damping * RAISE, self.damping_max)
        return replace(state, damping=damping, failures=0), before

    def _share(self, pairs: int) -> float:
        """The share of earlier equations beside a batch of so many pairs."""
        return self.memory_share * (1.0 if self.memory_pairs is None else max(0.0, 1 - pairs / self.memory_pairs))

    def _remembered(self, sums: Sums) -> dict[str, Any] | None:
        """What a state keeps of the equations."""
        return sums.as_lists() if self.memory_share else None

    def without_step(self, state: LMState, cause: Literal["not finite", "no descent"]) -> LMState:
        """The state after an iteration without a step: a failure, a switch to central differences, or a stall."""
        if state.failures + 1 < PATIENCE:
            return replace(state, failures=state.failures + 1)
        if cause == "no descent" and state.jacobian == "forward":
            return replace(state, jacobian="central", damping=self.damping, failures=0)
        reason = {
            "not finite": "the loss or its derivatives are not finite; check that the model's velocity is finite near "
            "the states of the start, or choose another start",
            "no descent": f"no step lowers the loss, up to damping {self.damping_max:g}: theta is as good as "
            f"the precision of the model's velocity allows, or is held by the bounds of its times",
        }[cause]
        return replace(
            state, status="stalled", reason=f"{PATIENCE} iterations in a row up to {state.iteration}: {reason}"
        )


def _equations(
    problem: Problem, parameters: Tensor, batches: Sequence[list[int]], jacobian: Jacobian
) -> Asking[tuple[Sums, float, int]]:
    """The normal equations at ``parameters``, the mean loss, and the evaluations spent on them.

    Args:
        problem: What the run minimises.
        parameters: (p,), float64.
        batches: Indices of training pairs, for each training set.
        jacobian: The derivatives to use.
    """
    solvers, chains = _linearised(problem, parameters)
    free = [(chain != 0).any(dim=1) for chain in chains]
    queries = [
        NormalQuery(solver, indices, jacobian, mask, pair_set)
        for pair_set, (solver, indices, mask) in enumerate(zip(solvers, batches, free, strict=True))
    ]
    parts: list[NormalEquations] = yield from ask_all(queries)
    # The sums over training sets are added in their order.
    h = torch.stack([chain.T @ part.h @ chain for chain, part in zip(chains, parts, strict=True)]).sum(dim=0)
    g = torch.stack([chain.T @ part.g for chain, part in zip(chains, parts, strict=True)]).sum(dim=0)
    count = sum(part.count for part in parts)
    spent = [evaluations_per_pair(q.solver.nfe, jacobian, q.free) * len(q.indices) for q in queries]
    return Sums(h, g, count), sum(part.loss for part in parts) / count, sum(spent)


def _linearised(problem: Problem, parameters: Tensor) -> tuple[list[NSSolver], list[Tensor]]:
    """The solver of each training set at ``parameters``, and M = d flat / d parameters, (P, p), of each."""
    leaf = parameters.clone().requires_grad_()
    solvers, chains = problem.solvers(leaf), []
    for solver in solvers:
        rows = [
            torch.autograd.grad(entry, leaf, retain_graph=True, allow_unused=True)[0] if entry.requires_grad else None
            for entry in solver.flat()
        ]
        chains.append(torch.stack([torch.zeros_like(parameters) if row is None else row for row in rows]))
    return [solver.detach() for solver in solvers], chains


def _loss(problem: Problem, parameters: Tensor, batches: Sequence[list[int]]) -> Asking[tuple[float, int]]:
    """The mean loss over one batch of each training set, +inf if theta or the loss is not finite, and the evaluations.

    The batches have one size, so the mean over pairs is that over batches.
    """
    solvers = [solver.detach() for solver in problem.solvers(parameters)]
    spent = sum(solver.nfe * len(indices) for solver, indices in zip(solvers, batches, strict=True))
    if not all(bool(torch.isfinite(solver.flat()).all()) for solver in solvers):
        return math.inf, spent
    queries = [LossQuery(*asked, pair_set) for pair_set, asked in enumerate(zip(solvers, batches, strict=True))]
    losses: list[float] = yield from ask_all(queries)
    loss = sum(losses) / len(losses)
    return loss if math.isfinite(loss) else math.inf, spent


class Quadratic(NamedTuple):
    """The local model of the mean loss, g^T delta + delta^T H delta / 2.

    Attributes:
        h: (p, p), float64, symmetric and positive semidefinite up to rounding; singular if parameters are redundant.
        g: (p,), float64.
    """

    h: Tensor
    g: Tensor

    def change(self, delta: Tensor) -> float:
        """The predicted change of the loss after the step ``delta``, shape (p,)."""
        return float(self.g @ delta + delta @ self.h @ delta / 2)


class Sums(NamedTuple):
    """Normal equations summed over pairs, in the parameters of the family.

    Attributes:
        h, g: As for :class:`Quadratic`, but sums.
        pairs: Number of pairs; earlier ones count by their weight.
    """

    h: Tensor
    g: Tensor
    pairs: float

    @classmethod
    def of(cls, lists: Mapping[str, Any]) -> Sums:
        """The inverse of :meth:`as_lists`."""
        g = torch.tensor(lists["g"], dtype=torch.float64)
        h = torch.zeros(len(g), len(g), dtype=torch.float64)
        rows, columns = torch.triu_indices(len(g), len(g))
        h[rows, columns] = h[columns, rows] = torch.tensor(lists["h"], dtype=torch.float64)
        return cls(h, g, lists["pairs"])

    def as_lists(self) -> dict[str, Any]:
        """The sums as lists and numbers, with one triangle of ``h``."""
        rows, columns = torch.triu_indices(len(self.g), len(self.g))
        return {"h": self.h[rows, columns].tolist(), "g": self.g.tolist(), "pairs": self.pairs}

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.h).all() and torch.isfinite(self.g).all())

    def with_earlier(self, earlier: Sums, share: float) -> Sums:
        """These sums, and ``share`` of earlier ones."""
        h, g = self.h + share * earlier.h, self.g + share * earlier.g
        return Sums(h, g, self.pairs + share * earlier.pairs)

    def moved(self, delta: Tensor) -> Sums:
        """The sums after a step, as far as the quadratic model says."""
        return self._replace(g=self.g + self.h @ delta)

    def mean(self) -> Quadratic:
        return Quadratic(self.h / self.pairs, self.g / self.pairs)


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
