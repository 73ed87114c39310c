"""PickScore: a model's estimate of how much people prefer an image for its prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from orchestrator.metrics._clip import CLIPMetric
from orchestrator.metrics.base import Batch
from orchestrator.plugins import FOLDER_OR_NAME


@dataclass(frozen=True)
class PickScore(CLIPMetric):
    """Logit of a CLIP model trained on human preferences (Kirstain et al. 2023), about 21 in BNS Table 2."""

    weights: str = field(default="yuvalkirstain/PickScore_v1", metadata=FOLDER_OR_NAME)
    processor: str | None = field(default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata=FOLDER_OR_NAME)
    NAME = "pick_score"

    def measure(self, batch: Batch) -> Tensor:
        return self.scale * self.cosine(batch)


METRIC = PickScore
