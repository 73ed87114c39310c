"""Converts linear solvers to non-stationary solvers (Theorem 3.2 of the BNS paper), by running them on coefficients.

A solver whose updates are linear in past states and velocities is run on vectors over the basis
(x0, u_0, ..., u_{n-1}) instead of on samples. The start is e_{x0}; the k-th velocity query records its time and state
and returns e_{u_k}. The recorded times and states and the final state *are* (T, a, b). The result is differentiable in
everything that the solver's grid or coefficients depend on.

A solver that is not linear would silently be traced to a wrong theta. Therefore the coefficient vectors reject every
operation that is not linear, with an error that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers.field import VelocityField
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler, as_time


class LinearSolver(Protocol):
    """A solver with a known number of evaluations whose updates are linear in x0 and past velocities."""

    @property
    def nfe(self) -> int: ...

    def sample(self, velocity: VelocityField, x0: Tensor) -> Tensor: ...


# ---- operations allowed on a state ------------------------------------------------------------------------------


class LinearTensor(Tensor):
    """A coefficient vector that allows only operations that are linear in it; differentiable like any tensor."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        check = _CHECKS.get(func)
        if check is None:
            raise _not_linear(func)
        check(func, args)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if isinstance(result, Tensor) else result


def _not_linear(func: Callable[..., Any], detail: str = "") -> ValueError:
    name = getattr(func, "__name__", str(func)).strip("_")
    if name == "get":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return ValueError(
        f"the solver is not linear in its states: it applies {name!r}{detail} to one, and so has no non-stationary "
        f"form; leave thresholding, clipping and all other operations that are not linear in states and velocities out "
        f"of it"
    )


def _is_number(value: Any) -> bool:
    """A scalar that does not depend on the state."""
    if isinstance(value, Tensor):
        return not isinstance(value, LinearTensor) and value.numel() == 1
    return isinstance(value, int | float)


