"""Base class of metrics that use a CLIP model to measure how well an image fits its text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.features.inception import to_uint8
from orchestrator.metrics.base import Batch, MeanMetric, needs
from orchestrator.plugins import FOLDER_OR_NAME
from orchestrator.weights.frozen import freeze
from orchestrator.weights.local import local_folder


@dataclass(frozen=True)
class CLIPMetric(MeanMetric):
    """A metric based on a CLIP model; subclasses choose the model and the formula.

    Attributes:
        weights: The model: a folder, or a hub repository that is in the local cache.
        processor: Folder or repository of the processor; None for the one in ``weights``.
    """

    weights: str = field(metadata=FOLDER_OR_NAME)
    processor: str | None = field(default=None, metadata=FOLDER_OR_NAME)

    NAME: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    sees = "images"

    @property
    def column(self) -> str:
        return f"{self.NAME}[{self.weights.rstrip('/').rpartition('/')[2]}]"

    @property
    def measured(self) -> str:
        return self.NAME

    def depends_on(self) -> Iterable[Any]:
        return [local_folder(name, f"metric {self.NAME!r}") for name in (self.weights, self.processor or self.weights)]

    def check(self, dataset: Dataset) -> None:
        needs(dataset, "texts", self.NAME)
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"{self.NAME} needs transformers; pip install 'bespoke-solvers[diffusers]'") from error
        for name in (self.weights, self.processor):
            if name is not None:
                local_folder(name, f"metric {self.NAME!r}")

    def check_samples(self, shape: tuple[int, ...], count: int) -> None:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"{self.NAME} is of images of 1 or 3 channels, (C, H, W), got shape {shape}")

    @cached_property
    def _net(self) -> Any:
        from transformers import CLIPModel

        return freeze(CLIPModel.from_pretrained(local_folder(self.weights, self.NAME)))

    @cached_property
    def _processor(self) -> Any:
        from transformers import CLIPProcessor

        return CLIPProcessor.from_pretrained(local_folder(self.processor or self.weights, self.NAME))

    def cosine(self, batch: Batch) -> Tensor:
        """Cosine similarity of image and text embeddings, (B, 1), float64."""
        assert batch.conditions is not None
        texts = needs(batch.dataset, "texts", self.NAME)(batch.conditions)
        pictures = list(to_uint8(batch.samples).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy())
        device = batch.samples.device
        inputs = self._processor(images=pictures, text=texts, return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            output = self._net.to(device)(**inputs.to(device))
        return (output.image_embeds * output.text_embeds).sum(dim=1, keepdim=True).double()

    @property
    def scale(self) -> float:
        """The model's own factor on cosines (``logit_scale``)."""
        return float(self._net.logit_scale.exp())
