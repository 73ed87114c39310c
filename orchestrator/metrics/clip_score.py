"""CLIP score: how well an image fits its prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from orchestrator.metrics._clip import CLIPMetric
from orchestrator.metrics.base import Batch
from orchestrator.plugins import FOLDER_OR_NAME


@dataclass(frozen=True)
class CLIPScore(CLIPMetric):
    """Cosine of CLIP's embeddings of image and prompt (Radford et al. 2021), about 0.25 for good images (BNS Table 2).

    The value is the cosine itself; other implementations multiply it by 100 or 2.5.
    """

    weights: str = field(default="openai/clip-vit-base-patch32", metadata=FOLDER_OR_NAME)
    NAME = "clip_score"

    def measure(self, batch: Batch) -> Tensor:
        return self.cosine(batch)


METRIC = CLIPScore
