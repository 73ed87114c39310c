"""Ground truth on a host: pairs, steps for a pair set, and facts about its pairs, among them their own error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.hosts.conditioning import dataset_of, drawn
from orchestrator.metrics.base import EXACT_DB
from orchestrator.models.base import ModelAdapter
from orchestrator.pairs import Condition, PairSet, PairSpec
from orchestrator.pairs.accuracy import PATIENCE, accuracy
from orchestrator.pairs.ground_truth import solve, solve_on_steps
from orchestrator.pairs.steps import ChosenSteps, choose_steps
from orchestrator.randomness import noise
from solvers.field import VelocityField

FieldOf = Callable[[Condition, float], VelocityField]
"""``field(condition, guidance_scale)`` returns the velocity field of a batch."""


@dataclass(frozen=True, kw_only=True)
class TruthFacts:
    """Facts about the ground truth of some pairs.

    Attributes:
        low, high: Smallest and largest value.
        mean, std: Mean and standard deviation over all values of all samples.
        nfe: Velocity evaluations per pair, averaged over the pairs.
        accuracy_db: PSNR of ground truth itself, dB, from the first pairs solved again more accurately;
            None if that failed.
        problem: Why ``accuracy_db`` is None; None if it is not.
        again: Number of pairs solved again.
        evaluations, forwards: Velocity evaluations, and forwards of the network, spent on them.
    """

    low: float
    high: float
    mean: float
    std: float
    nfe: float
    accuracy_db: float | None
    problem: str | None
    again: int
    evaluations: int
    forwards: int


def truth_facts(
    spec: PairSpec,
    pairs: PairSet,
    first: PairSet,
    velocity: VelocityField,
    data_range: float,
    forwards_per_evaluation: int,
) -> TruthFacts:
    """Facts about the ground truth of ``pairs``; the few pairs ``first`` are solved again.

    Args:
        spec: Spec of the pairs.
        pairs: All pairs.
        first: The pairs to solve again, on the device of the model.
        velocity: The field of ``first``.
        data_range: Largest minus smallest value of the data.
        forwards_per_evaluation: Forwards of the network per velocity evaluation.
    """
    limit = PATIENCE * int(first.nfe.max())
    measured = accuracy(
        velocity, first.x0, first.x1, spec.rtol, spec.atol, limit=limit, mask=first.mask, steps=spec.steps
    )
    # In float64 one pair at a time: a set may fill half of the memory.
    counts, sums, squares, ends = 0, 0.0, 0.0, []
    for index in range(len(pairs)):
        x1 = pairs.x1[index]
        values = (x1 if pairs.mask is None else x1[pairs.mask[index].expand_as(x1)]).double()
        counts, sums, squares = (
            counts + values.numel(),
            sums + float(values.sum()),
            squares + float(values.square().sum()),
        )
        ends += [float(end) for end in values.aminmax()] if values.numel() else []
    mean = sums / counts
    return TruthFacts(
        low=min(ends),
        high=max(ends),
        mean=mean,
        std=math.sqrt(max(0.0, squares / counts - mean**2)),
        nfe=float(pairs.nfe.double().mean()),
        accuracy_db=measured.psnr_db(data_range, EXACT_DB),
        problem=measured.problem,
        again=len(first),
        evaluations=measured.evaluations,
        forwards=measured.evaluations * forwards_per_evaluation,
    )


def solve_pairs(spec: PairSpec, indices: Sequence[int], model: ModelAdapter, field_of: FieldOf, device: str) -> PairSet:
    """The pairs of one solver batch of a spec, on the CPU."""
    x0, stored, _, field = _batch(spec, indices, model, field_of, device)
    if spec.steps is None:
        solution = solve(field, x0, spec.rtol, spec.atol, keep_path=spec.trajectory)
    else:
        solution = solve_on_steps(field, x0, spec.steps, keep_path=spec.trajectory)
    spent = torch.full((len(indices),), solution.nfe, dtype=torch.int32)
    return PairSet(x0, solution.x1.float(), stored, spent, solution.path).to("cpu")


def steps_for(spec: PairSpec, samples: int, model: ModelAdapter, field_of: FieldOf, device: str) -> ChosenSteps:
    """Steps for a spec, chosen on its first pairs (:func:`orchestrator.pairs.steps.choose_steps`)."""
    x0, _, mask, field = _batch(spec, range(samples), model, field_of, device)
    return choose_steps(field, x0, spec.rtol, spec.atol, mask=mask)


def _batch(
    spec: PairSpec, indices: Sequence[int], model: ModelAdapter, field_of: FieldOf, device: str
) -> tuple[Tensor, Tensor, Tensor | None, VelocityField]:
    """Noise, stored conditions, mask and field of these pairs, on the device but for the stored conditions."""
    dataset = dataset_of(spec)
    x0 = torch.from_numpy(noise(spec.seed, indices, spec.shape))
    stored, condition = drawn(model, dataset, spec.seed, indices)
    mask = dataset.mask_of(stored.numpy(), spec.shape) if dataset.named else None
    field = field_of(condition.to(device), spec.guidance_scale)
    return x0.to(device), stored, None if mask is None else mask.to(device), field
