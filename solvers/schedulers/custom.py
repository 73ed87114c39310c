"""Gaussian paths defined by user functions alpha(t) and sigma(t)."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from solvers.schedulers._monotone import invert_increasing
from solvers.schedulers.base import PathPoint, Scheduler, as_time

CHECKED_TIMES = 257
"""Number of times at which a new path is checked: evenly spaced over [0, 1], including the ends."""

PathFunction = Callable[[Tensor], Tensor]


def linear(t: Tensor) -> Tensor:
    """t; together with :func:`falling_parabola` the default path."""
    return t


def falling_parabola(t: Tensor) -> Tensor:
    """1 - t^2: a noise level that falls slowly at first."""
    return 1 - t**2


@dataclass(frozen=True, kw_only=True)
class Custom(Scheduler):
    """A path from user functions alpha(t) and sigma(t), with t=0 noise and t=1 data.

    Derivatives are computed by autograd, and the inverse by Newton's method inside a bisection bracket on the angle.
    Both functions may be evaluated anywhere in [0, 1], regardless of the domain. Derivatives may be infinite at 1, as
    for sqrt(1 - t^2); solvers are then not allowed to evaluate the velocity there.

    Attributes:
        alpha_function: An elementwise function, made of torch operations, from a float64 tensor of times to one of the
            same shape; or its import path ``"package.module:function"``. Default: ``t``.
        sigma_function: The noise level, in the same form. Default: ``1 - t^2``.

    Raises:
        ValueError: A function cannot be imported, returns anything other than a finite, non-negative float64 tensor
            with the shape of the times, or the signal-to-noise ratio does not rise strictly.
    """

    alpha_function: PathFunction | str = "solvers.schedulers.custom:linear"
    sigma_function: PathFunction | str = "solvers.schedulers.custom:falling_parabola"

    def __post_init__(self) -> None:
        super().__post_init__()
        times = torch.linspace(0, 1, CHECKED_TIMES, dtype=torch.float64)
        alpha, sigma = (_checked(function, name, times) for name, function in self._functions.items())
        if float(alpha[-1]) == float(sigma[-1]) == 0 or float(alpha[0]) == float(sigma[0]) == 0:
            raise ValueError("alpha and sigma of a path cannot both be 0 at the same end; one of them must be positive")
        angle = torch.atan2(alpha, sigma)
        not_rising = (angle.diff() <= 0).nonzero()
        if len(not_rising):
            k = int(not_rising[0])
            raise ValueError(
                f"the signal-to-noise ratio alpha/sigma of a path must rise strictly with t, but goes from "
                f"{float(alpha[k] / sigma[k]):.6g} at t={float(times[k]):.6g} to "
                f"{float(alpha[k + 1] / sigma[k + 1]):.6g} at t={float(times[k + 1]):.6g}; t=0 is noise and t=1 is "
                f"data, so reverse functions of the other direction: t -> 1 - t"
            )

    @property
    def functions(self) -> tuple[PathFunction, ...]:
        return tuple(self._functions.values())

    @property
    def name(self) -> str:
        return "custom"

    @cached_property
    def velocity_is_singular_at_end(self) -> bool:  # type: ignore[override]
        point = self(1.0)
        return not bool(torch.isfinite(point.d_alpha) and torch.isfinite(point.d_sigma))

    def path(self, t: Tensor) -> PathPoint:
        alpha, d_alpha = _with_derivative(self._functions["alpha_function"], t)
        sigma, d_sigma = _with_derivative(self._functions["sigma_function"], t)
        return PathPoint(alpha=alpha, sigma=sigma, d_alpha=d_alpha, d_sigma=d_sigma)

    def time_at_angle(self, angle: Tensor) -> Tensor:
        """The time in [0, 1] with snr(t) = tan(angle); the nearer end for an angle outside the path's range."""
        return invert_increasing(self._angle_and_slope, as_time(angle), 0.0, 1.0)

    def _angle_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, d_alpha, d_sigma = self.path(t)
        return torch.atan2(alpha, sigma), (sigma * d_alpha - alpha * d_sigma) / (alpha**2 + sigma**2)

    def __getstate__(self) -> dict[str, Any]:
        # Functions given by import path are imported again where they are used: the module may lie in a folder that
        # the receiving process has yet to make importable.
        return {name: value for name, value in vars(self).items() if name != "_functions"}

    @cached_property
    def _functions(self) -> dict[str, PathFunction]:
        return {name: _function(getattr(self, name), name) for name in ("alpha_function", "sigma_function")}


def _function(given: PathFunction | str, option: str) -> PathFunction:
    if not isinstance(given, str):
        if not callable(given):
            raise ValueError(f"{option} must be a function or 'module:function', got {given!r}")
        return given
    module, separator, name = given.partition(":")
    if not (module and separator and name):
        raise ValueError(f"{option}={given!r} does not name a function; write it as 'package.module:function'")
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{option}={given!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise ValueError(f"{option}={given!r}: the module {module!r} has no {name!r}") from error
    if not callable(function):
        raise ValueError(f"{option}={given!r} is not a function (its type is {type(function).__name__})")
    return function


def _with_derivative(function: PathFunction, t: Tensor) -> tuple[Tensor, Tensor]:
    """(f(t), f'(t)), both differentiable once more in ``t`` if ``t`` requires gradients."""
    create_graph = torch.is_grad_enabled() and t.requires_grad
    with contextlib.ExitStack() as contexts:
        if torch.is_inference_mode_enabled():
            # Inference mode does not record derivatives, and its tensors cannot take part in a recorded computation.
            contexts.enter_context(torch.inference_mode(False))
            t = t.clone()
        value = function(t)
        contexts.enter_context(torch.enable_grad())
        # Copy t instead of detaching it: t.detach() would drop the tangents of an enclosing forward-mode derivative.
        leaf = t if t.requires_grad else t.clone().requires_grad_()
        traced = function(leaf)
        if not traced.requires_grad:
            # Autograd has no derivative for a constant, so return 0.
            return value, torch.zeros_like(value)
        (derivative,) = torch.autograd.grad(traced, leaf, torch.ones_like(traced), create_graph=create_graph)
    return value, derivative


def _checked(function: PathFunction, option: str, times: Tensor) -> Tensor:
    values = function(times)
    if not isinstance(values, Tensor) or values.shape != times.shape or values.dtype != times.dtype:
        got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{option} must map a float64 tensor of times to a float64 tensor of the same shape {tuple(times.shape)}, "
            f"got {got}; for a constant, write torch.ones_like(t)"
        )
    values = values.detach()
    bad = (~(values.isfinite() & (values >= 0))).nonzero()
    if len(bad):
        k = int(bad[0])
        raise ValueError(
            f"{option} must be finite and not negative on [0, 1], got {float(values[k]):.6g} at t={float(times[k]):.6g}"
        )
    return values


SCHEDULER = Custom
