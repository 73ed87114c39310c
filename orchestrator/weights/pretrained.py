"""Published networks in transformers' file format: found in a folder or in the local cache, and never downloaded."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from orchestrator.content import digest
from orchestrator.errors import ConfigError
from orchestrator.plugins import FOLDER_OR_NAME
from orchestrator.weights.local import local_folder

P = TypeVar("P", bound="Pretrained")


@dataclass(frozen=True)
class Pretrained:
    """A published network and its processor. A subclass names the classes; nothing is loaded before :meth:`loaded`.

    Attributes:
        weights: A folder as ``save_pretrained`` wrote it, or a hub id whose files are in the local cache.
    """

    ARCHITECTURE: ClassVar[str]
    PROCESSOR: ClassVar[str]

    weights: str = field(metadata=FOLDER_OR_NAME)
    _device: str = field(default="cpu", init=False, repr=False)

    @property
    def folder(self) -> Path:
        """Where the files are.

        Raises:
            ConfigError: The files are not found; names the places searched and the remedy.
        """
        return local_folder(self.weights, self.ARCHITECTURE)

    @property
    def content(self) -> str:
        """sha256 of its files."""
        return digest(self.folder)

    def check(self) -> None:
        """Refuse missing weights or packages, and a network of another kind; nothing large is loaded.

        Raises:
            ConfigError: With what is missing, where it was looked for, and the remedy.
        """
        try:
            import librosa  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise self._uninstalled() from error
        folder = self.folder
        for names, what in (
            (("config.json",), "configuration"),
            (("preprocessor_config.json", "processor_config.json"), "feature extractor"),
            (("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"), "network"),
        ):
            if not any((folder / name).is_file() for name in names):
                raise ConfigError(
                    f"{self.weights!r} is incomplete: no {what} ({' or '.join(names)}) in {folder}; give a whole "
                    "model, as save_pretrained or `hf download` leaves it"
                )
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [
            "unknown"
        ]
        if self.ARCHITECTURE not in architectures:
            raise ConfigError(
                f"{self.weights!r} holds a network {architectures[0]}, not {self.ARCHITECTURE}; give one of those"
            )

    def _uninstalled(self) -> ConfigError:
        return ConfigError(f"{self.ARCHITECTURE} needs transformers and librosa; pip install 'bespoke-solvers[audio]'")

    def to(self: P, device: str) -> P:
        """The same on a device."""
        moved = dataclasses.replace(self)
        object.__setattr__(moved, "_device", device)
        return moved

    def loaded(self) -> tuple[Any, Any]:
        """The processor and the network, frozen, on the device; loaded once per process.

        Raises:
            ConfigError: As :meth:`check`, or files that cannot be read.
        """
        self.check()
        try:
            return _loaded(str(self.folder), self.ARCHITECTURE, self.PROCESSOR, self._device)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.weights!r} cannot be loaded as {self.ARCHITECTURE}: {error}") from error


@cache
def _loaded(folder: str, architecture: str, processor: str, device: str) -> tuple[Any, Any]:
    import transformers

    from orchestrator.weights.frozen import freeze

    before = getattr(transformers, processor).from_pretrained(folder, local_files_only=True)
    net = getattr(transformers, architecture).from_pretrained(folder, local_files_only=True)
    return before, freeze(net).to(device)
