"""What a model adapter provides: a frozen network, and the velocity field it implies for a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from solvers.field import GuidedPrediction, check_time_shape
from solvers.prediction import Prediction, PredictionField
from solvers.schedulers.base import Scheduler
from solvers.schedulers.cond_ot import CondOT


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
    """

    name: str
    shape: tuple[int, ...]
    prediction: Prediction
    native: Scheduler
    data_range: float
    digest: str
    parameters: int

    @classmethod  # noqa: B027 (optional: most adapters have nothing to check)
    def check(cls, options: dict[str, Any]) -> None:
        """Refuse options that cannot work, without loading anything large: called before any actor starts.

        Raises:
            ConfigError: Naming the option, its value and the remedy.
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


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """A time, 0-d or one a sample, as the (B,) vector that networks take, in the dtype and on the device of ``x``.

    Raises:
        ValueError: Another number of times than samples.
    """
    check_time_shape(t, x)
    return t.to(device=x.device, dtype=x.dtype).expand(x.shape[0])


def freeze(module: torch.nn.Module) -> torch.nn.Module:
    """Evaluation mode, and no gradients for weights: only theta ever learns."""
    return module.eval().requires_grad_(False)