def _anything(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Accept operations that are linear for all arguments: signs, copies, dtypes, and stacking states."""


def _states_alone(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for value in args[:2]:
        # Python's sum() starts with 0 + x.
        if not (isinstance(value, LinearTensor) or (isinstance(value, int | float) and value == 0)):
            raise _not_linear(func, " with something that is not a state")


def _one_state(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    numbers = [value for value in args[:2] if not isinstance(value, LinearTensor)]
    if len(numbers) != 1 or not _is_number(numbers[0]):
        raise _not_linear(func, " of two states" if not numbers else " with something that is not a single number")


def _divided_state(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if not isinstance(args[0], LinearTensor) or not _is_number(args[1]):
        raise _not_linear(func, " by something that is not a single number")


def _combination(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if sum(isinstance(value, LinearTensor) for value in args) != 1:
        raise _not_linear(func, " of two states")


def _interpolation(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _states_alone(func, args)
    if not _is_number(args[2]):
        raise _not_linear(func, " with something that is not a single number")


_Check = Callable[[Callable[..., Any], tuple[Any, ...]], None]


def _operations(check: _Check, *names: str) -> dict[Any, _Check]:
    """Torch functions and tensor methods of these names, including in-place and swapped-operand variants."""
    spellings = (
        spelling for name in names for spelling in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")
    )
    return {
        getattr(owner, spelling): check
        for spelling in spellings
        for owner in (torch, Tensor)
        if hasattr(owner, spelling)
    }


_PROPERTIES = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "grad_fn", "is_leaf")

_CHECKS: dict[Any, _Check] = {
    **{getattr(Tensor, name).__get__: _anything for name in _PROPERTIES},
    **_operations(_anything, "size", "dim", "numel", "is_floating_point", "element_size", "data_ptr", "is_contiguous"),
    **_operations(_anything, "neg", "negative", "positive", "pos", "clone", "detach", "contiguous", "to", "type_as"),
    **_operations(_anything, "float", "double", "stack", "zeros_like"),
    **_operations(_states_alone, "add", "sub", "subtract"),
    **_operations(_one_state, "mul", "multiply"),
    **_operations(_divided_state, "div", "divide", "truediv"),
    **_operations(_combination, "tensordot"),
    **_operations(_interpolation, "lerp"),
}
# float(x) is not a conversion of dtype: it extracts a Python number, whose further use cannot be checked.
for _name in ("__float__", "__rtruediv__", "__rdiv__"):
    _CHECKS.pop(getattr(Tensor, _name), None)


# ---- tracing ----------------------------------------------------------------------------------------------------


class _Recorder:
    """A velocity field over coefficient vectors that records every query."""

    def __init__(self, scheduler: Scheduler, nfe: int, vector: type[Tensor]):
        self.scheduler = scheduler
        self.vector = vector
        self.basis = torch.eye(nfe + 1, dtype=torch.float64)
        self.times: list[Tensor] = []
        self.states: list[Tensor] = []

    def basis_vector(self, index: int) -> Tensor:
        """e_{x0} for 0, e_{u_k} for k + 1. A copy, since a solver may modify it in place."""
        return self.basis[index].clone().as_subclass(self.vector)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.scheduler.check_velocity_time(t)
        self.times.append(as_time(t))
        self.states.append(x.as_subclass(Tensor).clone())
        if len(self.times) >= self.basis.shape[0]:
            raise ValueError(
                f"the solver declares {self.basis.shape[0] - 1} evaluations but makes more; correct its nfe"
            )
        return self.basis_vector(len(self.times))


_known_linear: set[Hashable] = set()
"""Structures of the solvers that passed a guarded trace. Distillation traces the same solver thousands of times, with
different numbers."""

MAX_KNOWN = 10_000
"""Limit on the number of remembered structures; when it is reached, all are dropped."""


def to_ns(solver: LinearSolver, scheduler: Scheduler) -> NSSolver:
    """The non-stationary form of ``solver`` on fields of ``scheduler``.

    The first trace of a solver is guarded: an operation that is not linear in states and velocities is rejected. Later
    traces of a solver that differs only in the values of tensors (a learned solver at its next iterate) skip the guard,
    which costs a tenth to a half of a trace. Solvers that are not dataclasses are guarded every time.

    Args:
        solver: Any object with ``nfe`` and ``sample``.
        scheduler: The scheduler of the velocity that theta will act on.

    Returns:
        theta with ``to_ns(solver, s).sample(u, x0) == solver.sample(u, x0)`` up to rounding, for every field u of s.

    Raises:
        ValueError: The solver is not linear (thresholding, clipping), makes more or fewer evaluations than it declares,
            queries a time outside the domain, or yields numbers that are not finite.
    """
    structure = _structure((solver, scheduler))
    known = structure is not None and structure in _known_linear
    recorder = _Recorder(scheduler, solver.nfe, Tensor if known else LinearTensor)
    final = solver.sample(recorder, recorder.basis_vector(0)).as_subclass(Tensor)
    if len(recorder.times) != solver.nfe:
        raise ValueError(f"the solver declares {solver.nfe} evaluations but made {len(recorder.times)}")
    rows = torch.stack([*recorder.states, final])
    times = torch.stack(recorder.times)
    if not bool(torch.isfinite(rows).all() and torch.isfinite(times).all()):
        raise ValueError(f"the solver has no finite non-stationary form on the {scheduler.name} scheduler")
    if structure is not None and not known:
        if len(_known_linear) >= MAX_KNOWN:
            _known_linear.clear()
        _known_linear.add(structure)
    return NSSolver(times=times, a=rows[:, 0], b=rows[:, 1:])


def _structure(value: Any) -> Hashable | None:
    """A hashable description of ``value`` without the numbers in its tensors; None if it cannot be determined."""
    parts: list[Any]
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, str | int | float | bool | type(None)):
        return (type(value), value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Only the dataclass fields, so that no property is computed.
        parts = [getattr(value, f.name) for f in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, tuple | list):
        if len(value) > 64 and all(type(item) is float for item in value):
            return (type(value), tuple(value))
        parts = list(value)
    else:
        return None
    structures = [_structure(part) for part in parts]
    return None if any(part is None for part in structures) else (type(value), *structures)
