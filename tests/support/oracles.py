"""Reference values for the solver tests: exact velocities, a fine integrator, and lists of every plugin."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import solvers.families
import solvers.schedulers
from solvers.families.base import Family, LearnableFamily
from solvers.field import FunctionField, VelocityField
from solvers.schedulers.base import PathPoint, Scheduler, as_time

#: Options to test for families that take options, by module name; every other family is tested with its defaults.
FAMILY_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "adams_bashforth": [{"steps_back": 2}, {"steps_back": 3}, {"steps_back": 4}],
    "dpmpp_2m": [{}, {"lower_order_final": "always"}],
    "dpmpp_3m": [{}, {"lower_order_final": "always"}],
    "deis": [{"degree": 1}, {"degree": 2}, {"degree": 3}],
    # steps_back=1 and order=1 are left out: both are DDIM, and no two families under test may have equal coefficients.
    "exponential_multistep": [
        {"steps_back": count, "prediction": prediction} for count in (2, 3) for prediction in ("epsilon", "sample")
    ],
    "exponential_rk": [
        {"order": order, "prediction": prediction} for order in (2, 3) for prediction in ("epsilon", "sample")
    ],
    "linear_multistep": [
        {},
        {"b": [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12]]},
        {"a": [[1], [0.5, 0.5]], "b": [[1], [1.75, -0.25]]},
    ],
    "scale_time": [
        {},
        {"inner": "adams_bashforth", "inner_options": {"steps_back": 2}, "scheduler": "custom"},
        {"inner": "rk4", "scheduler": "custom", "sigma0": 3.0, "grid_on": "source"},
    ],
    "shifted_euler": [{"shift": 3.0}, {"shift": 0.5}, {"shift": 1.5, "pipeline": "sd3"}],
    "unipc": [{"steps_back": 1}, {"steps_back": 2}, {"steps_back": 3}],
    "bespoke_rk1": [{"learn": "both"}, {"learn": "time"}, {"learn": "scale"}],
    "bespoke_rk2": [{"learn": "both"}, {"learn": "time"}, {"learn": "scale"}],
}


def _plugins(package: Any, attribute: str) -> Iterator[tuple[str, Any]]:
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        if hasattr(loaded, attribute):
            yield module.name, getattr(loaded, attribute)


def fixed_families() -> list[Family]:
    """Every family that is not learned, once per set of options to test."""
    return [
        plugin(**options)
        for name, plugin in _plugins(solvers.families, "FAMILY")
        if not plugin.learnable
        for options in FAMILY_OPTIONS.get(name, [{}])
    ]


def learnable_families() -> list[LearnableFamily]:
    """Every family that is learned, once per set of options to test."""
    return [
        plugin(**options)
        for name, plugin in _plugins(solvers.families, "FAMILY")
        if plugin.learnable
        for options in FAMILY_OPTIONS.get(name, [{}])
    ]


def learnable_starts(*, allowed: bool) -> list[tuple[LearnableFamily, Family]]:
    """Every (learnable, fixed) pair in which the learnable family accepts the fixed one as its start, or rejects it."""
    pairs = itertools.product(learnable_families(), fixed_families())
    return [(learnable, family) for learnable, family in pairs if learnable.starts_from(family) == allowed]


def all_schedulers() -> list[Scheduler]:
    """Every scheduler with its default settings."""
    return [plugin() for _, plugin in _plugins(solvers.schedulers, "SCHEDULER")]


def affordable_nfe(family: Family, at_least: int) -> int:
    """The smallest NFE from ``at_least`` on that the family accepts."""
    for nfe in range(at_least, at_least + 16):
        try:
            family.steps(nfe)
        except ValueError:
            continue
        return nfe
    raise AssertionError(f"{family.label} accepts no NFE from {at_least} to {at_least + 15}")


def inside(scheduler: Scheduler, count: int = 9) -> Tensor:
    """Evenly spaced times in the open domain, 2 % away from its ends."""
    margin = 0.02 * (scheduler.t_max - scheduler.t_min)
    return torch.linspace(scheduler.t_min + margin, scheduler.t_max - margin, count, dtype=torch.float64)


def nonlinear_field(scheduler: Scheduler) -> FunctionField:
    """A smooth generic field: nonlinear in x, time-dependent, with coupled coordinates."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.dtype)
        return torch.sin(2 * x + 3 * t) + 0.5 * torch.cos(x.roll(1, dims=-1) - t) - 0.3 * t * x

    return FunctionField(velocity, scheduler)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class GaussianMixture:
    """Mixture data with closed-form posterior means, hence an exact velocity under any scheduler.

    Attributes:
        weights: Shape (K,), summing to 1.
        means: Shape (K, d).
        stds: Standard deviation of each isotropic component, shape (K,).
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def endpoints(self, x: Tensor, point: PathPoint) -> tuple[Tensor, Tensor]:
        """(E[x1 | x_t], E[eps | x_t]) for x of shape (B, d), computed without dividing by alpha or sigma."""
        variance = point.alpha**2 * self.stds**2 + point.sigma**2
        offset = x[:, None, :] - point.alpha * self.means
        logits = self.weights.log() - 0.5 * x.shape[-1] * variance.log() - offset.square().sum(-1) / (2 * variance)
        responsibility = logits.softmax(dim=1)[..., None]
        data = (responsibility * (self.means + (point.alpha * self.stds**2 / variance)[:, None] * offset)).sum(1)
        eps = (responsibility * (point.sigma / variance)[:, None] * offset).sum(1)
        return data, eps

    def velocity(self, x: Tensor, point: PathPoint) -> Tensor:
        """alpha' E[x1 | x_t] + sigma' E[eps | x_t], the marginal velocity of the path (BNS eq. 5)."""
        data, eps = self.endpoints(x, point)
        return point.d_alpha * data + point.d_sigma * eps

    def field(self, scheduler: Scheduler) -> FunctionField:
        return FunctionField(lambda x, t: self.velocity(x, scheduler(t)), scheduler)

    def network(self, prediction: str, scheduler: Scheduler) -> Callable[[Tensor, Tensor], Tensor]:
        """A perfectly trained network for the given prediction type."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            point = scheduler(t)
            data, eps = self.endpoints(x, point)
            return {
                "epsilon": lambda: eps,
                "sample": lambda: data,
                "v_prediction": lambda: point.alpha * eps - point.sigma * data,
                "velocity": lambda: point.d_alpha * data + point.d_sigma * eps,
                "score": lambda: -eps / point.sigma,
                "noise_minus_data": lambda: eps - data,
            }[prediction]()

        return predict


