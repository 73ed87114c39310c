"""A network for benchmarks and tests that imitates a large model: many dimensions, and calls of a fixed duration.

Every coordinate of the data is a mixture of two normal distributions, so that the velocity is known in closed form and
takes little time; the rest of a call is slept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

MODE, WIDTH = 0.7, 0.2
"""The data are at plus and minus ``MODE``, with a standard deviation of ``WIDTH``."""


@dataclass
class Meter:
    """Calls of the network in this process so far.

    Attributes:
        calls, samples: Calls, and the samples in them.
        seconds, cpu_seconds: Wall time and CPU time spent in calls.
    """

    calls: int = 0
    samples: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class HalfSecond(nn.Module):
    """The velocity E[x1 - x0 | x_t] on the straight path from noise to data.

    Args:
        duration: Seconds that a call takes at least.

    Attributes:
        meter: Counts the calls of all networks in this process.
    """

    meter: ClassVar[Meter] = Meter()

    def __init__(self, duration: float = 0.5):
        super().__init__()
        self.duration = duration
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        begin, cpu = time.perf_counter(), time.process_time()
        t = t.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
        variance = (t * WIDTH) ** 2 + (1 - t) ** 2
        mode = torch.tanh(MODE * t / variance * x).mul_(MODE * self.scale)
        slope = (t * WIDTH**2 - (1 - t)) / variance
        velocity = mode.mul_(1 - slope * t).add_(x * slope)
        time.sleep(max(0.0, self.duration - (time.perf_counter() - begin)))
        self.meter.calls += 1
        self.meter.samples += len(x)
        self.meter.seconds += time.perf_counter() - begin
        self.meter.cpu_seconds += time.process_time() - cpu
        return velocity
