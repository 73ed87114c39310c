"""Forms in which samples are shown and measured: as they are, decoded for viewing, or as waves."""

from __future__ import annotations

from torch import Tensor

from orchestrator.metrics.base import Batch, Media, to_unit_range
from orchestrator.models.base import ModelAdapter
from orchestrator.pairs import PairSet


class Forms:
    """Brings samples of a model into other forms, float32 on the CPU.

    Args:
        model: The model, whose decoder may work in place.
        device: Its device.
    """

    def __init__(self, model: ModelAdapter, device: str):
        self.model = model
        self.device = device

    def shown(self, samples: Tensor) -> Tensor:
        """Samples as they are shown; latents are decoded."""
        return self.model.decode(samples.to(self.device, copy=True)).float().cpu()

    def heard(self, samples: Tensor) -> Tensor:
        """Samples as waves."""
        return self.model.sound(samples.to(self.device, copy=True)).float().cpu()

    def form(self, form: Media, samples: Tensor) -> Tensor:
        """Samples in a form that metrics see; of images, the range of data is mapped to [-1, 1]."""
        if form == "samples":
            return samples.float()
        if form == "sound":
            return self.heard(samples)
        return to_unit_range(self.shown(samples), self.model.shown_range)

    def compared(self, form: Media, samples: Tensor, pairs: PairSet) -> Batch:
        """Samples and their ground truth in a form that metrics see, as far as their entries count."""
        if form == "samples":
            return Batch(pairs.counted(samples), None, None, pairs.counted(pairs.x1), self.model.data_range)
        return Batch(self.form(form, pairs.filled(samples)), None, None, self.form(form, pairs.x1), 2.0)
