"""``torchscript``: a network exported with ``torch.jit.save``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from orchestrator.models._described import DescribedModel
from orchestrator.plugins import PATH

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class TorchScript(DescribedModel):
    """A network exported as TorchScript, with code and weights in one file; no Python source is needed.

    Attributes:
        file: File written by ``torch.jit.save``: .pt, .pth or .ts.
        dtype: Floating dtype of its input: float64, float32, bfloat16 or float16. By default that of its weights; a
            frozen network (``torch.jit.freeze``), whose weights are constants of its code, is tried out.

    The options of :class:`DescribedModel` describe its shape and conventions, and the errors are documented there.
    """

    file: str = field(metadata=PATH)
    dtype: str | None = None

    local: ClassVar[tuple[str, ...]] = ("path", "file")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = self.existing_file("file", self.file, (".pt", ".pth", ".ts"))
        self.name = self.source.stem
        self.device = "cpu"
        if self.dtype is not None and self.dtype not in DTYPES:
            raise self.refused(f"dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")

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
            net = torch.jit.load(self.source, map_location=self.device)
        except RuntimeError as error:
            raise self.refused(f"{self.source} cannot be loaded: {error}; export it again") from error
        for parameter in net.parameters():
            parameter.requires_grad_(False)  # ScriptModule has no requires_grad_ method
        return net.eval()

    def to(self, device: str) -> TorchScript:
        self.device = device
        self.net = self.load()  # constants of a frozen network stay where they were loaded
        return self

    @cached_property
    def parameters(self) -> int:  # type: ignore[override]
        return super().parameters or sum(constant.numel() for constant in self._constants())

    @cached_property
    def network_dtype(self) -> torch.dtype:  # type: ignore[override]
        if self.dtype is not None:
            return DTYPES[self.dtype]
        if any(weight.is_floating_point() for weight in self.net.parameters()):
            return super().network_dtype
        if self.arguments.conditions:
            raise self.refused(
                f"{self.name} is frozen, so that the dtype of its weights is not known; set dtype to it, e.g. float32"
            )
        constants = {constant.dtype for constant in self._constants()}
        reasons = []
        for name in sorted(DTYPES, key=lambda name: DTYPES[name] not in constants):
            try:
                self._evaluate_zeros(DTYPES[name])
                return DTYPES[name]
            except Exception as error:  # TorchScript raises what its code raises
                reasons.append(f"{name}: {str(error).strip().splitlines()[-1]}")
        raise self.refused(
            f"{self.name} is frozen, and fails with an input of any dtype ({'; '.join(reasons)}); correct the options "
            f"shape, call and time, or set dtype to that of its weights"
        )

    def _constants(self) -> list[Tensor]:
        """Floating-point tensors in the network's code: its weights, if it is frozen."""
        graph = self.net.inlined_graph
        nodes = [node for node in graph.findAllNodes("prim::Constant") if node.hasAttribute("value")]
        tensors = [node.t("value") for node in nodes if node.kindOf("value") == "t"]
        return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim]

    def _evaluate_zeros(self, dtype: torch.dtype) -> None:
        """Evaluate a batch of two zeros in the middle of the path."""
        x = torch.zeros(2, *self.shape, dtype=dtype, device=self.device)
        label = torch.zeros(2, dtype=torch.int64, device=self.device)
        t = torch.tensor((self.native.t_min + self.native.t_max) / 2, dtype=torch.float64)
        time = self.time_argument(self.network_time(t), x.to(torch.promote_types(dtype, torch.float32)))
        with torch.no_grad():
            self.clock.evaluate(self.call_network, self.native, x, time, label)

    def identity(self) -> Iterable[Any]:
        yield from super().identity()
        yield self.source


ADAPTER = TorchScript
