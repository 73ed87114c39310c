"""``torch_module``: a torch module of your own, given by its import path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from orchestrator.content import digest, own_code, source_digest
from orchestrator.importing import find_modules_in, import_factory
from orchestrator.models._checkpoints import SUFFIXES, parts_of
from orchestrator.models._described import NEWER, DescribedModel
from orchestrator.models._factories import build_module, build_without_weights
from orchestrator.models._weights import build_loaded, read_module, read_weights
from orchestrator.plugins import PATH
from orchestrator.weights.frozen import freeze

SEED = 0
"""Seed of torch when a module without a weights file is built, so that every host holds the same weights."""


@dataclass
class TorchModule(DescribedModel):
    """A torch module of your own, given by its import path, with weights from a file.

    Weights are safetensors, or files of ``torch.save``, checkpoints of training among them. They are opened without
    running code (``weights_only=True``); of what lies beside the weights, tensors and containers are read, and nothing
    else. Without ``weights``, the factory supplies them.

    Attributes:
        factory: Class or function that returns the module, as ``"package.module:name"``. A whole pickled module needs
            none.
        kwargs: Keyword arguments of the factory.
        weights: File of the weights: .safetensors, .pt, .pth, .ckpt, .bin or .tar.
        weights_key: Dotted path of the weights in a file of nested containers, e.g. state_dict or ema.shadow_params:
            a state dictionary, or a list of tensors in the order of ``parameters()``. Several paths are joined; later
            ones win, as in [model, ema.shadow_params] for an average that lacks the buffers.
        weights_prefix: Beginning of the names to load, which is taken off them, e.g. "module." or "ema_model.net.".
            One for all paths, or a list with one for each.
        trust_pickle: Whether code in ``weights`` may run, as whole pickled modules need.

    The options of :class:`DescribedModel` describe its shape and conventions, and the errors are documented there.
    """

    factory: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str | None = field(default=None, metadata=PATH)
    weights_key: str | list[str] | None = field(default=None, metadata=NEWER)
    weights_prefix: str | list[str] | None = field(default=None, metadata=NEWER)
    trust_pickle: bool = False

    local: ClassVar[tuple[str, ...]] = ("path", "weights", "trust_pickle")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.kwargs, Mapping):
            raise self.refused(f"kwargs must be a mapping of argument names to values, got {self.kwargs!r}")
        self.file = None if self.weights is None else self.existing_file("weights", self.weights, SUFFIXES)
        with self.refusing():
            self.parts = parts_of(self.file, self.weights_key, self.weights_prefix)
        self.name = str(self.factory).rpartition(":")[2] if self.file is None else self.file.stem
        self.device = "cpu"
        if not isinstance(self.trust_pickle, bool):
            raise self.refused(f"trust_pickle must be true or false, got {self.trust_pickle!r}")
        if self.trust_pickle and (self.file is None or self.file.suffix == ".safetensors"):
            raise self.refused("trust_pickle has no effect without a pickle in weights; leave it out")
        if self.factory is None and not self.trust_pickle:
            raise self.refused(
                "factory is missing, the class or function that returns the module, as 'package.module:name'; only a "
                "whole pickled module in weights needs none, with trust_pickle: true if you trust its source"
            )
        if self.factory is None and (self.kwargs or len(self.parts) > 1):
            raise self.refused("a whole pickled module takes no kwargs and one weights_key; leave them out")

    def inspect(self) -> None:
        if self.factory is None:
            _ = self.net  # what a pickle holds shows when it is opened
            return
        module = build_without_weights(self._made)
        self._code()
        if self.file is not None:
            with self.refusing():
                read_weights(module, self.file, self.parts, self.trust_pickle)

    def load(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            if self.file is None or self.factory is None:
                module = self._made()
            else:
                with self.refusing():
                    module = build_loaded(self._made, self.file, self.parts, self.device, self.trust_pickle)
        if self.file is None:
            self._made_weights = digest(*(part for item in module.state_dict().items() for part in item))
        return freeze(module)

    def to(self, device: str) -> TorchModule:
        self.device = device
        self.net.to(device)
        return self

    def identity(self) -> Iterable[Any]:
        yield from super().identity()
        yield self._code()
        if self.file is not None:
            yield self.file
        else:
            _ = self.net  # loads the network, and notes its weights before it may change its buffers
            yield self._made_weights

    def _made(self) -> nn.Module:
        """The module as the factory makes it, or the one in the file."""
        with self.refusing():
            if self.factory is None:
                assert self.file is not None
                find_modules_in(self.path)
                return read_module(self.file, self.parts[0])
            return build_module(import_factory(self.factory, self.path), self.factory, self.kwargs)

    def _code(self) -> Any:
        """Digest of the code of the network: the factory's, or its classes', and all of the user's own in it."""
        if self.factory is None:
            return own_code({type(part).__module__ for part in self.net.modules()})
        with self.refusing():
            factory = import_factory(self.factory, self.path)
        modules = {self.factory.partition(":")[0], getattr(factory, "__module__", None)} - {None}
        return source_digest(*sorted(map(str, modules)))


ADAPTER = TorchModule
