"""The decoder of EnCodec (Défossez et al. 2022), from the continuous latents of audio models to sound.

BNS section 5.4 samples such latents, taken before quantisation, with 128 numbers per frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.content import digest, network_digest
from orchestrator.errors import ConfigError
from orchestrator.models.decoders.base import Decoder
from orchestrator.plugins import FOLDER_OR_NAME
from orchestrator.weights.frozen import freeze


@dataclass
class Encodec(Decoder):
    """The decoder of an EnCodec model in transformers format, from latents to sound.

    Attributes:
        model: Folder of the EnCodec model, written by ``save_pretrained``, or its hub id.
        mean, std: Normalisation of the latents: before decoding they are multiplied by ``std`` and ``mean`` is added.

    Raises:
        ConfigError: transformers is missing, the model cannot be loaded, or it is not an EnCodec model.
        ValueError: ``std`` is not positive.
    """

    model: str = field(metadata=FOLDER_OR_NAME)
    mean: float = 0.0
    std: float = 1.0
    net: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive, got {self.std}")
        try:
            from transformers import AutoConfig, EncodecModel
        except ImportError as error:
            raise ConfigError("EnCodec needs transformers; pip install 'bespoke-solvers[diffusers]'") from error
        try:
            kind = AutoConfig.from_pretrained(self.model).model_type
            if kind != "encodec":
                raise ConfigError(f"{self.model!r} is a model of type {kind!r}, not 'encodec'; choose an EnCodec model")
            self.net = freeze(EncodecModel.from_pretrained(self.model))
        except (OSError, ValueError) as error:
            where = "folder" if Path(self.model).exists() else "folder and could not be fetched from the hub"
            raise ConfigError(f"{self.model!r} is not an EnCodec model {where}: {error}") from error

    @property
    def rate(self) -> int:
        """Sample rate of the decoded sound in Hz."""
        return int(self.net.config.sampling_rate)

    @property
    def content(self) -> str:
        return digest(self.mean, self.std, network_digest(self.net))

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Decode latents (B, width, frames) to sound, (B, channels, samples), float32.

        Raises:
            ValueError: The latents do not have the decoder's width.
        """
        width = int(self.net.config.hidden_size)
        if samples.ndim != 3 or samples.shape[1] != width:
            raise ValueError(f"EnCodec decodes latents of shape (B, {width}, frames), got {tuple(samples.shape)}")
        self.net.to(samples.device)
        return self.net.decoder(samples.float() * self.std + self.mean)


DECODER = Encodec
