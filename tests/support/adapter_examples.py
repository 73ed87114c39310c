"""One tiny network behind each adapter, with the sampler that its own library would run on it.

The files are in the formats that users have: weights, TorchScript, ONNX, an EDM pickle.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import own_networks
import torch
from onnx import TensorProto, helper, numpy_helper
from proofs import LABELS, guided
from torch import Tensor, nn

from orchestrator import plugins
from orchestrator.models.base import ModelAdapter
from solvers.schedulers.discrete_vp import linear_betas

Sampler = Callable[[Tensor, int], Tensor]
"""From noise (N, *shape), float64, and a number of steps to samples."""

HERE = Path(own_networks.__file__).parent
COUNT = 400
BETAS = list(linear_betas(count=COUNT))
DISCRETE = {"name": "discrete_vp", "options": {"betas": BETAS}}
DROPPED = torch.full_like(LABELS, own_networks.DROPPED)

FLOW: dict[str, Any] = {
    "factory": "own_networks:Flow",
    "path": str(HERE),
    "shape": [1, 2, 3],
    "prediction": "velocity",
    "native_scheduler": "cond_ot",
    "call": "x, t, y",
    "classes": own_networks.CLASSES,
    "null_label": own_networks.DROPPED,
}
REVERSED = FLOW | {
    "factory": "own_networks:ReversedFlow",
    "call": "x, timestep=t, class_labels=y",
    "time": "1-t",
    "time_scale": 1000,
}
NOISE = FLOW | {
    "factory": "own_networks:Noise",
    "kwargs": {"count": COUNT},
    "prediction": "epsilon",
    "native_scheduler": DISCRETE,
    "time": "timestep",
}


def graph(batch: Any = "B", time: int = TensorProto.FLOAT, outputs: tuple[str, ...] = ("velocity",)) -> onnx.ModelProto:
    """:class:`own_networks.Flow` as an ONNX graph, like one written by an exporter."""
    core = own_networks.Flow().core
    arrays = {name: value.detach().numpy() for name, value in core.named_parameters()}
    arrays |= {"two": np.float32(2), "damping": np.float32(0.3), "row": np.array([-1, 1]), "flat": np.array([-1, 6])}
    arrays["image"] = np.array([-1, 1, 2, 3])
    nodes = [
        ("Cast", ["t"], ["seconds"], {"to": TensorProto.FLOAT}),
        ("Mul", ["seconds", "two"], ["angle"], {}),
        ("Sin", ["angle"], ["sine"], {}),
        ("Cos", ["angle"], ["cosine"], {}),
        ("Reshape", ["sine", "row"], ["sines"], {}),
        ("Reshape", ["cosine", "row"], ["cosines"], {}),
        ("Concat", ["sines", "cosines"], ["waves"], {"axis": 1}),
        ("MatMul", ["waves", "time"], ["timed"], {}),
        ("Gather", ["label", "y"], ["labelled"], {}),
        ("Reshape", ["x", "flat"], ["flattened"], {}),
        ("MatMul", ["flattened", "inward"], ["seen"], {}),
        ("Add", ["seen", "timed"], ["sum"], {}),
        ("Add", ["sum", "labelled"], ["hidden"], {}),
        ("Tanh", ["hidden"], ["bent"], {}),
        ("MatMul", ["bent", "outward"], ["answer"], {}),
        ("Reshape", ["answer", "image"], ["shaped"], {}),
        ("Mul", ["x", "damping"], ["damped"], {}),
        ("Sub", ["shaped", "damped"], ["velocity"], {}),
    ]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, ins, outs, **settings) for kind, ins, outs, settings in nodes],
            "flow",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 1, 2, 3]),
                helper.make_tensor_value_info("t", time, [batch]),
                helper.make_tensor_value_info("y", TensorProto.INT64, [batch]),
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )


KWARGS = {"img_resolution": 2, "img_channels": 3, "label_dim": own_networks.CLASSES}
"""Arguments of ``own_networks.Denoiser`` for two by two pixels in three colours."""


def write_pickle(folder: Path, network: Any = None, name: str = "network-snapshot.pkl", key: str = "ema") -> Path:
    """Write a pickle as EDM training does: a dictionary with the averaged network and other entries."""
    path = folder / name
    with path.open("wb") as stream:
        pickle.dump({key: network or own_networks.Denoiser(**KWARGS), "loss_fn": None, "dataset_kwargs": {}}, stream)
    return path


def euler(network: nn.Module, time: Callable[[float], float], scale: float) -> Sampler:
    """The flow-matching sampler: Euler steps on the velocity, in the network's own time."""

    def sampler(x: Tensor, steps: int) -> Tensor:
        for t, next_t in itertools.pairwise(np.linspace(0, 1, steps + 1)):
            times, state = torch.full((len(x),), time(t), dtype=torch.float64), x
            velocity = guided(lambda y, state=state, times=times: network(state, times, y), DROPPED, scale)
            x = x + (next_t - t) * velocity
        return x

    return sampler


