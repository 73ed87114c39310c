"""Bespoke scale-time (BST) solvers: a Runge-Kutta method on a learned scale-time transform of the trajectories.

A transform x-bar(r) = s_r x(t_r), r in [0, 1], turns u into u-bar_r(x) = (s'/s) x + t' s u_{t_r}(x / s) (BST eq. 16).
A method with S stages per step evaluates u-bar at the nodes r_k = k / m, k = 0..m-1, m = n S, and ends at r_m = 1. It
depends on the transform only through t and s at the nodes, and their derivatives at all nodes but the last. These
values are learned.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from solvers.families._learned import last_time, target_scheduler
from solvers.families.base import GridSolver, LearnableFamily, RungeKutta, as_dtype, stage_sum
from solvers.field import VelocityField
from solvers.ns import NSSolver
from solvers.scale_time import SchedulerChange, precondition
from solvers.schedulers.base import Scheduler
from solvers.to_ns import to_ns

Learn = Literal["both", "time", "scale"]

IDENTITY_TOLERANCE = 1e-9
"""Largest deviation from the identity of a half that is not learned; allows for rounding only."""


class ScaleTimeNodes(NamedTuple):
    """A scale-time transform at the nodes of a solver of m evaluations, float64.

    ``t`` and ``s`` have shape (m + 1,), for r = 0, 1/m, ..., 1; ``d_t`` (dt/dr) and ``d_log_s`` ((ds/dr)/s) have
    shape (m,), without r = 1, where the velocity is not evaluated.
    """

    t: Tensor
    s: Tensor
    d_t: Tensor
    d_log_s: Tensor

    def velocity(self, k: int, x: Tensor, field: VelocityField) -> Tensor:
        """u-bar(x) at node ``k`` (BST eq. 16); ``x`` lies on the transformed path."""
        scale = as_dtype(self.s[k], x)
        gain = as_dtype(self.d_t[k] * self.s[k], x)
        return as_dtype(self.d_log_s[k], x) * x + gain * field(x / scale, self.t[k])

    def lipschitz(self, lipschitz: float) -> Tensor:
        """Lipschitz constants of u-bar at the nodes, given that of u (BST lemma D.1), shape (m,)."""
        return self.d_log_s.abs() + self.d_t * lipschitz

    def after(self, change: SchedulerChange) -> ScaleTimeNodes:
        """Compose with ``change``: this transform of its target path, expressed as a transform of its source path."""
        inner = change(self.t[:-1])
        # The derivatives of a change may be infinite at the end, where they are not needed.
        last_time, last_scale = change.time_and_scale(self.t[-1:])
        return ScaleTimeNodes(
            t=torch.cat([inner.t, last_time]),
            s=self.s * torch.cat([inner.s, last_scale]),
            d_t=inner.d_t * self.d_t,
            d_log_s=self.d_log_s + inner.d_log_s * self.d_t,
        )


@dataclass(frozen=True)
class BespokeRungeKutta(LearnableFamily, ABC):
    """The method ``base`` with ``n`` steps on a learned scale-time transform; m = n S evaluations.

    The parameters are, in this order (BST eq. 73-75, corrected):

    - theta^t: increments of the time. t_k = t_min + (t_max - t_min) sum_{j<=k} |theta^t_j| / sum_j |theta^t_j| for
      k = 1..m, so times never decrease and end at t_max. A common factor has no effect, so the middle increment is
      fixed at 1 and is not a parameter, which leaves m - 1;
    - m of theta^t': dt/dr = (t_max - t_min) |theta^t'_k|, k = 0..m-1;
    - m of theta^s: s_k = exp(theta^s_k), k = 1..m, with s_0 = 1;
    - m of theta^s': ds/dr = theta^s'_k, k = 0..m-1.

    All 4m - 1 are free parameters of the transform, but several transforms give the same solver: its non-stationary
    form has 3n - 1 degrees of freedom for RK1, and 7n - 1 for RK2.

    With sigma0 the transform acts on the preconditioned path (BNS eq. 14), and the two are composed.

    Attributes:
        learn: 'both', or 'time' (s = 1) or 'scale' (t = r) alone, the ablations of BST appendix K.2. A half that is
            not learned stays at the identity and has no parameters.
    """

    learn: Learn = "both"

    #: The Runge-Kutta method; its stages must lie at c = 0, 1/S, ..., so that they fall on the nodes.
    base: ClassVar[RungeKutta]
    #: Short name without options.
    short: ClassVar[str]
    source = "Shaul et al. 2023 (BST), eq. 16-20 and 73-75 (corrected)"

    def __post_init__(self) -> None:
        if self.learn not in get_args(Learn):
            raise ValueError(f"{self.short} can learn {', '.join(get_args(Learn))}, got {self.learn!r}")

    @property
    def label(self) -> str:
        return self.short if self.learn == "both" else f"{self.short} {self.learn}-only"

    @property
    def stages(self) -> int:
        """S, the evaluations per step."""
        return self.base.evaluations_per_step

    def parameter_count(self, steps: int) -> int:
        """Length of the parameter vector for ``steps`` steps: 4m - 1, and 2m - 1 or 2m for time or scale alone."""
        nodes = steps * self.stages
        return {"both": 4 * nodes - 1, "time": 2 * nodes - 1, "scale": 2 * nodes}[self.learn]

    def freedom(self, nfe: int) -> int:
        steps = self.base.steps(nfe)
        return self.parameter_count(steps) - (steps if self.learn == "both" else 0)

    def steps(self, parameters: Tensor) -> int:
        """Number of steps n of a parameter vector.

        Raises:
            ValueError: The length does not match any n.
        """
        length = len(parameters)
        per_step = self.parameter_count(2) - self.parameter_count(1)
        n = max(1, (length + 1) // per_step)
        if parameters.ndim != 1 or self.parameter_count(n) != length:
            raise ValueError(
                f"{length} numbers are not a parameter vector of {self.label}: 1, 2, 3, ... steps have "
                f"{', '.join(str(self.parameter_count(k)) for k in (1, 2, 3))}, ... parameters"
            )
        return n

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        """The identity on the solver's grid: t interpolates the grid linearly in r, and s = 1.

        Raises:
            ValueError: ``solver`` is not of the method ``base``, or its grid is not uniform and the time is not
                learned.
        """
        if not self.starts_from(solver.family):
            raise ValueError(
                f"{self.label} can only equal {self.base.label}, not {solver.family.label}; start it from "
                f"{' or '.join(self.starts or ())}, or learn 'bns', which starts from any solver"
            )
        domain = target_scheduler(scheduler, solver.sigma0)
        grid = solver.grid.times(solver.family.steps(solver.nfe), domain)
        share = torch.arange(self.stages, dtype=torch.float64) / self.stages
        times = torch.cat([(grid[:-1, None] + grid.diff()[:, None] * share).reshape(-1), grid[-1:]])
        d_t = ((len(grid) - 1) * grid.diff()).repeat_interleave(self.stages)
        return self.parameters_of(times, torch.ones_like(times), d_t, torch.zeros_like(d_t), domain)

    def parameters_of(self, t: Tensor, s: Tensor, d_t: Tensor, d_s: Tensor, domain: Scheduler) -> Tensor:
        """The parameters of a transform given by its values at the nodes; the inverse of :meth:`transform`.

        Args:
            t, s: Time and scale at r = 0, 1/m, ..., 1, shape (m + 1,), float64; t rises from ``domain.t_min`` to
                ``domain.t_max``, s is positive and begins at 1.
            d_t, d_s: dt/dr >= 0 and ds/dr at r = 0, ..., (m-1)/m, shape (m,), float64.
            domain: The scheduler whose path is transformed: the preconditioned one if sigma0 is not 1.

        Raises:
            ValueError: The values are not such a transform, or a half that is not learned is not the identity.
        """
        m, span = len(d_t), domain.t_max - domain.t_min
        shapes = [tuple(values.shape) for values in (t, s, d_t, d_s)]
        if m < 1 or m % self.stages or shapes != [(m + 1,), (m + 1,), (m,), (m,)]:
            raise ValueError(
                f"a transform for {self.label} has t and s of shape (m + 1,) and derivatives of shape (m,), m a "
                f"positive multiple of {self.stages}; got {', '.join(map(str, shapes))}"
            )
        ends = torch.tensor([domain.t_min, domain.t_max], dtype=t.dtype)
        if not (
            torch.allclose(t[[0, -1]], ends, rtol=0, atol=IDENTITY_TOLERANCE)
            and bool((t.diff() > 0).all() and (d_t >= 0).all() and (s > 0).all())
            and abs(float(s[0]) - 1) <= IDENTITY_TOLERANCE
        ):
            raise ValueError(
                f"a scale-time transform on [{domain.t_min:.6g}, {domain.t_max:.6g}] has times that rise from its "
                f"first to its last, dt/dr >= 0, and scales that are positive and begin at 1"
            )
        increments = t.diff() / t.diff()[m // 2]
        time = [increments[: m // 2], increments[m // 2 + 1 :], d_t / span]
        scale = [s[1:].log(), d_s]
        uniform = torch.cat([torch.ones(m - 1, dtype=t.dtype), torch.ones_like(d_t)])
        if self.learn == "scale" and not _equal(torch.cat(time), uniform):
            raise ValueError(
                f"{self.label} keeps the time at t = r and cannot equal a solver on a non-uniform grid; start it from "
                f"the uniform grid, or learn 'both' or 'time'"
            )
        if self.learn == "time" and not _equal(torch.cat(scale), torch.zeros(2 * m, dtype=t.dtype)):
            raise ValueError(f"{self.label} keeps the scale at s = 1; learn 'both' or 'scale' for any other")
        learned = {"both": [*time, *scale], "time": time, "scale": scale}[self.learn]
        return torch.cat(learned)

    def transform(self, parameters: Tensor, scheduler: Scheduler, sigma0: float = 1.0) -> ScaleTimeNodes:
        """The transform at ``parameters``, of the original path of ``scheduler``; differentiable.

        With sigma0 it is composed with the preconditioning, so s begins near sigma0.
        """
        domain = target_scheduler(scheduler, sigma0)
        m = self.steps(parameters) * self.stages
        time = parameters.new_ones(2 * m - 1)
        scale = parameters.new_zeros(2 * m)
        match self.learn:
            case "both":
                time, scale = parameters.split([2 * m - 1, 2 * m])
            case "time":
                time = parameters
            case "scale":
                scale = parameters
        one, span = parameters.new_ones(1), domain.t_max - domain.t_min
        increments = torch.cat([time[: m // 2], one, time[m // 2 : m - 1]]).abs()
        shares = increments.cumsum(0)[:-1] / increments.sum()
        # The ends are exactly the domain's, which a sum of shares may overstep by rounding.
        times = (domain.t_min + span * shares).clamp(domain.t_min, domain.t_max)
        s = torch.cat([one, scale[:m].exp()])
        nodes = ScaleTimeNodes(
            t=torch.cat([domain.t_min * one, times, domain.t_max * one]),
            s=s,
            d_t=span * time[m - 1 :].abs(),
            d_log_s=scale[m:] / s[:-1],
        )
        return nodes if sigma0 == 1 else nodes.after(SchedulerChange(scheduler, precondition(scheduler, sigma0)))

    def step(self, nodes: ScaleTimeNodes, i: int, x: Tensor, velocity: VelocityField) -> Tensor:
        """step^theta_x: from ``x`` at t_i to t_{i+1} on the original path (BST eq. 17 and 19), i = 0..n-1."""
        first, last = (as_dtype(nodes.s[k * self.stages], x) for k in (i, i + 1))
        return self._transformed_step(nodes, i, first * x, velocity) / last

    def sample(self, parameters: Tensor, velocity: VelocityField, x0: Tensor, sigma0: float = 1.0) -> Tensor:
        """BST Algorithm 4: take all steps on the transformed path, then map back to the original one.

        Args:
            parameters: Shape (p,), float64.
            velocity: The field; sampling starts at its path's first time, from sigma(t_min) x0.
            x0: Noise ~ N(0, I), shape (B, ...), or a coefficient vector.
            sigma0: Preconditioning.

        Returns:
            The sample, with the shape and dtype of ``x0``.
        """
        nodes = self.transform(parameters, velocity.scheduler, sigma0)
        x = as_dtype(nodes.s[0] * velocity.scheduler.start(nodes.t[0]), x0) * x0
        for i in range(self.steps(parameters)):
            x = self._transformed_step(nodes, i, x, velocity)
        return x / as_dtype(nodes.s[-1], x0)

    def _transformed_step(self, nodes: ScaleTimeNodes, i: int, x: Tensor, velocity: VelocityField) -> Tensor:
        """One step of ``base`` with u-bar, on the transformed path (BST eq. 11)."""
        h = _step_length(nodes, self.stages)
        stages: list[Tensor] = []
        for j, row in enumerate(self.base.tableau.a):
            stages.append(nodes.velocity(i * self.stages + j, stage_sum(x, h, row, stages), velocity))
        return stage_sum(x, h, self.base.tableau.b, stages)

    def step_lipschitz(self, nodes: ScaleTimeNodes, lipschitz: float) -> Tensor:
        """Lipschitz constants L_i of the steps in x, given that of u (BST lemmas D.2 and D.3), shape (n,), float64."""
        h = _step_length(nodes, self.stages)
        tableau = self.base.tableau
        of_field = nodes.lipschitz(lipschitz).reshape(-1, self.stages)
        of_stages: list[Tensor] = []
        for j, row in enumerate(tableau.a):
            of_state = stage_sum(torch.ones_like(of_field[:, j]), h, tuple(map(abs, row)), of_stages)
            of_stages.append(of_field[:, j] * of_state)
        s = nodes.s[:: self.stages]
        return s[:-1] / s[1:] * stage_sum(torch.ones_like(s[1:]), h, tuple(map(abs, tableau.b)), of_stages)

    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        return to_ns(_AtParameters(self, parameters, sigma0), scheduler)

    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        """Keep the last query away from the end of the domain if the velocity is infinite there.

        The last increment is widened until it does. Times are ordered and inside the domain by construction.
        """
        domain = target_scheduler(scheduler, sigma0)
        m = self.steps(parameters) * self.stages
        room = (domain.t_max - last_time(domain)) / (domain.t_max - domain.t_min)
        projected = parameters.clone()
        if self.learn == "scale" or room <= 0 or m == 1:
            return projected
        increments = projected[: m - 1]
        if m == 2:  # the last increment is the middle one, which is fixed at 1, so the first is limited
            largest = (1 - room) / room
            increments.clamp_(-largest, largest)
        else:
            least = room / (1 - room) * (1 + increments[:-1].abs().sum())
            increments[-1] = torch.copysign(torch.maximum(increments[-1].abs(), least), increments[-1])
        return projected


@dataclass(frozen=True)
class _AtParameters:
    """The direct stepper as a solver, for :func:`solvers.to_ns.to_ns`."""

    family: BespokeRungeKutta
    parameters: Tensor
    sigma0: float

    @property
    def nfe(self) -> int:
        return self.family.steps(self.parameters) * self.family.stages

    def sample(self, velocity: VelocityField, x0: Tensor) -> Tensor:
        return self.family.sample(self.parameters, velocity, x0, self.sigma0)


def _step_length(nodes: ScaleTimeNodes, stages: int) -> Tensor:
    """h = 1/n, a 0-d float64 tensor."""
    return torch.tensor(stages / len(nodes.d_t), dtype=torch.float64)


def _equal(values: Tensor, expected: Tensor) -> bool:
    return torch.allclose(values, expected, rtol=0, atol=IDENTITY_TOLERANCE)
