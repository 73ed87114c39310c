"""``onnx_session``: a network in an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.datasets.base import Layout
from orchestrator.errors import ConfigError
from orchestrator.models._call import NAMED
from orchestrator.models._described import DescribedModel
from orchestrator.plugins import PATH

FLOATS: dict[str, torch.dtype] = {"FLOAT": torch.float32, "DOUBLE": torch.float64, "FLOAT16": torch.float16}
INTEGERS = ("INT64", "INT32")
TIME_SHAPES: dict[str, tuple[int | None, ...]] = {"batch": (None,), "column": (None, 1), "scalar": ()}
KINDS = {"float32": tuple(FLOATS), "float64": tuple(FLOATS), "int64": INTEGERS, "bool": ("BOOL",)}
"""Types of a graph's input to which an array of the dataset is converted, by the array's type."""


@dataclass
class OnnxSession(DescribedModel):
    """A network in an ONNX file, run by ONNX Runtime; as a black box it is distilled by Levenberg-Marquardt.

    It needs the extra ``onnx``. The graph's first axis must be a batch axis of any size, and its only output the
    prediction, unless ``output`` names it. Positional arguments in ``call`` are assigned to the graph's inputs in
    order, named ones by name. The network has no derivatives, so Adam and the Jacobian 'jvp' are refused. It uses
    as many threads as torch has on its first evaluation.

    Attributes:
        file: The .onnx file.

    The options of :class:`DescribedModel` describe its shape and conventions, and the errors are documented there.
    """

    file: str = field(metadata=PATH)

    differentiable: ClassVar[bool] = False
    local: ClassVar[tuple[str, ...]] = ("path", "file")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = self.existing_file("file", self.file, (".onnx",))
        self.name = self.source.stem
        self.device = "cpu"

    @cached_property
    def graph(self) -> _Graph:
        """The graph's inputs and outputs, read without loading external weight files."""
        onnx = self._package("onnx")
        try:
            model = onnx.load(self.source, load_external_data=False)
        except Exception as error:  # protobuf's errors have no common base class
            raise self.refused(f"{self.source} is not an ONNX file: {error}; export the network again") from error
        return _Graph.read(model, onnx.TensorProto.DataType.Name)

    def inspect(self) -> None:
        self._package("onnxruntime")
        for symbol, name in self.inputs.items():
            kind, shape = self.graph.inputs[name]
            if symbol.startswith(NAMED):  # compared with the dataset, see check_names
                continue
            expected = {"x": (None, *self.shape), "t": TIME_SHAPES[self.clock.shape]}.get(symbol, (None,))
            if len(shape) != len(expected) or any(
                size not in (None, required) for size, required in zip(shape, expected, strict=True)
            ):
                raise self.refused(
                    f"input {name!r} of {self.source.name}, which takes {symbol}, has shape {_shown(shape)} instead of "
                    f"{_shown(expected)}; export it with a batch axis of any size, or correct shape and call"
                )
            whole = symbol == "y" or (symbol == "t" and self.clock.integer is not None)
            kinds = INTEGERS if whole else tuple(FLOATS)
            if symbol == "t" and kind in INTEGERS and kind not in kinds and self.clock.kind == "timestep":
                raise self.refused(
                    f"input {name!r} of {self.source.name}, which takes t, is {kind}, so the network takes whole "
                    f"timesteps only; set time to {{kind: timestep, integer: interpolate}}, which interpolates its "
                    f"outputs between neighbouring timesteps by two forwards per evaluation"
                )
            if kind not in kinds:
                raise self.refused(
                    f"input {name!r} of {self.source.name}, which takes {symbol}, is {kind}, but must be one of "
                    f"{', '.join(kinds)}; export it with that type (solvers evaluate at fractional timesteps too)"
                )

    def check_names(self, dataset: Any) -> None:
        super().check_names(dataset)
        for name in self.arguments.conditions:
            kind, shape = self.graph.inputs[self.inputs[NAMED + name]]
            given: Layout = dataset.layout[name]
            expected = (None, *given.shape)
            fits = len(shape) == len(expected) and all(a in (None, b) for a, b in zip(shape, expected, strict=True))
            if not fits or kind not in KINDS[given.dtype]:
                raise self.refused(
                    f"input {self.inputs[NAMED + name]!r} of {self.source.name} is {kind} of shape {_shown(shape)}, "
                    f"but c.{name} is {given.dtype} of shape {_shown(expected)}; change the array, or export the "
                    f"network with that input"
                )

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Name of the graph's input for each symbol."""
        names, call = list(self.graph.inputs), self.arguments
        by_symbol = dict(zip(call.positional, names, strict=False)) | {s: name for name, s in call.keywords.items()}
        if sorted(by_symbol.values()) != sorted(names) or set(by_symbol) != set(call.symbols):
            raise self.refused(
                f"call={self.call!r} does not fit {self.source.name}, whose inputs are {', '.join(names)}; name each "
                f"once, in this order or as 'name=x'"
            )
        outputs = self.graph.outputs
        if self.output is None and len(outputs) != 1:
            raise self.refused(
                f"{self.source.name} has {len(outputs)} outputs, {', '.join(outputs)}; set output to the name of the "
                f"prediction, or export it with that output only"
            )
        if self.output is not None and self.output not in (*outputs, *range(len(outputs))):
            raise self.refused(f"output={self.output!r} is not an output of {self.source.name}: {', '.join(outputs)}")
        return by_symbol

    def load(self) -> Any:
        self.inspect()
        runtime = self._package("onnxruntime")
        provider = "CUDAExecutionProvider" if self.device.startswith("cuda") else "CPUExecutionProvider"
        if provider not in runtime.get_available_providers():
            raise self.refused(
                f"this ONNX Runtime has no {provider} for device {self.device!r}; install onnxruntime-gpu, or set "
                f"resources.device to cpu"
            )
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.inter_op_num_threads = 1
        options = {"device_id": torch.device(self.device).index or 0} if self.device.startswith("cuda") else {}
        try:
            return runtime.InferenceSession(self.source, settings, providers=[(provider, options)])
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise self.refused(f"{self.source} cannot be run: {error}; export the network again") from error

    def to(self, device: str) -> OnnxSession:
        self.inspect()
        self.device = device
        self.__dict__.pop("net", None)
        return self

    @cached_property
    def network_dtype(self) -> torch.dtype:  # type: ignore[override]
        return FLOATS[self.graph.inputs[self.inputs["x"]][0]]

    @cached_property
    def parameters(self) -> int:  # type: ignore[override]
        return self.graph.parameters

    def call_network(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
        values = self.inputs_of(x, time, condition)
        arrays = {name: self._array(values[symbol], name) for symbol, name in self.inputs.items()}
        answers = [torch.from_numpy(answer).to(x.device) for answer in self.net.run(None, arrays)]
        named = dict(zip(self.graph.outputs, answers, strict=True)) if isinstance(self.output, str) else tuple(answers)
        output: Tensor = self._prediction_in(answers[0] if self.output is None else named)
        return output

    def _array(self, value: Tensor, name: str) -> npt.NDArray[Any]:
        kind = self.graph.inputs[name][0]
        dtype = FLOATS.get(kind) or {"INT64": torch.int64, "INT32": torch.int32, "BOOL": torch.bool}[kind]
        return np.ascontiguousarray(value.detach().to(device="cpu", dtype=dtype).numpy())

    def identity(self) -> Iterable[Any]:
        yield from super().identity()
        yield self.source
        for name in sorted(self.graph.beside):
            yield self.existing_file(
                f"weights of {self.source.name}", str(self.source.parent / name), (Path(name).suffix,)
            )

    def _package(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"model adapter 'onnx_session' needs the package {name} ({error}); install it: "
                f"pip install 'bespoke-solvers[onnx]'"
            ) from error


@dataclass(frozen=True)
class _Graph:
    """Inputs, outputs and weights declared by an ONNX graph.

    Attributes:
        inputs: Type and shape of each input by name, in order; None stands for any size.
        outputs: Names of the outputs.
        parameters: Number of floating-point weights.
        beside: Names of external weight files in the same folder.
    """

    inputs: dict[str, tuple[str, tuple[int | None, ...]]]
    outputs: tuple[str, ...]
    parameters: int
    beside: frozenset[str]

    @classmethod
    def read(cls, model: Any, type_name: Any) -> _Graph:
        graph = model.graph
        tensors = [tensor for body in (graph, *model.functions) for tensor in _tensors(body)]
        held = {tensor.name for tensor in graph.initializer}
        inputs = {}
        for value in graph.input:
            if value.name in held:  # old exporters list weights with defaults as inputs
                continue
            declared = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in declared.shape.dim)
            inputs[value.name] = (type_name(declared.elem_type), shape)
        floating = [tensor for tensor in graph.initializer if type_name(tensor.data_type) in (*FLOATS, "BFLOAT16")]
        external = {e.value for tensor in tensors for e in tensor.external_data if e.key == "location"}
        parameters = sum(math.prod(tensor.dims) for tensor in floating)
        return cls(inputs, tuple(value.name for value in graph.output), parameters, frozenset(external))


def _tensors(graph: Any) -> Iterator[Any]:
    """All tensors of a graph or a function: weights, and those in attributes of nodes and in graphs within it."""
    yield from getattr(graph, "initializer", ())  # a function has none
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _tensors(inner)


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


ADAPTER = OnnxSession
