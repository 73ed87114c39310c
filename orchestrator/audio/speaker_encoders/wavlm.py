"""``wavlm``: WavLM-TDCNN (Chen et al. 2022), with which BNS appendix D.5 measures speaker similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.audio.mel import FloatArray, audible, resampled
from orchestrator.audio.speaker_encoders.base import SpeakerEncoder
from orchestrator.plugins import FOLDER_OR_NAME
from orchestrator.weights.pretrained import Pretrained


@dataclass(frozen=True)
class WavLM(Pretrained, SpeakerEncoder):
    """WavLM with its x-vector head, in the transformers format.

    Attributes:
        weights: A folder written by ``save_pretrained``, or a hub id whose files are in the local cache.
    """

    ARCHITECTURE, PROCESSOR = "WavLMForXVector", "Wav2Vec2FeatureExtractor"

    weights: str = field(default="microsoft/wavlm-base-plus-sv", metadata=FOLDER_OR_NAME)

    @property
    def name(self) -> str:
        last = Path(self.weights).name
        return last if last.startswith("wavlm") else f"wavlm-{last}"

    @torch.no_grad()
    def embed(self, waves: Sequence[FloatArray], rate: int) -> Tensor:
        extractor, net = self.loaded()
        voices = torch.full((len(waves), net.config.xvector_output_dim), torch.nan)
        # One by one: padding would change the embedding, and a sample's value must not depend on its batch.
        for voice, wave in zip(voices, waves, strict=True):
            if audible(wave):
                heard = resampled(wave, rate, extractor.sampling_rate)
                inputs = extractor(heard, sampling_rate=extractor.sampling_rate, return_tensors="pt")
                embedding = net(inputs.input_values.to(net.device, net.dtype)).embeddings[0]
                voice[:] = torch.nn.functional.normalize(embedding.float(), dim=0).cpu()
        return voices


ENCODER = WavLM
