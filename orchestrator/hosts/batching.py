"""Losses and gradients of several theta from one model batch, and the measurement that decides when this pays off.

A small batch leaves most of a device idle, so answering several requests in one batch is nearly free. A large model or
a large batch already fills the device, and batching gains nothing. The break-even point is measured once per shape and
number of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.hosts.lockstep import Requests
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.runs import BATCHED_OBJECTIVE
from orchestrator.pairs import Condition, PairSet, concatenate
from orchestrator.pool.requests import Request
from solvers.batched import sample_batched
from solvers.field import VelocityField
from solvers.losses import psnr_loss

BATCHED_METHOD = HostProtocol.loss_and_gradient.__name__
"""The only method whose requests are batched, for one objective (``BATCHED_OBJECTIVE``)."""

GAIN = 0.95
"""A larger batch is preferred if its time per sample is below this share of the smaller one's."""

REPEATS = 5
"""Timings per batch size, of which the fastest counts."""

SummedLossAndGradient = tuple[float, npt.NDArray[np.float64]]


class Shape(NamedTuple):
    """What the duration of a network call depends on: the number of pairs per theta, and the guidance scale."""

    pairs: int
    guidance_scale: float


@dataclass
class BatchingStatistics:
    """Counts and timings of a host's batched requests.

    Attributes:
        requests: Requests for a loss and gradient that arrived together with others and could be batched.
        batched: Those that were answered in a model batch with others.
        batches: Number of these model batches.
        out_of_memory: Batches that did not fit in memory and were split.
        seconds_per_sample: Measured duration of a velocity and its backward pass, by shape and number of theta; s.
    """

    requests: int = 0
    batched: int = 0
    batches: int = 0
    out_of_memory: int = 0
    seconds_per_sample: dict[Shape, dict[int, float]] = field(default_factory=dict)


