"""Interface of solver families, and the solvers they form on a grid. A new family is a new file in this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from solvers.field import VelocityField
from solvers.grids import Grid
from solvers.ns import NSSolver
from solvers.scale_time import TransformedField, precondition
from solvers.schedulers.base import Scheduler
from solvers.to_ns import LinearSolver, to_ns


@dataclass(frozen=True)
class Family(ABC):
    """A method that steps along a time grid, linear in past states and velocities. Stateless.

    A subclass's fields are its options, which configurations set by name.
    """

    learnable: ClassVar[bool] = False
    #: Published source of the method.
    source: ClassVar[str]

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for tables and figures, options included."""

    @property
    @abstractmethod
    def order(self) -> int | None:
        """Order of convergence in the step size on smooth fields and grids; None if no order is claimed."""

    @property
    def evaluations_per_step(self) -> int:
        return 1

    def steps(self, nfe: int) -> int:
        """Number of grid steps that take ``nfe`` evaluations.

        Raises:
            ValueError: ``nfe`` is not a positive multiple of the evaluations per step.
        """
        per_step = self.evaluations_per_step
        if nfe < 1 or nfe % per_step:
            nearest = max(per_step, nfe - nfe % per_step)
            raise ValueError(
                f"{self.label} makes {per_step} evaluations per step, so its NFE must be a positive multiple of "
                f"{per_step}, got {nfe}; use {nearest} or {nearest + per_step}"
            )
        return nfe // per_step

    @abstractmethod
    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        """Integrate from ``x`` at ``times[0]`` to the state at ``times[-1]``.

        Args:
            velocity: The field; ``velocity.scheduler`` provides alpha and sigma.
            x: State, shape (B, ...), or a coefficient vector. Only linear operations on it are allowed.
            times: Shape (steps + 1,), float64.
        """


@dataclass(frozen=True)
class GridSolver:
    """A family on a time grid: a complete solver.

    Attributes:
        family: Method of stepping.
        nfe: Velocity evaluations per sample.
        grid: Time grid.
        sigma0: Preconditioning: the family steps along the path with its noise scaled by sigma0 (BNS eq. 14).
    """

    family: Family
    nfe: int
    grid: Grid
    sigma0: float = 1.0

    def __post_init__(self) -> None:
        self.family.steps(self.nfe)

    def sample(self, velocity: VelocityField, x0: Tensor) -> Tensor:
        """The sample that starts from noise ``x0`` ~ N(0, I), shape (B, ...)."""
        return sample_preconditioned(_Stepper(self.family, self.nfe, self.grid), velocity, x0, self.sigma0)

    def to_ns(self, scheduler: Scheduler) -> NSSolver:
        """The non-stationary form of the solver, for fields of ``scheduler``."""
        return to_ns(self, scheduler)


@dataclass(frozen=True)
class _Stepper:
    family: Family
    nfe: int
    grid: Grid

    def sample(self, velocity: VelocityField, x0: Tensor) -> Tensor:
        times = self.grid.times(self.family.steps(self.nfe), velocity.scheduler)
        start = velocity.scheduler.start(times[0]).to(x0.dtype) * x0
        return self.family.integrate(velocity, start, times)


def sample_preconditioned(solver: LinearSolver, velocity: VelocityField, x0: Tensor, sigma0: float) -> Tensor:
    """Run ``solver`` on the sigma0-preconditioned field and map its sample back to the original path."""
    if sigma0 == 1:
        return solver.sample(velocity, x0)
    transformed = TransformedField(velocity, precondition(velocity.scheduler, sigma0))
    return transformed.restore(solver.sample(transformed, x0))


@dataclass(frozen=True)
class LearnableFamily(ABC):
    """A differentiable map from a parameter vector to an NS solver, for distillation.

    Unlike a :class:`Family` it has no grid of its own: learning starts from a solver of another family.
    """

    learnable: ClassVar[bool] = True
    source: ClassVar[str]
    #: Module names of the fixed families it can equal, and so start from; None if it can equal every one.
    starts: ClassVar[tuple[str, ...] | None] = None

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for tables and figures."""

    def starts_from(self, family: Family) -> bool:
        """Whether this family can equal ``family``, at least on a uniform grid."""
        return self.starts is None or type(family).__module__.rpartition(".")[2] in self.starts

    def freedom(self, nfe: int) -> int | None:
        """How many numbers of a solver of ``nfe`` evaluations can be learned independently; None if not known.

        At most the number of parameters, some of which may be redundant. 0: nothing can be learned.
        """
        return None

    @property
    def start_format(self) -> int:
        """Raised when distillations begin elsewhere than in earlier releases; part of the keys of results."""
        return 1

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The range of guidance scales that one theta covers with a solver for each; None: it has one solver."""
        return None

    def at(self, guidance_scale: float) -> LearnableFamily:
        """The family whose solvers are used at ``guidance_scale``, of the same parameters.

        Most families have one solver for every scale, and return themselves.

        Raises:
            ValueError: The family has no solver for this scale.
        """
        return self

    @abstractmethod
    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        """Parameters, shape (p,), float64, at which the family equals ``solver`` on fields of ``scheduler``.

        Raises:
            ValueError: The family cannot equal ``solver``; always raised if :meth:`starts_from` is false.
        """

    @abstractmethod
    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        """The solver at ``parameters``, acting on the raw velocity; differentiable in ``parameters``."""

    @abstractmethod
    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        """Project onto parameters whose solver stays inside the time domain; applied after each optimiser step."""


def stage_sum(x: Tensor, step: Tensor, weights: tuple[float, ...], velocities: list[Tensor]) -> Tensor:
    """x + step * sum_j w_j u_j, skipping zero weights."""
    for weight, velocity in zip(weights, velocities, strict=True):
        if weight:
            x = x + (step * weight).to(x.dtype) * velocity
    return x


@dataclass(frozen=True)
class ButcherTableau:
    """Coefficients of an explicit Runge-Kutta method; the rows of ``a`` form the strictly lower triangle.

    Raises:
        ValueError: The lengths do not match, ``b`` does not sum to 1, or a row of ``a`` does not sum to its ``c``.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __post_init__(self) -> None:
        stages = len(self.b)
        if len(self.c) != stages or [len(row) for row in self.a] != list(range(stages)):
            raise ValueError("an explicit tableau of s stages has b and c of length s and rows of a of 0..s-1")
        if abs(sum(self.b) - 1) > 1e-12 or any(
            abs(sum(row) - c) > 1e-12 for row, c in zip(self.a, self.c, strict=True)
        ):
            raise ValueError("an inconsistent tableau: b must sum to 1 and each row of a to its c")


@dataclass(frozen=True)
class RungeKutta(Family):
    """Explicit Runge-Kutta on u_t (BNS eq. 54-55); a subclass defines the tableau."""

    tableau: ClassVar[ButcherTableau]

    @property
    def evaluations_per_step(self) -> int:
        return len(self.tableau.b)

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        tableau = self.tableau
        for t, t_next in pairwise(times):
            step = t_next - t
            stages: list[Tensor] = []
            for c, row in zip(tableau.c, tableau.a, strict=True):
                # At c = 1 use the next grid time itself, since t + (t_next - t) may overstep it by rounding.
                stage_time = t_next if c == 1 else t + c * step
                stages.append(velocity(stage_sum(x, step, row, stages), stage_time))
            x = stage_sum(x, step, tableau.b, stages)
        return x


def as_dtype(value: Tensor, x: Tensor) -> Tensor:
    """Convert a scalar coefficient to the dtype of the state it multiplies."""
    return value.to(x.dtype) if isinstance(value, torch.Tensor) else value
