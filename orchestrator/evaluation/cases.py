"""What an evaluation measures, and what it finds: cases and their scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.evaluation.solvers import GROUND_TRUTH, EvaluatedSolver
from orchestrator.metrics.base import Summary
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.pairs import PairSpec


@dataclass(frozen=True, kw_only=True)
class Case:
    """One solver to evaluate on one dataset.

    Attributes:
        solver: The solver.
        dataset: Name of the dataset in tables.
        pairs: Spec of the pair set that the solver is evaluated on.
    """

    solver: EvaluatedSolver
    dataset: str
    pairs: PairSpec


@dataclass(frozen=True, kw_only=True)
class Score:
    """The value of one metric for one solver on one dataset.

    Attributes:
        case: The solver and the dataset.
        metric: The metric.
        summary: The value, with its standard error and sample counts.
        nfe: Evaluations per sample; for ground truth, the mean over its samples.
        not_finite: Indices of samples that are not finite; the first ten only.
        failure: Why the value is missing, or None.
        footnote: Why the value is marked: ground truth's own error decides it; None if it is not.
        reference: What a distance between distributions compares samples with, for people; empty for other metrics.
        is_exact: Whether it is the best by definition: ground truth, compared with itself.
    """

    case: Case
    metric: MetricSpec
    summary: Summary
    nfe: float
    not_finite: tuple[int, ...] = ()
    failure: str | None = None
    footnote: str | None = None
    reference: str = ""
    is_exact: bool = False


def truth_of(case: Case) -> Case:
    """Ground truth of the pairs of a case."""
    return replace(case, solver=EvaluatedSolver(kind="ground truth", name=GROUND_TRUTH, guidance_scale=1.0))
