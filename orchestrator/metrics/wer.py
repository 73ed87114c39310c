"""Word error rate: the share of the transcript's words that a recogniser gets wrong in generated speech."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.audio.recognisers.base import word_errors
from orchestrator.metrics._spoken import spoken_part
from orchestrator.metrics.base import Batch, RateMetric, needs
from orchestrator.plugins import options_of

if TYPE_CHECKING:
    from orchestrator.audio.recognisers.base import Recogniser
    from orchestrator.datasets.base import Dataset


@dataclass(frozen=True)
class WER(RateMetric):
    """Word errors (Levenshtein) of all samples as a share of all words in their transcripts (BNS appendix D.5).

    The value is a share; BNS table 7 has percentages. Only the part that is to be spoken is transcribed. Samples with
    values that are not finite are counted separately. If the recogniser understands nothing, all words are wrong.

    Attributes:
        recogniser: Speech recogniser: a plugin of ``orchestrator/audio/recognisers/``.
        recogniser_options: Options of the recogniser.
    """

    higher_is_better = False
    percent = True
    sees = "sound"

    recogniser: str = "digits"
    recogniser_options: dict[str, Any] = field(
        default_factory=dict, hash=False, metadata=options_of("recognisers", "recogniser")
    )

    @property
    def column(self) -> str:
        return f"wer[{self._listener().name}]"

    measured = "wer"

    def depends_on(self) -> Iterable[Any]:
        return self.recogniser, self._listener().content

    def _listener(self) -> Recogniser:
        recogniser: Recogniser = plugins.build("recognisers", self.recogniser, self.recogniser_options)
        return recogniser

    def check(self, dataset: Dataset) -> None:
        needs(dataset, "transcripts", "wer")
        needs(dataset, "spoken", "wer")
        self._listener().check()

    def measure(self, batch: Batch) -> Tensor:
        """(word errors, words in the transcript) per sample, shape (B, 2), float64; NaN if the sound is not finite."""
        if batch.conditions is None:
            raise ValueError("the word error rate needs a transcript, and real samples have none")
        assert batch.rate is not None
        recogniser = self._listener().to(str(batch.samples.device))
        transcripts = needs(batch.dataset, "transcripts", "wer")(batch.conditions)
        parts = spoken_part(batch, "wer")
        finite = torch.isfinite(batch.samples).flatten(1).all(dim=1).tolist()
        counts = torch.full((len(parts), 2), torch.nan, dtype=torch.float64)
        for row, part, text, is_finite in zip(counts, parts, transcripts, finite, strict=True):
            if is_finite:
                words = recogniser.words(text)
                heard = recogniser.words(recogniser.transcribe([part], batch.rate)[0])
                row[:] = torch.tensor([word_errors(words, heard), len(words)], dtype=torch.float64)
        return counts


METRIC = WER
