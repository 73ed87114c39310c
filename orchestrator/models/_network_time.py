"""The time argument of a network: which quantity it counts, an affine map of it, and its shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from orchestrator.models.base import expand_time, is_differentiated
from orchestrator.plugins import did_you_mean
from solvers.field import per_sample
from solvers.schedulers.base import Scheduler
from solvers.schedulers.discrete_vp import DiscreteVP

Counted = Literal["t", "1-t", "timestep", "sigma"]
Shape = Literal["batch", "column", "scalar"]
Whole = Literal["interpolate"]

Network = Callable[[Tensor, Tensor, Any], Any]
"""``network(x, time, condition)`` with x (B, ...), the time in the network's shape, and one condition per sample."""


@dataclass(frozen=True)
class NetworkTime:
    """The network's time: ``scale * kind + offset``, as one value per sample or for the batch.

    Attributes:
        kind: 't' (0 noise, 1 data), '1-t', 'timestep' (0 to N - 1 of discrete_vp) or 'sigma' (the noise level).
        scale: Factor on it; negative for a time that runs the other way.
        offset: Added after scaling.
        shape: 'batch' for (B,), 'column' for (B, 1), 'scalar' for 0-d: samples with different times are then
            evaluated by one call per time.
        integer: 'interpolate' for a network of whole timesteps, such as a look-up table: its outputs at the two
            neighbouring timesteps are interpolated linearly, which takes two forwards per evaluation. None for a
            network of any timestep. Rounding to the nearest timestep is not offered: a field that jumps stops adaptive
            ground truth, and its learned times have no derivative.

    Raises:
        ValueError: A value is invalid.
    """

    kind: Counted = "t"
    scale: float = 1.0
    offset: float = 0.0
    shape: Shape = "batch"
    integer: Whole | None = None

    def __post_init__(self) -> None:
        for option, allowed in (("kind", get_args(Counted)), ("shape", get_args(Shape)), ("integer", get_args(Whole))):
            value = getattr(self, option)
            if value not in allowed and (option, value) != ("integer", None):
                name = "time" if option == "kind" else f"time.{option}"
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        for option in ("scale", "offset"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"time.{option} must be a finite number, got {value!r}")
        if self.scale == 0:
            raise ValueError("time.scale is 0, so the network would not know the time; set it to another number")
        if self.integer is not None and self.kind != "timestep":
            raise ValueError(
                f"time.integer is for networks of whole timesteps, but the kind of time is {self.kind!r}; set it to "
                f"'timestep', or leave integer out"
            )

    @classmethod
    def parse(cls, time: Any, time_scale: float) -> NetworkTime:
        """The options ``time`` (a kind, or a mapping of the attributes) and ``time_scale``, a shorter form of scale.

        Raises:
            ValueError: An option is unknown, invalid, or given twice.
        """
        if isinstance(time_scale, bool) or not isinstance(time_scale, int | float) or not 0 < time_scale < math.inf:
            raise ValueError(f"time_scale must be a positive number, got {time_scale!r}")
        if not isinstance(time, Mapping):
            return cls(time, time_scale)
        known = [field.name for field in fields(cls)]
        for option in time:
            if option not in known:
                hint = did_you_mean(str(option), known)
                raise ValueError(f"time has no option {option!r}{hint}; its options are: {', '.join(known)}")
        if time_scale != 1 and "scale" in time:
            raise ValueError(f"time.scale and time_scale={time_scale:g} are two factors for one time; leave one out")
        return cls(**{"scale": time_scale} | dict(time))

    def check(self, native: Scheduler) -> None:
        """Refuse timesteps on a scheduler that has none.

        Raises:
            ValueError: The scheduler is not discrete.
        """
        if self.kind == "timestep" and not isinstance(native, DiscreteVP):
            raise ValueError(
                f"time 'timestep' counts the training timesteps of 'discrete_vp', but the scheduler is "
                f"{native.name!r}, which has none; choose 't', '1-t' (with a scale) or 'sigma'"
            )

    def options(self, time: Any, time_scale: float) -> tuple[Any, float]:
        """The options ``time`` and ``time_scale`` in their shortest form, which enters digests.

        A mapping that says no more than a kind and a positive factor becomes these two.
        """
        if not isinstance(time, Mapping):
            return time, time_scale
        extras = {name: getattr(self, name) for name in ("offset", "shape", "integer")}
        changed = {name: value for name, value in extras.items() if value != getattr(NetworkTime, name)}
        if not changed and self.scale > 0:
            return self.kind, self.scale
        return {"kind": self.kind, "scale": self.scale, **changed}, 1.0

    def middle(self, native: Scheduler) -> float:
        """The network's time of the middle one of all timesteps."""
        assert isinstance(native, DiscreteVP)
        return self.offset + self.scale * ((native.timesteps - 1) // 2)

    @property
    def forwards(self) -> int:
        """Forwards of the network per prediction."""
        return 1 if self.integer is None else 2

    def __call__(self, t: Tensor, native: Scheduler) -> Tensor:
        """The network's time at native time ``t``, float64 of any shape."""
        match self.kind:
            case "t":
                time = t
            case "1-t":
                time = 1 - t
            case "timestep":
                assert isinstance(native, DiscreteVP)
                time = native.timestep(t)
            case "sigma":
                time = native.sigma(t)
        return time * self.scale + self.offset

    def argument(self, time: Tensor, x: Tensor) -> Tensor:
        """The network's time, 0-d or one per sample, in the dtype and on the device of ``x`` (B, ...).

        It has shape (B,); 0-d for a network that takes a scalar, if all samples have the same time.
        """
        if self.shape == "scalar" and time.ndim == 0:
            return time.to(device=x.device, dtype=x.dtype)
        return expand_time(time, x)

    def evaluate(self, network: Network, native: Scheduler, x: Tensor, time: Tensor, condition: Any) -> Any:
        """The network's output for x (B, ...), a time from :meth:`argument`, and one condition per sample.

        An output that is not a tensor with the shape of its input is returned as it is.
        """
        neighbours = self.whole_times(time, native)
        if neighbours is None:
            return self._in_shape(network, x, time, condition)
        *whole, share = neighbours
        first, second = (self._in_shape(network, x.clone(), one, condition) for one in whole)
        for output in (first, second):
            if not fits(output, x):
                return output
        return first + per_sample(share, x) * (second - first)

    def whole_times(self, time: Tensor, native: Scheduler) -> tuple[Tensor, Tensor, Tensor] | None:
        """The network's times at the timesteps below and above, and the share of the one above; None for any timestep.

        Args:
            time: The network's time, of any shape; the share is differentiable in it.
            native: The network's scheduler.
        """
        if self.integer is None:
            return None
        assert isinstance(native, DiscreteVP)
        step = (time - self.offset) / self.scale
        below = step.detach().floor().clamp(0, native.timesteps - 2)
        return self._at_whole(below), self._at_whole(below + 1), step - below

    def _at_whole(self, timestep: Tensor) -> Tensor:
        """The network's time at whole timesteps: int64 if they are whole numbers there too."""
        time = self.scale * timestep + self.offset
        return time.round().long() if float(self.scale).is_integer() and float(self.offset).is_integer() else time

    def _in_shape(self, network: Network, x: Tensor, time: Tensor, condition: Any) -> Any:
        """The output of the network for a time (B,) or, if it takes a scalar, 0-d."""
        if self.shape == "batch" or time.ndim == 0:
            return network(x, time, condition)
        if self.shape == "column":
            return network(x, time[:, None], condition)
        # Derivatives in the time are those of each sample's own.
        groups = torch.arange(len(x)) if is_differentiated(time) else time.unique(return_inverse=True)[1].cpu()
        rows = [(groups == group).nonzero().flatten() for group in range(int(groups.max()) + 1)]
        outputs = []
        for chosen in rows:
            on_device = chosen.to(x.device)
            output = network(x[on_device], time[on_device[0]], condition[on_device])
            if not fits(output, x[on_device]):
                return output
            outputs.append(output)
        return torch.cat(outputs)[torch.cat(rows).argsort().to(x.device)]


def fits(output: Any, x: Tensor) -> bool:
    """Whether an output is a tensor with the shape of the input."""
    return isinstance(output, Tensor) and output.shape == x.shape


def whole_steps_problem(network: Callable[[Tensor], Any], middle: float, step: float) -> str | None:
    """What shows that a network takes whole timesteps only; None if it takes fractions.

    Args:
        network: ``network(time)``, the output for a few samples at one network time, a 0-d tensor.
        middle: The network's time at a whole timestep in the middle.
        step: From there to the next timestep.
    """
    whole = torch.tensor(middle)
    with torch.no_grad():
        try:
            between = network(whole + step / 2)
        except Exception as error:  # whatever the user's code raises
            try:
                network(whole.round().long())
            except Exception:
                return None  # it fails for another reason, which the evaluation itself will report
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return f"it fails for {middle + step / 2:g} ({reason}), and not for {middle:g} as a whole number"
        if not isinstance(between, Tensor):
            return None
        below, above = network(whole), network(whole + step)
    if torch.equal(below, above) or not (torch.equal(between, below) or torch.equal(between, above)):
        return None
    return f"its output at time {middle + step / 2:g} is that of a timestep beside it, so it drops the fraction"
