"""Facts about the ground truth of a pair set, among them its own error."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.metrics.base import EXACT_DB
from orchestrator.pairs import PairSet, PairSpec
from orchestrator.pairs.accuracy import PATIENCE, accuracy
from solvers.field import VelocityField


@dataclass(frozen=True, kw_only=True)
class TruthFacts:
    """Facts about the ground truth of some pairs.

    Attributes:
        low, high: Smallest and largest value.
        mean, std: Mean and standard deviation over all values of all samples.
        nfe: Velocity evaluations per pair, averaged over the pairs.
        accuracy_db: PSNR of ground truth itself, dB, from the first pairs solved again at a tenth of the tolerance;
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
    measured = accuracy(velocity, first.x0, first.x1, spec.rtol, spec.atol, limit=limit, mask=first.mask)
    values = (pairs.x1 if pairs.mask is None else pairs.x1[pairs.mask.expand_as(pairs.x1)]).double()
    return TruthFacts(
        low=float(values.min()),
        high=float(values.max()),
        mean=float(values.mean()),
        std=float(values.std(correction=0)),
        nfe=float(pairs.nfe.double().mean()),
        accuracy_db=measured.psnr_db(data_range, EXACT_DB),
        problem=measured.problem,
        again=len(first),
        evaluations=measured.evaluations,
        forwards=measured.evaluations * forwards_per_evaluation,
    )
