"""Losses and gradients of several theta from one model batch, and the measurement that says when this pays.

A small batch leaves most of a device idle: merging calls is then nearly free. A large model, or a large batch, fills it
already, and merging gains nothing. Which it is, is measured once for every size of batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.hosts.lockstep import Question
from orchestrator.pairs import PairSet, concatenate
from solvers.field import VelocityField
from solvers.losses import psnr_loss
from solvers.stacked import sample_stacked

MERGED_METHOD = "loss_and_gradient"
MERGED_OBJECTIVE = "psnr"
"""The one method and objective whose questions are merged."""

GAIN = 0.95
"""A larger batch must take less than this share of the smaller one's time per sample to be worth its memory."""

REPEATS = 5
"""Timings of one size, the best of which counts."""

LossAndGradient = tuple[float, npt.NDArray[np.float64]]


class Shape(NamedTuple):
    """What the time of a network call depends on: pairs of one theta, and the guidance scale."""

    pairs: int
    guidance_scale: float


@dataclass
class MergingStatistics:
    """What a host has merged.

    Attributes:
        questions: Losses and gradients that were asked for together with others.
        merged: Those of them that shared a model batch.
        batches: The batches they shared.
        out_of_memory: Batches that did not fit and were asked again in smaller ones.
        seconds_per_sample: Measured time of a velocity and its backward pass, by shape and by the number of theta.
    """

    questions: int = 0
    merged: int = 0
    batches: int = 0
    out_of_memory: int = 0
    seconds_per_sample: dict[Shape, dict[int, float]] = field(default_factory=dict)


class Merging:
    """Answers several questions about one frozen model, together where that pays.

    Args:
        ask: ``ask(method, arguments)``: the answer to one question.
        select: ``select(digest, indices)``: the guidance scale of a pair store, and these of its pairs on the device.
        velocity: ``velocity(condition, guidance_scale)``: the model's field for a batch.
    """

    def __init__(
        self,
        ask: Callable[[str, dict[str, Any]], Any],
        select: Callable[[str, Sequence[int]], tuple[float, PairSet]],
        velocity: Callable[[Tensor, float], VelocityField],
    ):
        self.ask, self.select, self.velocity = ask, select, velocity
        self.statistics = MergingStatistics()

    def answer(self, questions: Sequence[Question]) -> list[list[Any]]:
        """The answers to each question, one a call: those that can be merged in as few batches as pays."""
        answers: list[list[Any]] = [[None] * len(question.calls) for question in questions]
        groups: dict[tuple[int, Shape], list[_Call]] = {}
        for i, question in enumerate(questions):
            for j, arguments in enumerate(question.calls):
                if len(questions) > 1 and _can_be_merged(question.method, arguments):
                    guidance_scale, pairs = self.select(arguments["pairs"], arguments["indices"])
                    shape = Shape(len(pairs), guidance_scale)
                    call = _Call((i, j), arguments, pairs)
                    groups.setdefault((len(arguments["theta"]), shape), []).append(call)
                else:
                    answers[i][j] = self.ask(question.method, arguments)
        for (_, shape), calls in groups.items():
            for call, found in zip(calls, self._of_group(shape, calls), strict=True):
                i, j = call.place
                answers[i][j] = found
        return answers

    def _of_group(self, shape: Shape, calls: list[_Call]) -> list[LossAndGradient]:
        """Losses and gradients of theta of one NFE, each on as many pairs."""
        self.statistics.questions += len(calls)
        parts = -(-len(calls) // self._at_once(shape, calls))
        found: list[LossAndGradient] = []
        for part in np.array_split(np.arange(len(calls)), parts):
            found += self._of_part(shape, [calls[i] for i in part])
        return found

    def _of_part(self, shape: Shape, calls: list[_Call]) -> list[LossAndGradient]:
        if len(calls) == 1:
            return [self.ask(MERGED_METHOD, calls[0].arguments)]
        try:
            found = self._together(shape, calls)
        except torch.OutOfMemoryError:
            # The timed call holds one evaluation, a distillation step all of them.
            self.statistics.out_of_memory += 1
            self.statistics.seconds_per_sample[shape][_sizes(len(calls))[-1]] = float("inf")
            half = len(calls) // 2
            return self._of_part(shape, calls[:half]) + self._of_part(shape, calls[half:])
        self.statistics.merged += len(calls)
        self.statistics.batches += 1
        return found

    def _together(self, shape: Shape, calls: list[_Call]) -> list[LossAndGradient]:
        """One batch, one backward pass."""
        thetas = torch.from_numpy(np.stack([call.arguments["theta"] for call in calls])).requires_grad_(True)
        batch = concatenate([call.pairs for call in calls])
        x0 = batch.x0.unflatten(0, (len(calls), shape.pairs))
        samples = sample_stacked(thetas, self.velocity(batch.condition, shape.guidance_scale), x0)
        per_pair = psnr_loss(samples.flatten(0, 1), batch.x1).to(torch.float64)
        losses = per_pair.view(len(calls), shape.pairs).sum(dim=1)
        (gradients,) = torch.autograd.grad(losses.sum(), thetas)
        return list(zip(losses.tolist(), gradients.numpy(), strict=True))

    # ---- when it pays -----------------------------------------------------------------------------------------

    def _at_once(self, shape: Shape, calls: list[_Call]) -> int:
        """How many of these to merge: the least number beyond which a sample's time does not fall any more."""
        seconds = self.statistics.seconds_per_sample.setdefault(shape, {})
        sizes = _sizes(len(calls))
        for size in sizes:
            if size not in seconds:
                seconds[size] = self._seconds_per_sample(shape, calls[:size])
        best = sizes[0]
        for size in sizes[1:]:
            if seconds[size] < GAIN * seconds[best]:
                best = size
        # Sizes are measured at powers of two: what lies between the last one and all of them is not cut in two.
        return len(calls) if len(calls) > 1 and best == sizes[-1] else best

    def _seconds_per_sample(self, shape: Shape, calls: list[_Call]) -> float:
        """Best time of one velocity and its backward pass, divided by the number of samples; s."""
        batch = concatenate([call.pairs for call in calls])
        # On a CPU the thread's own time: what other processes take of a busy machine says nothing of the network.
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
class _Call:
    """One loss and gradient that is asked for: its question and call, its arguments, and its pairs on the device."""

    place: tuple[int, int]
    arguments: dict[str, Any]
    pairs: PairSet


def _can_be_merged(method: str, arguments: dict[str, Any]) -> bool:
    return (
        method == MERGED_METHOD
        and arguments.get("objective", MERGED_OBJECTIVE) == MERGED_OBJECTIVE
        and not arguments.get("objective_options")
    )


def _sizes(count: int) -> list[int]:
    """1, 2, 4, ... up to ``count``."""
    return [2**power for power in range(count.bit_length())]
