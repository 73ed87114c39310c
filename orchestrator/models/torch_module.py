"""``torch_module``: a torch module of your own, given by its import path."""

from __future__ import annotations

import inspect as source
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from orchestrator.models._described import DescribedModel
from orchestrator.models._external import option_bytes
from orchestrator.models._weights import (
    SUFFIXES,
    build_module,
    build_without_weights,
    check_fit,
    import_factory,
    load_weights,
    read_shapes,
)
from orchestrator.weights.frozen import freeze

SEED = 0
"""Seed of torch when a module without a weights file is built, so that every host holds the same weights."""


@dataclass
class TorchModule(DescribedModel):
    """A torch module of your own, given by its import path, with weights from a file.

    Weights are safetensors, or torch's own files if they hold only tensors (``weights_only=True``). Without
    ``weights``, the factory supplies them.

    Attributes:
        factory: Class or function that returns the module, as ``"package.module:name"``.
        kwargs: Keyword arguments of the factory.
        path: Folder of the factory's module, if it is not installed; added to ``sys.path``, in hosts as well.
        weights: File of the module's state dictionary: .safetensors, .pt or .pth.

    The options of :class:`DescribedModel` describe its shape and conventions, and the errors are documented there.
    """

    factory: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    weights: str | None = None

    local: ClassVar[tuple[str, ...]] = ("path", "weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.kwargs, Mapping):
            raise self.refused(f"kwargs must be a mapping of argument names to values, got {self.kwargs!r}")
        self.file = None if self.weights is None else self.existing_file("weights", self.weights, SUFFIXES)
        self.name = str(self.factory).rpartition(":")[2] if self.file is None else self.file.stem

    def inspect(self) -> None:
        factory = self._factory()
        module = build_without_weights(lambda: self._made(factory))
        if self.file is None:
            self._source(factory)
            return
        with self.refusing():
            check_fit(module, read_shapes(self.file), self.file)

    def load(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            module = self._made(self._factory())
        if self.file is not None:
            with self.refusing():
                load_weights(module, self.file)
        return freeze(module)

    def identity(self) -> Iterable[Path | bytes]:
        yield option_bytes(self.options())
        if self.file is not None:
            yield self.file
            return
        yield self._source(self._factory()).encode()
        for name, tensor in self.net.state_dict().items():
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def _factory(self) -> Callable[..., Any]:
        with self.refusing():
            return import_factory(self.factory, self.path)

    def _made(self, factory: Callable[..., Any]) -> nn.Module:
        with self.refusing():
            return build_module(factory, self.factory, self.kwargs)

    def _source(self, factory: Callable[..., Any]) -> str:
        """Source code of the factory's module, which determines the weights without a weights file."""
        try:
            return source.getsource(source.getmodule(factory) or factory)
        except (OSError, TypeError) as error:
            raise self.refused(
                f"{self.factory} has no source code to identify the model version by ({error}); set weights to a file"
            ) from error


ADAPTER = TorchModule
