"""What a model adapter provides: a frozen network, and the velocity field it implies for a batch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from orchestrator.errors import ConfigError
from solvers.field import GuidedPrediction, VelocityField, check_time_shape
from solvers.prediction import Prediction, PredictionField
from solvers.schedulers.base import Scheduler
from solvers.schedulers.cond_ot import CondOT

Precision = Literal["float32", "bfloat16", "float16"]
"""What a network computes in while something is distilled; float32 stands for what it was loaded in."""

AUTOCAST: dict[Precision, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtype of torch's autocast for each; None: no autocast."""

A = TypeVar("A", bound="ModelAdapter")


class ModelAdapter(ABC):
    """A frozen pretrained model. Its convention is made ours here: t=0 noise, t=1 data, x0 ~ N(0, I).

    Attributes:
        name: Name for tables.
        shape: Shape of one sample.
        prediction: What the network predicts.
        native: Scheduler it was trained with.
        data_range: Largest minus smallest value of the data, for PSNR: 2 for [-1, 1].
        digest: sha256 of weights and architecture.
        parameters: Number of the network's weights.
        rate: Samples a second of the sound that samples stand for; None for a model of images.
    """

    name: str
    shape: tuple[int, ...]
    prediction: Prediction
    native: Scheduler
    data_range: float
    digest: str
    parameters: int
    rate: int | None = None

    @classmethod  # noqa: B027 (optional: most adapters have nothing to check)
    def check(cls, options: dict[str, Any]) -> None:
        """Refuse options that cannot work, without loading anything large: called before any actor starts.

        Raises:
            ConfigError: Naming the option, its value and the remedy.
        """

    @classmethod  # noqa: B027 (optional: most models take whatever conditioning has their labels)
    def check_conditioning(cls, options: dict[str, Any], dataset: Any) -> None:
        """Refuse a dataset whose conditioning is of another kind than the model's: called before any actor starts.

        Args:
            options: As :meth:`check` has accepted them.
            dataset: The source of conditioning.

        Raises:
            ConfigError: Naming the dataset and one that suits.
        """

    @abstractmethod
    def to(self, device: str) -> ModelAdapter:
        """Move the network, in place."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The network's output in the dtype of ``x``, each sample's as if it were alone.

        Args:
            x: Shape (B, \\*shape).
            t: Native time, float64: 0-d, or one a sample, (B,), where several solvers share the batch.
            condition: Shape (B, ...).
        """

    @abstractmethod
    def null_condition(self, condition: Tensor) -> Tensor:
        """The conditioning of a dropped condition, of the same shape; used with guidance."""

    def encode_conditions(self, condition: Tensor, dataset: Any) -> Tensor:
        """The conditioning that pairs store, from what a dataset draws: itself, unless the adapter encodes it (texts).

        Args:
            condition: Shape (B, ...), int64, as the dataset gives it.
            dataset: The dataset, which knows what its numbers stand for.
        """
        return condition

    def decode(self, samples: Tensor) -> Tensor:
        """What people look at or listen to, of samples (B, \*shape): themselves, unless they are latents."""
        return samples

    def sound(self, samples: Tensor) -> Tensor:
        """Waves (B, N) of samples (B, \*shape) at :attr:`rate`, channels averaged; for models of sound alone."""
        waves = self.decode(samples).float()
        return waves.mean(dim=1) if waves.ndim == 3 else waves

    def check_condition(self, condition: Tensor) -> None:  # noqa: B027 (optional)
        """Refuse conditioning that the model does not know.

        Raises:
            ConfigError: Naming the value and the remedy.
        """

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the velocity that solvers see and theta acts on.

        The native one, except where its velocity is infinite at the data end: such a model is presented under
        CondOT, where the same trajectories have a finite velocity everywhere.
        """
        return self.field_scheduler(self.native)

    @staticmethod
    def field_scheduler(native: Scheduler) -> Scheduler:
        if not native.velocity_is_singular_at_end:
            return native
        target = CondOT()
        return CondOT(t_min=float(target.time_at_angle(native.angle(native.t_min))))

    def forwards_per_evaluation(self, guidance_scale: float) -> int:
        """Network forwards that one velocity evaluation takes."""
        return 1 if guidance_scale == 1 else 2

    def field(self, condition: Tensor, guidance_scale: float) -> PredictionField:
        """The velocity field of a batch with this conditioning, shape (B, ...)."""
        predict = GuidedPrediction(self.predict, condition, self.null_condition(condition), guidance_scale)
        return PredictionField(predict, self.prediction, self.native, self.scheduler)

    def compiled(self: A) -> A:
        """This model with its network compiled by ``torch.compile``, whole; the weights are shared.

        For adapters that keep the network under ``net``; another one overrides this.

        Raises:
            ConfigError: The adapter keeps no ``net``. What the compiler refuses is a ConfigError of the first call.
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
    """A network as ``torch.compile`` makes it, in one piece: what cannot be compiled is an error, never run as it is.

    Args:
        net: The network.
        name: The model's, for errors.
    """

    def __init__(self, net: torch.nn.Module, name: str):
        super().__init__()
        self.name = name
        self.run = torch.compile(net, fullgraph=True)

    def forward(self, *inputs: Any) -> Any:
        """The network's answer.

        Raises:
            ConfigError: The compiler refused, with its own first line.
        """
        from torch._dynamo.exc import TorchDynamoException  # seconds to import, and needed here alone

        try:
            return self.run(*inputs)
        except TorchDynamoException as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(
                f"the network of {self.name} cannot be compiled ({type(error).__name__}: {reason}); set "
                f"resources.compile to false"
            ) from error


class AutocastField:
    """A velocity field whose network computes under torch's autocast.

    States and velocities keep their dtype: only the matrix products and convolutions inside are of lower precision.

    Args:
        field: The field, its weights in float32.
        dtype: bfloat16 or float16. Values beyond 65504 overflow in float16.
    """

    def __init__(self, field: VelocityField, dtype: torch.dtype):
        self.field = field
        self.scheduler = field.scheduler
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """u_t(x), of the shape and dtype of ``x``."""
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.field(x, t).to(x.dtype)


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """A time, 0-d or one a sample, as the (B,) vector that networks take, in the dtype and on the device of ``x``.

    Raises:
        ValueError: Another number of times than samples.
    """
    check_time_shape(t, x)
    return t.to(device=x.device, dtype=x.dtype).expand(x.shape[0])
