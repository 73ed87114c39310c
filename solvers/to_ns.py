"""Any linear solver as a non-stationary solver (Theorem 3.2 of the BNS paper), by running it on coefficients.

A solver whose updates are linear in past states and velocities is run on vectors over the basis
(x0, u_0, ..., u_{n-1}) instead of on samples: the start is e_{x0}, the k-th velocity query records its time and state
and answers e_{u_k}. The recorded states and the final one *are* (T, a, b). All of it is differentiable in whatever
the solver's grid or coefficients depend on.

A solver that is not linear would be traced to a wrong theta without a sign, so the vectors handed out refuse every
operation that is not linear, by name.
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


# ---- what may be done to a state --------------------------------------------------------------------------------


class LinearTensor(Tensor):
    """A coefficient vector that lets only operations pass that are linear in it, differentiable as any tensor."""

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
        f"form; leave thresholding, clipping and whatever else is not linear in states and velocities out of it"
    )


def _is_number(value: Any) -> bool:
    """A scalar that does not depend on the state."""
    if isinstance(value, Tensor):
        return not isinstance(value, LinearTensor) and value.numel() == 1
    return isinstance(value, int | float)


def _anything(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Linear whatever the arguments: signs, copies, types, and collecting states in a list."""


def _states_alone(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for value in args[:2]:
        # 0 + x is how Python's sum() begins.
        if not (isinstance(value, LinearTensor) or (isinstance(value, int | float) and value == 0)):
            raise _not_linear(func, " with something that is no state")


def _one_state(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    numbers = [value for value in args[:2] if not isinstance(value, LinearTensor)]
    if len(numbers) != 1 or not _is_number(numbers[0]):
        raise _not_linear(func, " of two states" if not numbers else " with something that is no single number")


def _divided_state(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if not isinstance(args[0], LinearTensor) or not _is_number(args[1]):
        raise _not_linear(func, " by something that is no single number")


def _combination(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if sum(isinstance(value, LinearTensor) for value in args) != 1:
        raise _not_linear(func, " of two states")


def _interpolation(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _states_alone(func, args)
    if not _is_number(args[2]):
        raise _not_linear(func, " with something that is no single number")


_Check = Callable[[Callable[..., Any], tuple[Any, ...]], None]


def _operations(check: _Check, *names: str) -> dict[Any, _Check]:
    """Torch's functions and tensor methods of these names, in place and with the operands swapped too."""
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
# float(x) is no change of type: it takes the number out, and what is done to it is lost from sight.
for _name in ("__float__", "__rtruediv__", "__rdiv__"):
    _CHECKS.pop(getattr(Tensor, _name), None)


# ---- tracing ----------------------------------------------------------------------------------------------------


class _Recorder:
    """A velocity field over coefficient vectors that writes down every query."""

    def __init__(self, scheduler: Scheduler, nfe: int, vector: type[Tensor]):
        self.scheduler = scheduler
        self.vector = vector
        self.basis = torch.eye(nfe + 1, dtype=torch.float64)
        self.times: list[Tensor] = []
        self.states: list[Tensor] = []

    def basis_vector(self, index: int) -> Tensor:
        """e_{x0} for 0, e_{u_k} for k + 1: a copy, since a solver may work in place."""
        return self.basis[index].clone().as_subclass(self.vector)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.scheduler.check_velocity_time(t)
        self.times.append(as_time(t))
        self.states.append(x.as_subclass(Tensor).clone())
        if len(self.times) >= self.basis.shape[0]:
            raise ValueError(
                f"the solver declares {self.basis.shape[0] - 1} evaluations but asks for more; correct its nfe"
            )
        return self.basis_vector(len(self.times))


_known_linear: set[Hashable] = set()
"""Solvers that were traced under guard. Learning traces the same solver, with other numbers, thousands of times."""

MAX_KNOWN = 10_000


def to_ns(solver: LinearSolver, scheduler: Scheduler) -> NSSolver:
    """The non-stationary form of ``solver`` on fields of ``scheduler``.

    The first trace of a solver is guarded: an operation that is not linear in states and velocities is refused. Later
    traces of one that differs from it in nothing but the values of tensors (a learned solver at its next iterate) skip
    the guard, whose cost is a tenth to a half of a trace. Solvers that are no dataclasses are guarded every time.

    Args:
        solver: Anything with ``nfe`` and ``sample``.
        scheduler: The scheduler of the velocity that theta is to act on.

    Returns:
        theta with ``to_ns(solver, s).sample(u, x0) == solver.sample(u, x0)`` to rounding, for every field u of s.

    Raises:
        ValueError: The solver is not linear (thresholding, clipping), makes another number of evaluations than it
            declares, asks outside the domain, or yields numbers that are not finite.
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
    """Everything that ``value`` is but the numbers in its tensors; None where that cannot be known."""
    parts: list[Any]
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, str | int | float | bool | type(None)):
        return (type(value), value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # The instance's own dictionary: fields, and nothing that a property would have to compute.
        parts = [getattr(value, f.name) for f in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, tuple | list):
        if len(value) > 64 and all(type(item) is float for item in value):
            return (type(value), tuple(value))
        parts = list(value)
    else:
        return None
    found = [_structure(part) for part in parts]
    return None if any(part is None for part in found) else (type(value), *found)
