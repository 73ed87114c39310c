"""EnCodec's decoder (Défossez et al. 2022): sound from the continuous latents that audio models sample.

BNS section 5.4 samples such latents: those before quantisation, 128 numbers a frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import ConfigError
from orchestrator.models.decoders.base import Decoder
from orchestrator.weights.frozen import freeze


@dataclass
class Encodec(Decoder):
    """The decoder of an EnCodec model in the format of transformers.

    Attributes:
        model: Its folder, as ``save_pretrained`` wrote it, or a hub id.
        mean, std: What the latents were normalised by: they are multiplied by ``std`` and ``mean`` is added.

    Raises:
        ConfigError: transformers is missing, there is no such model, or it is of another kind.
        ValueError: A deviation that is not positive.
    """

    model: str
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
                raise ConfigError(f"{self.model!r} is a model of kind {kind!r}, not 'encodec'; give an EnCodec model")
            self.net = freeze(EncodecModel.from_pretrained(self.model))
        except (OSError, ValueError) as error:
            where = "folder" if Path(self.model).exists() else "folder here, nor could it be fetched from the hub"
            raise ConfigError(f"{self.model!r} is no EnCodec model {where}: {error}") from error

    @property
    def rate(self) -> int:
        """Samples a second of what is decoded."""
        return int(self.net.config.sampling_rate)

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Sound, (B, channels, samples), float32, of latents (B, width, frames).

        Raises:
            ValueError: Latents of another width than the decoder's.
        """
        width = int(self.net.config.hidden_size)
        if samples.ndim != 3 or samples.shape[1] != width:
            raise ValueError(f"EnCodec decodes latents of shape (B, {width}, frames), got {tuple(samples.shape)}")
        self.net.to(samples.device)
        return self.net.decoder(samples.float() * self.std + self.mean)


DECODER = Encodec