def ddim(network: nn.Module, scale: float) -> Sampler:
    """DDIM (eta = 0) on a subset of the training timesteps, from the noisiest to 0, as in diffusion libraries."""
    products = np.cumprod(1 - np.array(BETAS))

    def sampler(x: Tensor, steps: int) -> Tensor:
        timesteps = np.linspace(COUNT - 1, 0, steps + 1).round().astype(int)
        x = x * float(np.sqrt(1 - products[-1]))
        for k, next_k in itertools.pairwise(timesteps):
            times, state = torch.full((len(x),), float(k), dtype=torch.float64), x
            noise = guided(lambda y, state=state, times=times: network(state, times, y), DROPPED, scale)
            clean = (x - float(np.sqrt(1 - products[k])) * noise) / float(np.sqrt(products[k]))
            x = float(np.sqrt(products[next_k])) * clean + float(np.sqrt(1 - products[next_k])) * noise
        return x

    return sampler


def heun(network: torch.nn.Module, scale: float) -> Sampler:
    """EDM's deterministic sampler (Karras et al. 2022, Algorithm 1, rho = 7), up to sigma_min.

    Guidance is applied to the denoiser; a dropped label is all zeros.
    """
    labels = torch.eye(own_networks.CLASSES)

    def denoised(x: Tensor, sigma: float) -> Tensor:
        def evaluate(label: Tensor) -> Tensor:
            return network(x.float(), torch.full((len(x),), sigma), label).double()

        if scale == 1:
            return evaluate(labels[LABELS])
        dropped = evaluate(torch.zeros(len(x), own_networks.CLASSES))
        return dropped + scale * (evaluate(labels[LABELS]) - dropped)

    def sampler(x0: Tensor, steps: int) -> Tensor:
        r = np.linspace(0, 1, steps + 1)
        sigmas = (80 ** (1 / 7) + r * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        x = 80 * x0
        for sigma, next_sigma in itertools.pairwise(sigmas.tolist()):
            slope = (x - denoised(x, sigma)) / sigma
            euler = x + (next_sigma - sigma) * slope
            x = x + (next_sigma - sigma) * (slope + (euler - denoised(euler, next_sigma)) / next_sigma) / 2
        return x

    return sampler


def onnx_euler(file: Path, scale: float) -> Sampler:
    """Euler steps on the velocity, in ONNX Runtime and float32 throughout."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def sampler(x0: Tensor, steps: int) -> Tensor:
        x = x0.numpy().astype(np.float32)
        for t, next_t in itertools.pairwise(np.linspace(0, 1, steps + 1, dtype=np.float32)):
            feed = {"x": x, "t": np.full(len(x), t)}
            velocity = guided(lambda y, feed=feed: session.run(None, feed | {"y": y.numpy()})[0], DROPPED, scale)
            x = x + (next_t - t) * velocity
        return torch.from_numpy(x).double()

    return sampler


def torchscript_euler(file: Path, scale: float) -> Sampler:
    """Euler steps on the velocity of the loaded file, which computes in float32."""
    network = torch.jit.load(file)
    return euler(lambda x, t, y: network(x.float(), t.float(), y).double(), lambda t: t, scale)


def write_torchscript(folder: Path) -> Path:
    """The flow network, traced and saved."""
    path = folder / "flow.pt"
    torch.jit.save(torch.jit.trace(own_networks.Flow(), (torch.zeros(2, 1, 2, 3), torch.zeros(2), LABELS[:2])), path)
    return path


def write_onnx(folder: Path) -> Path:
    """The flow network as an ONNX file."""
    path = folder / "flow.onnx"
    onnx.save(graph(), path)
    return path


def write_weights(network: nn.Module) -> Callable[[Path], Path]:
    """Writes the weights of ``network`` as a state dictionary."""

    def write(folder: Path) -> Path:
        path = folder / "weights.pt"
        torch.save(network.state_dict(), path)
        return path

    return write


FILE = {name: FLOW[name] for name in FLOW if name not in ("factory", "path")}
"""Options that describe the flow network to an adapter of exported files."""


@dataclass(frozen=True)
class Example:
    """A network behind an adapter.

    Attributes:
        adapter: Name of the adapter.
        options: Options except the file.
        write: Writes the network's file into a folder; None if there is no file.
        option: Option that takes the file.
        sampler: Makes the library's own sampler from the file and the guidance scale.
        steps: Numbers of steps at which the sampler is compared, coarse to fine.
        error: Relative error that the sampler must reach at the last of them.
        order: Factors between which the error falls from one number of steps to the next.
        other: A change of the options that makes another model.
        damaged: Start of the error for a file with other content, as a regular expression.
    """

    adapter: str
    options: dict[str, Any]
    write: Callable[[Path], Path]
    sampler: Callable[[Path, float], Sampler]
    option: str = "file"
    steps: tuple[int, int, int] = (50, 100, 200)
    error: float = 1e-2
    order: tuple[float, float] = (1.7, 2.3)
    other: dict[str, Any] = field(default_factory=lambda: {"data_range": 1.0})
    damaged: str = ""

    def build(self, file: Path, **changes: Any) -> Any:
        """Build the adapter after its configuration check."""
        return build(self.adapter, self.options | {self.option: str(file)} | changes)


def build(adapter: str, options: dict[str, Any]) -> Any:
    """Build an adapter after its configuration check, as commands do; None removes an option."""
    given = {name: value for name, value in options.items() if value is not None}
    plugins.load("models", adapter).check(given)
    model: ModelAdapter = plugins.build("models", adapter, given)
    return model


def _torch_module(options: dict[str, Any], network: nn.Module, sampler: Callable[[float], Sampler]) -> Example:
    return Example(
        "torch_module",
        options,
        write_weights(network),
        lambda file, scale: sampler(scale),
        option="weights",
        damaged="is damaged or not a file of torch.save",
    )


EXAMPLES = {
    "torch_module": _torch_module(
        FLOW, own_networks.Flow(), lambda scale: euler(own_networks.Flow().double(), lambda t: t, scale)
    ),
    "torch_module, reversed time": _torch_module(
        REVERSED,
        own_networks.ReversedFlow(),
        lambda scale: euler(own_networks.ReversedFlow().double(), lambda t: 1000 - 1000 * t, scale),
    ),
    "torch_module, noise prediction": _torch_module(
        NOISE, own_networks.Noise(COUNT), lambda scale: ddim(own_networks.Noise(COUNT).double(), scale)
    ),
    "torchscript": Example(
        "torchscript", FILE, write_torchscript, torchscript_euler, damaged="is not TorchScript: it holds no code"
    ),
    "onnx_session": Example("onnx_session", FILE, write_onnx, onnx_euler, damaged="is not an ONNX file"),
    "edm": Example(
        "edm",
        {"trust_pickle": True},
        write_pickle,
        lambda file, scale: heun(own_networks.Denoiser(**KWARGS), scale),
        steps=(20, 40, 200),
        error=1e-3,
        order=(3, 6),
        other={"sigma_max": 50},
        damaged="cannot be opened",
    ),
}
"""Every adapter of single networks. Pipelines of diffusers have their own list, ``tiny_pipelines.KINDS``."""
