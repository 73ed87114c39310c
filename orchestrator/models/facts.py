"""Facts about a model that the rest of the system needs without holding the model."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.schedulers.base import Scheduler


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a host reports about its model.

    Attributes:
        name: Name for tables.
        digest: sha256 of the model.
        shape: Shape of one sample.
        prediction: What the network predicts.
        scheduler: Scheduler of the velocity that solvers see.
        native_scheduler: Name of the scheduler the network was trained with.
        data_range: Largest minus smallest value of the data, for PSNR.
        device_class: 'cpu', or the accelerator's name.
        parameters: Number of the network's weights.
        rate: Sample rate of the sound that samples stand for, in Hz; None for other models.
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
