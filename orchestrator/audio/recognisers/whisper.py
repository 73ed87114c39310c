"""``whisper``: Whisper (Radford et al. 2022), with which BNS appendix D.5 measures word error rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from orchestrator.audio.mel import FloatArray, audible, resampled
from orchestrator.audio.recognisers.base import Recogniser
from orchestrator.content import digest
from orchestrator.plugins import FOLDER_OR_NAME
from orchestrator.weights.pretrained import Pretrained


@dataclass(frozen=True)
class Whisper(Pretrained, Recogniser):
    """Whisper in the transformers format, decoded greedily; sound longer than 30 s is transcribed in parts.

    Attributes:
        weights: A folder written by ``save_pretrained``, or a hub id whose files are in the local cache.
        language: The spoken language; ignored by English-only models.
        normaliser: Normalisation applied to texts before they are compared. "english" and "basic" are Whisper's own,
            for English (spelling, contractions, numbers as figures) and for any language (case and punctuation).
            "digits" is "english" with numbers split into single figures, since "one two" may be transcribed as "1, 2"
            or as "12".
    """

    ARCHITECTURE, PROCESSOR = "WhisperForConditionalGeneration", "WhisperProcessor"

    weights: str = field(default="openai/whisper-large-v3", metadata=FOLDER_OR_NAME)
    language: str = "en"
    normaliser: Literal["english", "basic", "digits"] = "english"

    def __post_init__(self) -> None:
        if self.normaliser not in ("english", "basic", "digits"):
            raise ValueError(f"normaliser must be english, basic or digits, got {self.normaliser!r}")

    @property
    def content(self) -> str:
        return digest(self.folder, self.language, self.normaliser)

    @property
    def name(self) -> str:
        last = Path(self.weights).name
        return last if last.startswith("whisper") else f"whisper-{last}"

    @torch.no_grad()
    def transcribe(self, waves: Sequence[FloatArray], rate: int) -> list[str]:
        return [self._heard(wave, rate) if audible(wave) else "" for wave in waves]

    def _heard(self, wave: FloatArray, rate: int) -> str:
        processor, net = self.loaded()
        extractor = processor.feature_extractor
        wave = resampled(wave, rate, extractor.sampling_rate)
        long = len(wave) > extractor.n_samples
        inputs = processor(
            wave,
            sampling_rate=extractor.sampling_rate,
            return_tensors="pt",
            return_attention_mask=True,
            truncation=False,
            padding="longest" if long else "max_length",
        )
        # English-only models reject a language argument.
        multilingual = getattr(net.generation_config, "is_multilingual", False)
        language = {"language": self.language, "task": "transcribe"} if multilingual else {}
        tokens = net.generate(
            inputs.input_features.to(net.device, net.dtype),
            attention_mask=inputs.attention_mask.to(net.device),
            return_timestamps=long,
            do_sample=False,
            num_beams=1,
            **language,
        )
        return str(processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()

    def words(self, text: str) -> list[str]:
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

        if self.normaliser == "basic":
            return str(BasicTextNormalizer()(text)).split()
        # The table of British to American spellings is missing from some model folders.
        spellings = getattr(self.loaded()[0].tokenizer, "english_spelling_normalizer", None) or {}
        words = str(EnglishTextNormalizer(spellings)(text)).split()
        if self.normaliser == "english":
            return words
        # That normaliser leaves a lone "one" spelled out, because of phrases such as "one day".
        return [part for word in words for part in ("1" if word == "one" else word if word.isdigit() else [word])]


RECOGNISER = Whisper
