"""What the tests of the solvers measure against: exact velocities, a fine integrator, and every plugin there is."""

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

#: Options to try of families that have some, by module name; every other family is tried as it comes.
FAMILY_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "adams_bashforth": [{"steps_back": 2}, {"steps_back": 3}, {"steps_back": 4}],
    "deis": [{"degree": 1}, {"degree": 2}, {"degree": 3}],
    # One stage and one prediction are DDIM; two families with the same numbers would be one row of a table.
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
    "shifted_euler": [{"shift": 3.0}, {"shift": 0.5}],
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
    """Every family that is not learned, once for each of its options."""
    return [
        plugin(**options)
        for name, plugin in _plugins(solvers.families, "FAMILY")
        if not plugin.learnable
        for options in FAMILY_OPTIONS.get(name, [{}])
    ]


def learnable_families() -> list[LearnableFamily]:
    """Every family that is learned, once for each of its options."""
    return [
        plugin(**options)
        for name, plugin in _plugins(solvers.families, "FAMILY")
        if plugin.learnable
        for options in FAMILY_OPTIONS.get(name, [{}])
    ]


def learnable_starts(*, allowed: bool) -> list[tuple[LearnableFamily, Family]]:
    """Every learnable family with each fixed one that it can start from, or with each that it refuses."""
    pairs = itertools.product(learnable_families(), fixed_families())
    return [(learnable, family) for learnable, family in pairs if learnable.starts_from(family) == allowed]


def schedulers_found() -> list[Scheduler]:
    """Every scheduler, with its default settings."""
    return [plugin() for _, plugin in _plugins(solvers.schedulers, "SCHEDULER")]


def affordable_nfe(family: Family, at_least: int) -> int:
    """The first number of evaluations from ``at_least`` on that the family can spend."""
    for nfe in range(at_least, at_least + 16):
        try:
            family.steps(nfe)
        except ValueError:
            continue
        return nfe
    raise AssertionError(f"{family.label} accepts no NFE from {at_least} to {at_least + 15}")


def inside(scheduler: Scheduler, count: int = 9) -> Tensor:
    """Times spread over the open domain, 2 % away from its ends."""
    margin = 0.02 * (scheduler.t_max - scheduler.t_min)
    return torch.linspace(scheduler.t_min + margin, scheduler.t_max - margin, count, dtype=torch.float64)


def nonlinear_field(scheduler: Scheduler) -> FunctionField:
    """A smooth field with nothing special about it: nonlinear in x, time-dependent, coupling the coordinates."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.dtype)
        return torch.sin(2 * x + 3 * t) + 0.5 * torch.cos(x.roll(1, dims=-1) - t) - 0.3 * t * x

    return FunctionField(velocity, scheduler)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class GaussianMixture:
    """Data whose posterior means, and so whose velocity under any scheduler, are known in closed form.

    Attributes:
        weights: Shape (K,), summing to 1.
        means: Shape (K, d).
        stds: Standard deviation of each isotropic component, shape (K,).
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def endpoints(self, x: Tensor, point: PathPoint) -> tuple[Tensor, Tensor]:
        """(E[x1 | x_t], E[eps | x_t]) for x of shape (B, d), without a division by alpha or sigma."""
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
        """A perfectly trained network of the given prediction."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            point = scheduler(t)
            data, eps = self.endpoints(x, point)
            return {
                "epsilon": lambda: eps,
                "sample": lambda: data,
                "v_prediction": lambda: point.alpha * eps - point.sigma * data,
                "velocity": lambda: point.d_alpha * data + point.d_sigma * eps,
            }[prediction]()

        return predict


def mixture() -> GaussianMixture:
    """Three components in two dimensions."""
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means=torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.2]], dtype=torch.float64),
        stds=torch.tensor([0.3, 0.5, 0.4], dtype=torch.float64),
    )


def gaussian(mean: tuple[float, ...] = (0.7, -0.4), std: float = 0.5) -> GaussianMixture:
    """One component: its flow is x1 = mean + std * x0 under every path that starts at snr = 0."""
    return GaussianMixture(
        weights=torch.ones(1, dtype=torch.float64),
        means=torch.tensor([mean], dtype=torch.float64),
        stds=torch.tensor([std], dtype=torch.float64),
    )


def fine_rk4(field: VelocityField, x: Tensor, first: float, last: float, steps: int) -> Tensor:
    """dx/dt = u_t(x) from ``first`` to ``last``: a plain integrator that shares no code with the families."""
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
    """Derivative of a scalar's function, to about 1e-10 for functions of unit size."""
    return (function(as_time(at + h)) - function(as_time(at - h))) / (2 * h)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation in units of the largest expected value (or of 1, where that is larger)."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))
