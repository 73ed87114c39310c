"""Interface of model adapters: a frozen network, and its velocity field for a batch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from orchestrator.errors import ConfigError
from orchestrator.models.kinds import Kind, guess_kind
from solvers.field import GuidedPrediction, VelocityField, check_time_shape
from solvers.network_schedule import NetworkSchedule, network_schedule
from solvers.prediction import Prediction, PredictionField
from solvers.scale_time import SchedulerChange
from solvers.schedulers.base import Scheduler
from solvers.schedulers.cond_ot import CondOT

Precision = Literal["float32", "bfloat16", "float16"]
"""Precision of the network during distillation; float32 stands for the dtype it was loaded in."""

AUTOCAST: dict[Precision, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Autocast dtype for each precision; None disables autocast."""

A = TypeVar("A", bound="ModelAdapter")


class ModelAdapter(ABC):
    """A frozen pretrained model, adapted to the project's convention: t=0 noise, t=1 data, x0 ~ N(0, I).

    Attributes:
        name: Name for tables.
        shape: Shape of one sample.
        prediction: Quantity the network predicts.
        native: Scheduler the network was trained with.
        data_range: Largest minus smallest value of the data, for PSNR: 2 for [-1, 1].
        digest: sha256 of weights and architecture.
        parameters: Number of weights of the network.
        rate: Sample rate of decoded sound in Hz; None for models that make none.
        code: Folders of the user's code that are searched for modules.
        kind: Declared kind of samples, which decides how they are shown; None: guessed (:attr:`shown_kind`).
        data_min, data_max: Declared smallest and largest value of the data; None: :attr:`shown_range` applies.
        scales_start: Whether the programs that sample with this model can start from a_0 x0 with any a_0; False for
            pipelines whose network gets the unscaled noise.
    """

    name: str
    shape: tuple[int, ...]
    prediction: Prediction
    native: Scheduler
    data_range: float
    digest: str
    parameters: int
    rate: int | None = None
    code: tuple[str, ...] = ()
    kind: Kind | None = None
    data_min: float | None = None
    data_max: float | None = None
    scales_start: bool = True

    @classmethod  # noqa: B027 (optional: most adapters have nothing to check)
    def check(cls, options: dict[str, Any]) -> None:
        """Refuse invalid options without loading anything large; called before any actor starts.

        Raises:
            ConfigError: An option is invalid; the message names the option, its value and the remedy.
        """

    @classmethod
    def without_network(cls, options: dict[str, Any]) -> ModelAdapter | None:
        """The model before its network is loaded, for checks of its samples; None if only the network has their shape.

        Args:
            options: Options that :meth:`check` has accepted.
        """
        return None

    @classmethod  # noqa: B027 (optional: most models accept any conditioning with their labels)
    def check_conditioning(cls, options: dict[str, Any], dataset: Any) -> None:
        """Refuse a dataset whose kind of conditioning the model does not take; called before any actor starts.

        Args:
            options: Options that :meth:`check` has accepted.
            dataset: The source of conditioning.

        Raises:
            ConfigError: The dataset does not fit; the message names it and a dataset that does.
        """

    @classmethod  # noqa: B027 (optional: most models know how to drop a condition)
    def check_guidance(cls, options: dict[str, Any], scale: float) -> None:
        """Refuse a guidance scale that the model cannot be sampled with; called before any actor starts.

        Args:
            options: Options that :meth:`check` has accepted.
            scale: The guidance scale.

        Raises:
            ConfigError: The model cannot drop its condition; the message names the remedy.
        """

    @classmethod
    def default_conditioning(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Name and options of the dataset that conditions the model if none is named.

        Args:
            options: Options that :meth:`check` has accepted.

        Raises:
            ConfigError: Only the user knows it, as of texts; the message names the remedy.
        """
        return {"name": "labels", "options": {"classes": 1}}

    @abstractmethod
    def to(self, device: str) -> ModelAdapter:
        """Move the network, in place."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The network's output in the dtype of ``x``; a sample's output does not depend on the rest of the batch.

        Args:
            x: Shape (B, \\*shape).
            t: Native time, float64: 0-d, or one time per sample, (B,), if several solvers share the batch.
            condition: A tensor of shape (B, ...), or :class:`~orchestrator.pairs.Conditions` of B samples.
        """

    @abstractmethod
    def null_condition(self, condition: Any) -> Any:
        """The conditioning that stands for a dropped condition, of the same kind and shape; used for guidance."""

    def encode_conditions(self, condition: Tensor, dataset: Any) -> Any:
        """What the network is conditioned on, for conditions drawn from a dataset: labels, unless it is overridden.

        Pairs store the result. Of a dataset of named arrays they store the row numbers, and this is called again
        whenever they are loaded.

        Args:
            condition: Conditions drawn by the dataset, shape (B, ...), int64.
            dataset: The dataset, which maps condition numbers to labels, texts, recordings or named arrays.
        """
        return torch.from_numpy(dataset.labels_of(condition.numpy())) if dataset.named else condition

    def decode(self, samples: Tensor) -> Tensor:
        """Decode samples (B, ...) to images or sound; without a decoder they are returned unchanged."""
        return samples

    @property
    def decodes(self) -> bool:
        """Whether :meth:`decode` turns samples into something else."""
        return type(self).decode is not ModelAdapter.decode

    @property
    def shown_kind(self) -> Kind:
        """Kind of what is shown of samples: declared, or guessed from their shape."""
        return self.kind or guess_kind(self.shape, self.rate, decoded=self.decodes)

    @property
    def shown_range(self) -> tuple[float, float]:
        """Smallest and largest value of decoded samples: -1 and 1 of decoders, else declared, else ±data_range / 2."""
        if self.decodes:
            return -1.0, 1.0
        if self.data_min is not None and self.data_max is not None:
            return float(self.data_min), float(self.data_max)
        return -self.data_range / 2, self.data_range / 2

    def sound(self, samples: Tensor) -> Tensor:
        """Convert samples (B, ...) to waves (B, N) at :attr:`rate`, channels averaged; for audio models only."""
        waves = self.decode(samples).float()
        return waves.mean(dim=1) if waves.ndim == 3 else waves

    def check_condition(self, condition: Any) -> None:  # noqa: B027 (optional)
        """Refuse conditioning that the model does not support.

        Raises:
            ConfigError: A value is not supported; the message names it and the remedy.
        """

    @property
    def network_dtype(self) -> torch.dtype:
        """Floating dtype of the network's weights; float32 for an adapter without a torch network ``net``."""
        net = getattr(self, "net", None)
        weights = net.parameters() if isinstance(net, torch.nn.Module) else ()
        return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)

    def network_time(self, t: Tensor) -> Tensor:
        """Convert native time, float64 of any shape, to the network's time argument."""
        return t

    def whole_times(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """For a network of whole timesteps that is interpolated: its times below and above, and the share above."""
        return None

    def schedule(self, times: Tensor) -> NetworkSchedule:
        """What the network is evaluated at, for a solver that queries the velocity at ``times`` (n,), float64."""
        return network_schedule(times, self.native, self.scheduler, self.network_time, self.whole_times)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the velocity field that solvers integrate and theta refers to.

        This is the native scheduler, unless its velocity is infinite at the data end. In that case it is CondOT, under
        which the same trajectories have a finite velocity everywhere.
        """
        return self.field_scheduler(self.native)

    @staticmethod
    def field_scheduler(native: Scheduler) -> Scheduler:
        """The scheduler for a network of this native scheduler, over the noise levels of its domain."""
        return SchedulerChange(native, CondOT()).target if native.velocity_is_singular_at_end else native

    def forwards_per_evaluation(self, guidance_scale: float) -> int:
        """Number of network forward passes per velocity evaluation."""
        return 1 if guidance_scale == 1 else 2

    def field(self, condition: Any, guidance_scale: float) -> PredictionField:
        """The velocity field of a batch with the given conditioning (see :meth:`predict`)."""
        predict = GuidedPrediction(self.predict, condition, self.null_condition(condition), guidance_scale)
        return PredictionField(predict, self.prediction, self.native, self.scheduler)

    def compiled(self: A) -> A:
        """Return a copy of this model whose whole network is compiled by ``torch.compile``; weights are shared.

        This works for adapters that keep the network in ``net``; others override it.

        Raises:
            ConfigError: The adapter has no ``net``. Code that does not compile raises a ConfigError on the first call.
        """
        net = getattr(self, "net", None)
        if not isinstance(net, torch.nn.Module):
            raise ConfigError(
                f"resources.compile is true, but {type(self).__name__} has no network 'net' to compile; set it to false"
            )
        twin = copy.copy(self)
        vars(twin)["net"] = CompiledNetwork(net, self.name)
        return twin


class CompiledNetwork(torch.nn.Module):
    """A network compiled by ``torch.compile`` as one graph; code that does not compile raises an error.

    Args:
        net: The network.
        name: Name of the model, for error messages.
    """

    def __init__(self, net: torch.nn.Module, name: str):
        super().__init__()
        self.name = name
        self.run = torch.compile(net, fullgraph=True)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The network's output.

        Raises:
            ConfigError: Compilation failed; the message quotes the first line of the compiler's.
        """
        from torch._dynamo.exc import TorchDynamoException  # importing it takes seconds, and only this method needs it

        try:
            return self.run(*inputs, **named)
        except TorchDynamoException as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(
                f"the network of {self.name} cannot be compiled ({type(error).__name__}: {reason}); set "
                f"resources.compile to false"
            ) from error


class AutocastField:
    """A velocity field whose network runs under torch's autocast.

    States and velocities keep their dtype; only matrix products and convolutions inside the network use less precision.

    Args:
        field: The field; its weights are in float32.
        dtype: bfloat16 or float16. Values beyond 65504 overflow in float16.
    """

    def __init__(self, field: VelocityField, dtype: torch.dtype):
        self.field = field
        self.scheduler = field.scheduler
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """u_t(x), in the shape and dtype of ``x``."""
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.field(x, t).to(x.dtype)


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """A time, 0-d or one per sample, as the (B,) vector that networks take, in the dtype and device of ``x``.

    The B numbers do not share memory, so a network may scale them in place.

    Raises:
        ValueError: The number of times differs from the number of samples.
    """
    check_time_shape(t, x)
    return t.to(device=x.device, dtype=x.dtype).expand(x.shape[0]).contiguous()


def is_differentiated(value: Tensor) -> bool:
    """Whether a result of ``value`` has to be differentiable in it, backward or forward."""
    return (torch.is_grad_enabled() and value.requires_grad) or forward_ad.unpack_dual(value).tangent is not None
