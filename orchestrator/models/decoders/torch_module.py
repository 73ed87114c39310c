"""A decoder of your own: a torch module given by its import path, such as the autoencoder of a latent flow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.content import digest, network_digest, source_digest
from orchestrator.errors import RAISED, CodeError, ConfigError, UserError, describe, may_pass
from orchestrator.importing import import_factory
from orchestrator.models._checkpoints import parts_of
from orchestrator.models._factories import build_module
from orchestrator.models._weights import load_weights
from orchestrator.models.decoders.base import Decoder
from orchestrator.models.kinds import range_of_data
from orchestrator.plugins import PATH
from orchestrator.weights.frozen import freeze


@dataclass
class ModuleDecoder(Decoder):
    """A torch module of your own that decodes latents, given by its import path, with weights from a file.

    Attributes:
        factory: Class or function that returns the module, as ``"package.module:name"``.
        kwargs: Keyword arguments of the factory.
        path: Folder of the factory's module, if it is not installed, or a list of folders; added to ``sys.path``, in
            hosts as well.
        weights: File of the module's weights; without it the factory supplies them.
        weights_key, weights_prefix: Which part of the file, as for the model adapter ``torch_module``.
        method: Method that decodes latents, (B, ...), such as decode; by default the module itself is called.
        mean, std: Normalisation of the latents: before decoding they are multiplied by ``std`` and ``mean`` is added.
        data_min, data_max: Smallest and largest value of decoded images, which are mapped to [-1, 1].
        rate: Sample rate in Hz of a decoder that makes sound, (B, samples) or (B, channels, samples).

    Raises:
        ValueError: An option is invalid, or the module or its weights cannot be loaded.
    """

    factory: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    path: str | list[str] | None = field(default=None, metadata=PATH)
    weights: str | None = field(default=None, metadata=PATH)
    weights_key: str | list[str] | None = None
    weights_prefix: str | list[str] | None = None
    method: str | None = None
    mean: float = 0.0
    std: float = 1.0
    data_min: float = -1.0
    data_max: float = 1.0
    rate: int | None = None
    net: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        range_of_data(None, self.data_min, self.data_max)
        if not self.std > 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.rate is not None and self.rate < 1:
            raise ValueError(f"rate must be a positive number of samples per second, got {self.rate!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # without a file, every host holds the same weights
            module = build_module(import_factory(self.factory, self.path), self.factory, self.kwargs)
        file = None if self.weights is None else Path(self.weights).expanduser().absolute()
        parts = parts_of(file, self.weights_key, self.weights_prefix)
        if file is not None:
            if not file.is_file():
                raise ValueError(f"weights: there is no file {file}; every machine that runs a host needs it there")
            load_weights(module, file, parts)
        if not callable(getattr(module, self.method or "forward", None)):
            raise ValueError(f"{self.factory} has no method {self.method!r}; set method to the one that decodes")
        self.net = freeze(module)

    @property
    def content(self) -> str:
        numbers = [float(number) for number in (self.mean, self.std, self.data_min, self.data_max)]
        options = [self.method, *numbers, self.rate]
        return digest(options, source_digest(self.factory.partition(":")[0]), network_digest(self.net))

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Decode latents (B, ...) to images in [-1, 1] or to sound, in float32.

        Raises:
            CodeError: The module fails; the message has its file, line and error.
            ConfigError: It does not return a tensor with as many samples.
        """
        self.net.to(samples.device)
        decode = self.net if self.method is None else getattr(self.net, self.method)
        try:
            decoded = decode(samples * self.std + self.mean)
        except RAISED as error:
            if isinstance(error, UserError) or may_pass(error):
                raise
            called = f"{str(samples.dtype).removeprefix('torch.')} {tuple(samples.shape)}"
            raise CodeError(
                f"decoder {self.factory} failed: {describe(error, called=True)}; it was called with {called}"
            ) from error
        if not isinstance(decoded, Tensor) or len(decoded) != len(samples):
            got = f"shape {tuple(decoded.shape)}" if isinstance(decoded, Tensor) else type(decoded).__name__
            raise ConfigError(
                f"decoder {self.factory} must return one tensor of {len(samples)} images or sounds, got {got}; set "
                f"method to the one that decodes, or wrap it"
            )
        if self.rate is not None:
            return decoded.float()
        return 2 * (decoded.float() - self.data_min) / (self.data_max - self.data_min) - 1


DECODER = ModuleDecoder
