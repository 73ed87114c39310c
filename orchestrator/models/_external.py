"""Base class of adapters for third-party networks: lazy loading, labels, and checks of the network's output."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.content import digest
from orchestrator.errors import RAISED, CodeError, ConfigError, UserError, describe, may_pass
from orchestrator.models._outputs import remedy, shown
from orchestrator.models.base import ModelAdapter, expand_time, is_differentiated
from orchestrator.pairs import Condition, Conditions
from solvers.prediction import PredictionField


class ExternalModel(ModelAdapter):
    """A third-party network. It is loaded on first use, so that options can be checked without it.

    Attributes:
        differentiable: Whether torch can differentiate the network with respect to its input. If not, differentiation
            raises an error, because it would otherwise give wrong derivatives silently.
        classes: Number of labels; None for a network without conditioning.
        null_label: Label that means "dropped", for guidance; None if there is none.
    """

    differentiable: ClassVar[bool] = True
    classes: int | None
    null_label: int | None

    @classmethod
    def plugin(cls) -> str:
        """Name of this adapter in configurations."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        plugins.build("models", cls.plugin(), options).inspect()

    @abstractmethod
    def inspect(self) -> None:
        """Check that the network can be loaded, reading only file headers and source code.

        Raises:
            ConfigError: It cannot be loaded; the message names the option, its value and the remedy.
        """

    @abstractmethod
    def load(self) -> Any:
        """Load the network and freeze it."""

    @abstractmethod
    def identity(self) -> Iterable[Any]:
        """Everything that samples, decoded or not, depend on, as parts of :func:`orchestrator.content.digest`.

        They are the same before and after the network is loaded.
        """

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """Convert native time, float64 of any shape, to the network's time argument."""

    def time_argument(self, time: Tensor, x: Tensor) -> Tensor:
        """The network's time, 0-d or one per sample, as :meth:`evaluate` takes it: (B,), like ``x`` (B, ...)."""
        return expand_time(time, x)

    @abstractmethod
    def evaluate(self, x: Tensor, time: Tensor, condition: Any) -> Any:
        """The network's output for x (B, ...) in :attr:`network_dtype`, a :meth:`time_argument` and conditions."""

    @cached_property
    def net(self) -> Any:
        """The frozen network, loaded on first access."""
        return self.load()

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        """sha256 of :meth:`identity`. It does not depend on the location of files."""
        return digest(*self.identity())

    @cached_property
    def parameters(self) -> int:  # type: ignore[override]
        return sum(parameter.numel() for parameter in self.net.parameters())

    @cached_property
    def network_dtype(self) -> torch.dtype:  # type: ignore[override]
        held = itertools.chain(self.net.parameters(), self.net.buffers())
        return next((tensor.dtype for tensor in held if tensor.is_floating_point()), torch.float32)

    def to(self, device: str) -> ExternalModel:
        self.net.to(device)
        return self

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if not self.differentiable and (is_differentiated(x) or is_differentiated(t)):
            raise self.refused(
                f"{self.name} is a black box without derivatives; distil with 'method: levenberg_marquardt' and "
                f"jacobian 'forward' or 'central', which need only its output, or load the network with the adapter "
                f"'torch_module'"
            )
        inner = x.to(self.network_dtype)
        # Half precision cannot distinguish timestep 999 from 1000.
        wide = inner.to(torch.promote_types(self.network_dtype, torch.float32))
        time = self.time_argument(self.network_time(t), wide)
        try:
            output = self.evaluate(inner, time, condition)
        except RAISED as error:
            # Errors of differentiation are explained where it starts, and torch's own stop a recomputation.
            derived = is_differentiated(x) or is_differentiated(t) or type(error).__module__.startswith("torch.utils")
            if derived or may_pass(error) or isinstance(error, UserError):
                raise
            named = condition.tensors if isinstance(condition, Conditions) else {"label": condition}
            called = ", ".join(_described(*item) for item in {"x": inner, "time": time, **named}.items())
            raise CodeError(
                f"network {self.name} failed: {describe(error, called=True)}; it was called with {called}"
            ) from error
        if not isinstance(output, Tensor) or output.shape != x.shape:
            raise self.refused(
                f"{self.name} must return one tensor of shape {tuple(x.shape)}, the shape of x, got {shown(output)}; "
                f"{remedy(output, x.shape)}"
            )
        return output.to(x.dtype)

    def field(self, condition: Condition, guidance_scale: float) -> PredictionField:
        self.check_scale(guidance_scale)
        return super().field(condition, guidance_scale)

    @property
    def can_drop(self) -> bool:
        """Whether conditions can be dropped, as guidance does."""
        return self.null_label is not None

    def check_scale(self, guidance_scale: float) -> None:
        """Refuse guidance without a condition that means "dropped"."""
        if guidance_scale != 1 and not self.can_drop:
            raise self.refused(
                f"guidance scale {guidance_scale:g} needs a label for the dropped condition, but {self.name} has none; "
                f"set guidance_scale to 1, or set null_label if the network was trained with dropped labels"
            )

    def null_condition(self, condition: Any) -> Any:
        # Without a null label this is only called at guidance scale 1, where the result is not used.
        return condition if self.null_label is None else torch.full_like(condition, self.null_label)

    def check_condition(self, condition: Any) -> None:
        if self.classes is None or condition is None:
            return
        unknown = condition[(condition < 0) | (condition >= self.classes)]
        if len(unknown):
            raise ConfigError(
                f"label {int(unknown[0])} is not one of {self.name}'s {self.classes} classes; set "
                f"conditioning.options.classes to {self.classes}"
            )

    def refused(self, problem: str) -> ConfigError:
        """Build the error for an option or a network that cannot be used."""
        return ConfigError(f"model adapter {self.plugin()!r}: {problem}")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Turn a ValueError about an option or a file into :meth:`refused`."""
        try:
            yield
        except ValueError as error:
            raise self.refused(str(error)) from error

    def existing_file(self, option: str, given: str, suffixes: tuple[str, ...]) -> Path:
        """The absolute path of the file named by an option; absolute because hosts run in other working directories.

        Raises:
            ConfigError: The file does not exist, or has another suffix.
        """
        path = Path(given).expanduser().absolute()
        if path.suffix not in suffixes:
            raise self.refused(f"{option} must be a file that ends in {' or '.join(suffixes)}, got {given!r}")
        if not path.is_file():
            raise self.refused(f"{option}: there is no file {path}; every machine that runs a host needs it there")
        return path


def _described(name: str, value: Tensor) -> str:
    return f"{name} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
