"""Distillation runs on a mixture's exact velocity, without a host, and the third method of docs/extending.md."""

from __future__ import annotations

import functools
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch
from oracles import fine_rk4, mixture, noise
from torch import Tensor

from solvers.distil.drive import drive
from solvers.distil.methods.base import GradientQuery, LossAndGradient, LossQuery, Method, NormalQuery, Problem, Query
from solvers.distil.normal_equations import Jacobian, NormalEquations, normal_equations
from solvers.distil.pair_field import unconditional
from solvers.distil.state import DistillationState
from solvers.families.base import Family, GridSolver, LearnableFamily
from solvers.families.bns import BNS
from solvers.families.euler import Euler
from solvers.field import CountingField, VelocityField
from solvers.grids import UNIFORM
from solvers.losses import per_sample_mse, psnr_db, psnr_loss
from solvers.ns import NSSolver
from solvers.schedulers import CondOT, Scheduler

FIELD = mixture().field(CondOT())
NFE = 4
TRAINING_PAIRS = 64


@functools.cache
def pairs() -> tuple[Tensor, Tensor]:
    """(x0, x1) of the mixture's exact ODE: the training pairs first, then 128 validation pairs."""
    x0 = noise(TRAINING_PAIRS + 128, 2)
    return x0, fine_rk4(FIELD, x0, 0.0, 1.0, steps=100)


class Answers:
    """Answers the queries of a run on the training pairs.

    Attributes:
        evaluations: Velocity evaluations so far, times the pairs of each.
        queries: The queries so far.
        losses: The answers to queries for losses.
    """

    def __init__(self, field: VelocityField = FIELD, precision: torch.dtype | None = None):
        self.field = field
        self.precision = precision
        self.evaluations = 0
        self.queries: list[Query] = []
        self.losses: list[float] = []

    @property
    def jacobians(self) -> list[Jacobian]:
        """The derivatives that normal equations were asked for with."""
        return [query.jacobian for query in self.queries if isinstance(query, NormalQuery)]

    def __call__(self, query: Query) -> Any:
        self.queries.append(query)
        match query:
            case GradientQuery():
                return self.gradient(query)
            case NormalQuery():
                return self.normal(query)
            case LossQuery():
                self.losses.append(self.loss(query))
                return self.losses[-1]

    def gradient(self, query: GradientQuery) -> LossAndGradient:
        """BNS eq. 13 and its gradient in theta."""
        assert isinstance(query.at, NSSolver)
        theta = query.at.flat().requires_grad_()
        loss = self._losses(NSSolver.from_flat(theta), query.indices).mean()
        return LossAndGradient(float(loss.detach()), torch.autograd.grad(loss, theta)[0])

    @torch.no_grad()
    def loss(self, query: LossQuery) -> float:
        return float(self._losses(query.solver, query.indices).mean())

    def normal(self, query: NormalQuery) -> NormalEquations:
        field = _PairCounting(self)
        x0, x1 = (values[query.indices] for values in pairs())
        return normal_equations(
            query.solver,
            unconditional(field),
            x0,
            x1,
            memory_bytes=2**26,
            jacobian=query.jacobian,
            free=query.free,
            precision=self.precision,
        )

    def _losses(self, solver: NSSolver, indices: list[int]) -> Tensor:
        x0, x1 = (values[indices] for values in pairs())
        return psnr_loss(solver.sample(_PairCounting(self), x0), x1)


class _PairCounting(CountingField):
    """The field of the answers, counting evaluations per pair."""

    def __init__(self, answers: Answers):
        super().__init__(answers.field)
        self.answers = answers

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.answers.evaluations += len(x)
        return super().__call__(x, t)


def begin(
    method: Method,
    start: Family | None = None,
    *,
    nfe: int = NFE,
    sigma0: float = 1.0,
    family: LearnableFamily | None = None,
    scheduler: Scheduler | None = None,
) -> Any:
    """The state that starts from ``start`` (default Euler) on the uniform grid."""
    solver = GridSolver(start or Euler(), nfe, UNIFORM, sigma0)
    return method.begin((family or BNS()).start(solver, scheduler or CondOT()))


def run(
    method: Method,
    state: DistillationState,
    steps: int,
    *,
    sigma0: float = 1.0,
    family: LearnableFamily | None = None,
    answers: Answers | None = None,
    scheduler: Scheduler | None = None,
) -> Any:
    """The state after ``steps`` more iterations."""
    problem = Problem(family or BNS(), scheduler or CondOT(), sigma0)
    return drive(method.iterate(state, steps, problem), answers or Answers())


def validation_psnr(state: DistillationState, sigma0: float = 1.0, family: LearnableFamily | None = None) -> float:
    """Mean PSNR on the validation pairs, dB."""
    x0, x1 = (values[TRAINING_PAIRS:] for values in pairs())
    theta = torch.tensor(state.parameters, dtype=torch.float64)
    with torch.no_grad():
        sample = (family or BNS()).to_ns(theta, CondOT(), sigma0).sample(FIELD, x0)
    return float(psnr_db(per_sample_mse(sample, x1), data_range=2.0).mean())


def third_method_source() -> str:
    """The distillation method that docs/extending.md shows, as a file."""
    page = (Path(__file__).parents[2] / "docs/extending.md").read_text(encoding="utf-8")
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "METHOD = " in block]
    return str(source)


def third_method() -> type[Method]:
    """The class of the distillation method that docs/extending.md shows."""
    module = types.ModuleType("gradient_descent")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(third_method_source(), "gradient_descent.py", "exec", dont_inherit=True), vars(module))
    method: type[Method] = module.METHOD
    return method
