"""One case of bench_memory.py, in a process of its own: python memory_case.py JSON. Prints the measurements as JSON.

The baseline is taken after imports, with model and pairs in memory and after one call of each kind, so that one-time
allocations of libraries are not counted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solvers import NSSolver
from solvers.distil.normal_equations import normal_equations
from solvers.distil.pair_field import PairField
from solvers.families import GridSolver
from solvers.families.euler import Euler
from solvers.field import FunctionField
from solvers.grids import Grid
from solvers.losses import psnr_loss
from solvers.schedulers import CondOT


@dataclass(frozen=True)
class Case:
    """A step to measure.

    Attributes:
        model: 'digits' (the zoo's, states 1 x 8 x 8) or 'conv' (random weights, states 3 x 32 x 32).
        method: 'adam', 'adam, checkpointed', or 'levenberg-marquardt'.
        nfe: Evaluations per sample.
        batch: Pairs per step.
        memory_bytes: Budget of the normal equations; 0 for Adam.
    """

    model: str
    method: str
    nfe: int
    batch: int
    memory_bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """Memory of a step above the baseline, and its duration.

    Attributes:
        peak_rss: Peak of resident memory, bytes.
        peak_tensors: Most bytes of tensors alive at once.
        held: Bytes of tensors alive between forward and backward pass; None without a backward pass.
        seconds: Duration of the step, without the tracking of tensors.
    """

    peak_rss: int
    peak_tensors: int
    held: int | None
    seconds: float


class ResidualBlock(nn.Module):
    """Two normalised convolutions; the input of the second is shifted by a function of time."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.shift = nn.Linear(1, width)
        self.second = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.second(self.first(x) + self.shift(t)[:, :, None, None])


class ConvNet(nn.Module):
    """A residual convolutional network at full resolution, whose activations dwarf its states and weights."""

    def __init__(self, width: int = 24, depth: int = 3):
        super().__init__()
        self.inward = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.outward = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.to(x.dtype).expand(len(x), 1)
        hidden = self.inward(x)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.outward(hidden)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors that were made while it is active. A context manager.

    Attributes:
        peak: Largest number of bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # A view of an input does not add memory.
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in inputs:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        return sum(size for _, size in self.storages.values())


def pair_field_of(model: str) -> tuple[PairField, tuple[int, ...]]:
    """The model's field as a function of the rows, and the shape of a state."""
    if model == "digits":
        from orchestrator.models.zoo import ZooModel

        zoo = ZooModel("digits_fm_ot")
        return lambda rows: zoo.field(rows % 10, 1.0), zoo.shape
    net = ConvNet().requires_grad_(False).eval()
    field = FunctionField(net, CondOT())
    return lambda rows: field, (3, 32, 32)


def step_of(case: Case, pair_field: PairField, x0: Tensor, x1: Tensor) -> Callable[[LiveTensors | None], int | None]:
    """A function that runs one step as a host does and returns the bytes held before the backward pass."""
    start = GridSolver(Euler(), case.nfe, Grid()).to_ns(CondOT()).flat()

    def adam(live: LiveTensors | None) -> int | None:
        flat = start.clone().requires_grad_()
        field = pair_field(torch.arange(len(x0)))
        sample = NSSolver.from_flat(flat).sample(field, x0, checkpoint=case.method == "adam, checkpointed")
        loss = psnr_loss(sample, x1).double().sum()
        held = live.alive() if live is not None else None
        torch.autograd.grad(loss, flat)
        return held

    def levenberg_marquardt(live: LiveTensors | None) -> None:
        normal_equations(NSSolver.from_flat(start), pair_field, x0, x1, memory_bytes=case.memory_bytes)

    return levenberg_marquardt if case.method == "levenberg-marquardt" else adam


def status(name: str) -> int:
    """A value of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(case: Case) -> Measured:
    """Warm up on one pair, then run the step twice: for memory and time, and again with its tensors tracked."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pair_field, shape = pair_field_of(case.model)
    x0, x1 = torch.randn(case.batch, *shape), torch.randn(case.batch, *shape)
    step_of(Case(case.model, case.method, 1, 1, 2**30), pair_field, x0[:1], x1[:1])(None)
    step = step_of(case, pair_field, x0, x1)
    # The peak so far is that of the imports. This resets VmHWM and getrusage's ru_maxrss.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    baseline = status("VmRSS")
    begin = time.perf_counter()
    step(None)
    seconds = time.perf_counter() - begin
    peak = status("VmHWM") - baseline
    with LiveTensors() as live:
        held = step(live)
    return Measured(peak, live.peak, held, seconds)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Case(**json.loads(sys.argv[1]))))))