class Batching:
    """Answers several requests to one frozen model, in batches if these are faster.

    Args:
        answer_one: Answers one request.
        select: ``select(name, indices)`` returns the guidance scale of a pair set, and its pairs at these indices on
            the device.
        velocity: ``velocity(condition, guidance_scale)`` is the model's field for a batch.
    """

    def __init__(
        self,
        answer_one: Callable[[Request[Any]], Any],
        select: Callable[[str, Sequence[int]], tuple[float, PairSet]],
        velocity: Callable[[Condition, float], VelocityField],
    ):
        self.answer_one, self.select, self.velocity = answer_one, select, velocity
        self.statistics = BatchingStatistics()

    def answer(self, groups: Sequence[Requests]) -> list[list[Any]]:
        """Answers to the requests of each group, in order."""
        answers: list[list[Any]] = [[None] * len(group) for group in groups]
        batchable: dict[tuple[int, Shape], list[_BatchableRequest]] = {}
        for i, group in enumerate(groups):
            for j, request in enumerate(group):
                if len(groups) > 1 and _can_be_batched(request):
                    arguments = request.arguments
                    guidance_scale, pairs = self.select(arguments["pairs"], arguments["indices"])
                    shape = Shape(len(pairs), guidance_scale)
                    of_shape = batchable.setdefault((len(arguments["theta"]), shape), [])
                    of_shape.append(_BatchableRequest((i, j), request, pairs))
                else:
                    answers[i][j] = self.answer_one(request)
        for (_, shape), requests in batchable.items():
            for batched, answer in zip(requests, self._answer_batchable(shape, requests), strict=True):
                i, j = batched.position
                answers[i][j] = answer
        return answers

    def _answer_batchable(self, shape: Shape, requests: list[_BatchableRequest]) -> list[SummedLossAndGradient]:
        """Losses and gradients of requests with theta of one NFE and pairs of one shape."""
        self.statistics.requests += len(requests)
        parts = -(-len(requests) // self._batch_size(shape, requests))
        answers: list[SummedLossAndGradient] = []
        for part in np.array_split(np.arange(len(requests)), parts):
            answers += self._answer_part(shape, [requests[i] for i in part])
        return answers

    def _answer_part(self, shape: Shape, requests: list[_BatchableRequest]) -> list[SummedLossAndGradient]:
        if len(requests) == 1:
            return [self.answer_one(requests[0].request)]
        try:
            answers = self._answer_batch(shape, requests)
        except torch.OutOfMemoryError:
            # The timed call holds the activations of one evaluation, a distillation step those of all evaluations.
            self.statistics.out_of_memory += 1
            self.statistics.seconds_per_sample[shape][_sizes(len(requests))[-1]] = float("inf")
            half = len(requests) // 2
            return self._answer_part(shape, requests[:half]) + self._answer_part(shape, requests[half:])
        self.statistics.batched += len(requests)
        self.statistics.batches += 1
        return answers

    def _answer_batch(self, shape: Shape, requests: list[_BatchableRequest]) -> list[SummedLossAndGradient]:
        """Answer requests by one model batch and one backward pass."""
        flats = np.stack([batched.request.arguments["theta"] for batched in requests])
        thetas = torch.from_numpy(flats).requires_grad_(True)
        batch = concatenate([request.pairs for request in requests])
        x0 = batch.x0.unflatten(0, (len(requests), shape.pairs))
        samples = sample_batched(thetas, self.velocity(batch.condition, shape.guidance_scale), x0)
        per_pair = psnr_loss(batch.counted(samples.flatten(0, 1)), batch.counted(batch.x1)).to(torch.float64)
        losses = per_pair.view(len(requests), shape.pairs).sum(dim=1)
        (gradients,) = torch.autograd.grad(losses.sum(), thetas)
        return list(zip(losses.tolist(), gradients.numpy(), strict=True))

    # ---- when batching pays off -------------------------------------------------------------------------------------

    def _batch_size(self, shape: Shape, requests: list[_BatchableRequest]) -> int:
        """Requests per batch: the smallest number beyond which the time per sample no longer falls."""
        seconds = self.statistics.seconds_per_sample.setdefault(shape, {})
        sizes = _sizes(len(requests))
        for size in sizes:
            if size not in seconds:
                seconds[size] = self._seconds_per_sample(shape, requests[:size])
        best = sizes[0]
        for size in sizes[1:]:
            if seconds[size] < GAIN * seconds[best]:
                best = size
        # Only powers of two are measured. If the largest of them is best, all requests run as one batch.
        return len(requests) if len(requests) > 1 and best == sizes[-1] else best

    def _seconds_per_sample(self, shape: Shape, requests: list[_BatchableRequest]) -> float:
        """Shortest duration of one velocity and its backward pass, per sample; s."""
        batch = concatenate([request.pairs for request in requests])
        # On a CPU, use the thread's own time, so that other processes on a busy machine do not count.
        clock = time.thread_time if batch.x0.device.type == "cpu" else time.perf_counter
        velocity = self.velocity(batch.condition, shape.guidance_scale)
        scheduler = velocity.scheduler
        middle = torch.full((len(batch),), (scheduler.t_min + scheduler.t_max) / 2, dtype=torch.float64)
        timings = []
        try:
            for _ in range(1 + REPEATS):
                start = clock()
                x = batch.x0.clone().requires_grad_(True)
                (gradient,) = torch.autograd.grad(velocity(x, middle).sum(), x)
                gradient.sum().item()  # waits for the device
                timings.append(clock() - start)
        except torch.OutOfMemoryError:
            return float("inf")
        return min(timings[1:]) / len(batch)  # the first is a warm-up


@dataclass(frozen=True)
class _BatchableRequest:
    """A request for a loss and gradient that can be batched.

    Attributes:
        position: Index of its group, and its index in the group.
        request: The request.
        pairs: The pairs, on the device.
    """

    position: tuple[int, int]
    request: Request[Any]
    pairs: PairSet


def _can_be_batched(request: Request[Any]) -> bool:
    return (
        request.method == BATCHED_METHOD
        and request.arguments.get("objective", BATCHED_OBJECTIVE) == BATCHED_OBJECTIVE
        and not request.arguments.get("objective_options")
    )


def _sizes(count: int) -> list[int]:
    """1, 2, 4, ... up to ``count``."""
    return [2**power for power in range(count.bit_length())]
