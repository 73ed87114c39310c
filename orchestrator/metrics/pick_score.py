"""PickScore: a model's estimate of how much people prefer an image for its prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orchestrator.metrics._clip import CLIPMetric
from orchestrator.metrics.base import Batch


@dataclass(frozen=True)
class PickScore(CLIPMetric):
    """Logit of a CLIP model trained on human preferences (Kirstain et al. 2023), about 21 in BNS Table 2."""

    weights: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    NAME = "pick_score"

    def measure(self, batch: Batch) -> Tensor:
        return self.scale * self.cosine(batch)


METRIC = PickScore