def mixture() -> GaussianMixture:
    """A mixture of three components in two dimensions."""
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means=torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.2]], dtype=torch.float64),
        stds=torch.tensor([0.3, 0.5, 0.4], dtype=torch.float64),
    )


def gaussian(mean: tuple[float, ...] = (0.7, -0.4), std: float = 0.5) -> GaussianMixture:
    """A single Gaussian, whose flow is x1 = mean + std * x0 under every path that starts at snr = 0."""
    return GaussianMixture(
        weights=torch.ones(1, dtype=torch.float64),
        means=torch.tensor([mean], dtype=torch.float64),
        stds=torch.tensor([std], dtype=torch.float64),
    )


def fine_rk4(field: VelocityField, x: Tensor, first: float, last: float, steps: int) -> Tensor:
    """Integrate dx/dt = u_t(x) from ``first`` to ``last`` with plain RK4, which shares no code with the families."""
    times = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    for t, t_next in itertools.pairwise(times):
        h = t_next - t
        k1 = field(x, t)
        k2 = field(x + h / 2 * k1, t + h / 2)
        k3 = field(x + h / 2 * k2, t + h / 2)
        k4 = field(x + h * k3, t_next)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def central_difference(function: Callable[[Tensor], Tensor], at: float, h: float = 1e-5) -> Tensor:
    """Derivative of a function of a scalar, accurate to about 1e-10 for functions of unit size."""
    return (function(as_time(at + h)) - function(as_time(at - h))) / (2 * h)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest expected magnitude (or to 1 if that is larger)."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1.0))
