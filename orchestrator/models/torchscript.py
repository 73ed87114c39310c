"""``torchscript``: a network exported with ``torch.jit.save``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from orchestrator.models._described import DescribedModel
from orchestrator.models._external import option_bytes


@dataclass
class TorchScript(DescribedModel):
    """A network exported as TorchScript, with code and weights in one file; no Python source is needed.

    Attributes:
        file: File written by ``torch.jit.save``: .pt, .pth or .ts.

    The options of :class:`DescribedModel` describe its shape and conventions, and the errors are documented there.
    """

    file: str

    local: ClassVar[tuple[str, ...]] = ("file",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = self.existing_file("file", self.file, (".pt", ".pth", ".ts"))
        self.name = self.source.stem

    def inspect(self) -> None:
        names = zipfile.ZipFile(self.source).namelist() if zipfile.is_zipfile(self.source) else []
        if not any("/code/" in name for name in names):
            raise self.refused(
                f"{self.source} is not TorchScript: it holds no code; export the network with torch.jit.save, or "
                f"load the weights with the adapter 'torch_module', which takes the class too"
            )

    def load(self) -> Any:
        self.inspect()
        try:
            net = torch.jit.load(self.source, map_location="cpu")
        except RuntimeError as error:
            raise self.refused(f"{self.source} cannot be loaded: {error}; export it again") from error
        for parameter in net.parameters():
            parameter.requires_grad_(False)  # ScriptModule has no requires_grad_ method
        return net.eval()

    def identity(self) -> Iterable[Path | bytes]:
        return option_bytes(self.options()), self.source


ADAPTER = TorchScript
