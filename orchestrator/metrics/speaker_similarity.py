"""Speaker similarity: how close the generated voice is to the voice of the prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.metrics._spoken import spoken_part
from orchestrator.metrics.base import Batch, MeanMetric, needs
from orchestrator.plugins import options_of

if TYPE_CHECKING:
    from orchestrator.audio.speaker_encoders.base import SpeakerEncoder
    from orchestrator.datasets.base import Dataset


@dataclass(frozen=True)
class SpeakerSimilarity(MeanMetric):
    """Cosine between the voice embeddings of the spoken part and of the prompt (BNS appendix D.5), -1 to 1.

    NaN if the encoder hears no voice in either; such samples are counted but not averaged.

    Attributes:
        encoder: Speaker encoder: a plugin of ``orchestrator/audio/speaker_encoders/``.
        encoder_options: Options of the encoder.
    """

    higher_is_better = True
    sees = "sound"

    encoder: str = "digits_speakers"
    encoder_options: dict[str, Any] = field(
        default_factory=dict, hash=False, metadata=options_of("speaker_encoders", "encoder")
    )

    @property
    def column(self) -> str:
        return f"speaker_similarity[{self._encoder().name}]"

    measured = "speaker_similarity"

    def depends_on(self) -> Iterable[Any]:
        return self.encoder, self._encoder().content

    def _encoder(self) -> SpeakerEncoder:
        encoder: SpeakerEncoder = plugins.build("speaker_encoders", self.encoder, self.encoder_options)
        return encoder

    def check(self, dataset: Dataset) -> None:
        needs(dataset, "voices", "speaker_similarity")
        needs(dataset, "spoken", "speaker_similarity")
        self._encoder().check()

    def measure(self, batch: Batch) -> Tensor:
        """The similarity of each sample, shape (B, 1), float64."""
        if batch.conditions is None:
            raise ValueError("speaker similarity needs the voice of the prompt, and real samples have no prompt")
        assert batch.rate is not None
        encoder = self._encoder().to(str(batch.samples.device))
        voices = needs(batch.dataset, "voices", "speaker_similarity")(batch.conditions)
        prompts = torch.cat([encoder.embed([wave], rate) for wave, rate in voices])
        spoken = encoder.embed(spoken_part(batch, "speaker_similarity"), batch.rate)
        return (spoken.double() * prompts.double()).sum(dim=1, keepdim=True)


METRIC = SpeakerSimilarity
