"""``torch_module``: a torch module of your own, given by its import path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from orchestrator.content import digest, source_digest
from orchestrator.importing import import_factory
from orchestrator.models._described import DescribedModel
from orchestrator.models._weights import (
    SUFFIXES,
    build_module,
    build_without_weights,
    check_fit,
    load_weights,
    read_shapes,
)
from orchestrator.plugins import PATH
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
    path: str | None = field(default=None, metadata=PATH)
    weights: str | None = field(default=None, metadata=PATH)

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
        self._code()
        if self.file is None:
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
        else:
            self._made_weights = digest(*(part for item in module.state_dict().items() for part in item))
        return freeze(module)

    def identity(self) -> Iterable[Any]:
        yield from super().identity()
        yield self._code()
        if self.file is not None:
            yield self.file
        else:
            _ = self.net  # loads the network, and notes its weights before it may change its buffers
            yield self._made_weights

    def _factory(self) -> Callable[..., Any]:
        with self.refusing():
            return import_factory(self.factory, self.path)

    def _made(self, factory: Callable[..., Any]) -> nn.Module:
        with self.refusing():
            return build_module(factory, self.factory, self.kwargs)

    def _code(self) -> str:
        """Digest of the code of the network: the factory's, and all of the user's own that it imports."""
        modules = {self.factory.partition(":")[0], getattr(self._factory(), "__module__", None)} - {None}
        return source_digest(*sorted(map(str, modules)))


ADAPTER = TorchModule
