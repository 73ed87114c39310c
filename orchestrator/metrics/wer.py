"""Word error rate: how much of what is to be said is understood."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.audio.digits_recogniser import word_errors
from orchestrator.metrics._spoken import spoken_part
from orchestrator.metrics.base import Batch, RateMetric, needs

if TYPE_CHECKING:
    from orchestrator.audio.recognisers.base import Recogniser
    from orchestrator.datasets.base import Dataset


@dataclass(frozen=True)
class WER(RateMetric):
    """Word errors (Levenshtein) of all samples as a share of all words that were to be said (BNS appendix D.5).

    A share, not a percentage: BNS table 7 has it times 100. Only the part that is to be spoken is heard. A sample with
    a value that is not finite is counted as such; one in which nothing is understood has all its words wrong.

    Attributes:
        recogniser: Who listens: a plugin of ``orchestrator/audio/recognisers/``.
        recogniser_options: Its options.
    """

    higher_is_better = False
    sees = "sound"

    recogniser: str = "digits"
    recogniser_options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def column(self) -> str:
        return f"wer[{self._listener().name}]"

    def _listener(self) -> Recogniser:
        found: Recogniser = plugins.build("recognisers", self.recogniser, self.recogniser_options)
        return found

    def check(self, dataset: Dataset) -> None:
        needs(dataset, "transcripts", "wer", "the words that each sample is to say")
        needs(dataset, "spoken", "wer", "which part of each sample is to be spoken")
        self._listener().check()

    def measure(self, batch: Batch) -> Tensor:
        """(word errors, words to be said) of each sample, shape (B, 2), float64; NaN where sound is not finite."""
        if batch.conditions is None:
            raise ValueError("a word error rate needs the words that were to be said; real samples come without them")
        assert batch.rate is not None
        listener = self._listener().to(str(batch.samples.device))
        said = needs(batch.dataset, "transcripts", "wer", "the words that each sample is to say")(batch.conditions)
        parts = spoken_part(batch, "wer")
        finite = torch.isfinite(batch.samples).flatten(1).all(dim=1).tolist()
        numbers = torch.full((len(parts), 2), torch.nan, dtype=torch.float64)
        for row, part, text, heard in zip(numbers, parts, said, finite, strict=True):
            if heard:
                words = listener.words(text)
                found = listener.words(listener.transcribe([part], batch.rate)[0])
                row[:] = torch.tensor([word_errors(words, found), len(words)], dtype=torch.float64)
        return numbers


METRIC = WER
