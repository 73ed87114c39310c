"""Facts about a model for code that does not hold the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.models.kinds import Kind
from solvers.schedulers.base import Scheduler


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts that a host reports about its model.

    Attributes:
        name: Name for tables.
        digest: sha256 of the model.
        shape: Shape of one sample.
        prediction: Quantity the network predicts.
        scheduler: Scheduler of the velocity field that solvers integrate.
        native_scheduler: Name of the scheduler the network was trained with.
        data_range: Largest minus smallest value of the data, for PSNR.
        device_class: 'cpu', or the name of the accelerator.
        parameters: Number of weights of the network.
        rate: Sample rate of decoded sound in Hz; None for models that make none.
        code: Folders of the user's code, in which the functions of a custom scheduler are found.
        kind: Kind of samples, by which they are shown.
        data_min, data_max: Smallest and largest value of decoded samples, for pictures.
        forwards_unguided: Network forwards per velocity evaluation at guidance scale 1: one, and two for a network of
            whole timesteps that is interpolated.
        forwards_with_guidance: Network forwards per velocity evaluation at another guidance scale: twice as many for
            classifier-free guidance, as many if the network is conditioned on the scale.
        scales_start: Whether the programs that sample with the model can start from a_0 x0 with any a_0.
    """

    name: str
    digest: str
    shape: tuple[int, ...]
    prediction: str
    scheduler: Scheduler
    native_scheduler: str
    data_range: float
    device_class: str
    parameters: int
    rate: int | None
    code: tuple[str, ...] = ()
    kind: Kind
    data_min: float
    data_max: float
    forwards_unguided: int = 1
    forwards_with_guidance: int = 2
    scales_start: bool = True

    @property
    def interpolation(self) -> str:
        """Says that outputs at whole timesteps are interpolated, and what it costs; empty if they are not."""
        if self.forwards_unguided == 1:
            return ""
        return f"outputs at whole timesteps interpolated, {self.forwards_unguided} forwards per evaluation"

    @property
    def makes(self) -> Literal["images", "sound"] | None:
        """What metrics of images or of sound can measure; None if samples are neither."""
        return {"image": "images", "sound": "sound"}.get(self.kind)  # type: ignore[return-value]

    def forwards_per_evaluation(self, guidance_scale: float) -> int:
        """Network forwards per velocity evaluation at this guidance scale."""
        return self.forwards_unguided if guidance_scale == 1 else self.forwards_with_guidance
