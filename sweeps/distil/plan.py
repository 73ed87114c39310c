"""What a distillation will take, before it begins; the smaller the budget, the fewer pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.errors import UserError
from orchestrator.hosts.network_check import EVALUATIONS as CHECK_EVALUATIONS
from orchestrator.hosts.teacher.probe import STEPS, batch_size
from orchestrator.hosts.timing import CALLS, Timing
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs.steps import SAMPLES
from orchestrator.progress import counted
from orchestrator.results.bill import Item, duration
from solvers.distil.normal_equations import Jacobian, evaluations_per_pair
from solvers.distil.sizes import Sizes, sizes
from sweeps.distil.budget import REPORT_SAMPLES
from sweeps.distil.family import Learned
from sweeps.distil.pair_sets import AGAIN, BATCH, Level
from sweeps.distil.settings import DistilSettings

TIMED = (BATCH, 4 * BATCH)
"""Batch sizes at which an evaluation is timed."""

TIMING = TIMED[0] + CALLS * sum(TIMED)
"""Most evaluations of that, which are charged. Short calls are repeated, depending on the machine's load; the budget,
and theta with it, must not depend on it."""

EXAMINATION = 36
"""Evaluations of an examination beside its trajectories, each of one batch: on the shipped models at most this."""

ADAPTIVE = {1e-3: 55, 1e-4: 85, 1e-5: 125}
"""Evaluations of dopri5 for a ground-truth pair by tolerance: those of the shipped models."""

PER_PAIR = {1e-3: 25, 1e-4: 40, 1e-5: 85}
"""Evaluations of a ground-truth pair on shared steps, before one is made (benchmarks/bench_shared_steps.py)."""

CHOICE = 4.0
"""Evaluations of the choice of steps, per pair on which they are chosen, as a multiple of those of a pair on them."""

FIRST_TOLERANCE, COARSE_TOLERANCE = 1e-4, 1e-3
"""Tolerance of ground truth at the beginning, and for a budget that is too small for it."""

PAIR_SHARE, VALIDATION_SHARE, RACE_SHARE = 0.25, 0.06, 0.06
"""Most shares of the budget for training pairs, for validation pairs, and for the race."""

RACE_PAIRS = 32
"""Most pairs of a race."""

CONVERGED, LEAST_ITERATIONS = 8, 4
"""Iterations of the largest batch that a distillation without a budget is expected to take, and iterations of the
first batches without which none is of any use."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a distillation will take.

    Attributes:
        training_pairs, validation_pairs: Pairs per guidance scale, unless overfitting asks for more.
        tolerance: Tolerance of ground truth at the beginning.
        evaluations: Expected velocity evaluations by item, each of one sample.
        limit: Velocity evaluations that may be spent; None: no limit.
        seconds_per_evaluation: Measured time of a velocity evaluation per sample, in the largest batch that was timed.
        hosts: Hosts that share the work.
        memory_bytes: Memory of a host's distillation step, beside the model.
        least: Velocity evaluations of the smallest distillation that is of any use.
        least_after_pairs: The part of these that follows the examination and the pairs.
    """

    training_pairs: int
    validation_pairs: int
    tolerance: float
    evaluations: dict[Item, int]
    limit: int | None
    seconds_per_evaluation: float
    hosts: int
    memory_bytes: int
    least: int
    least_after_pairs: int

    @property
    def total(self) -> int:
        """Expected velocity evaluations."""
        return sum(self.evaluations.values())

    @property
    def seconds(self) -> float:
        """Expected duration, if the hosts share all work."""
        return self.total * self.seconds_per_evaluation / self.hosts

    @property
    def level(self) -> Level:
        """The pairs as they are planned."""
        return Level(tolerance=self.tolerance, train=self.training_pairs, validation=self.validation_pairs)

    def check(self) -> None:
        """Refuse a budget that is too small.

        Raises:
            UserError: With the least budget that would do.
        """
        if self.limit is not None and self.limit < self.least:
            raise UserError(
                f"a budget of {self.limit:,} velocity evaluations is too small: the examination of the model, a few "
                f"pairs and the first steps of a distillation take {self.least:,}; give at least that, or leave the "
                f"budget out"
            )

    def sentence(self) -> str:
        """The plan as a sentence."""
        most = "" if self.limit is None else f" (at most {self.limit:,})"
        pairs = f"{counted(self.training_pairs, 'training pair')} and {self.validation_pairs:,} for validation"
        return (
            f"about {self.total:,} velocity evaluations{most}, {duration(self.seconds)} at "
            f"{1 / self.seconds_per_evaluation:,.4g} evaluations per second; {pairs}; "
            f"{self.memory_bytes / 1e6:,.0f} MB beside the model"
        )


def wanted_sizes(learned: Learned, nfe: int, dimensions: int) -> Sizes:
    """Numbers of pairs of a theta, per guidance scale."""
    return sizes(learned.numbers(nfe), dimensions, nfe)


def iteration(nfe: int, pairs: int, jacobian: Jacobian = "forward") -> int:
    """Evaluations of an iteration whose first step is taken."""
    return (evaluations_per_pair(nfe, jacobian) + nfe) * pairs


def distillation(nfe: int, chosen: Sizes) -> int:
    """Evaluations of a distillation until it has converged, per guidance scale."""
    largest = min(chosen.largest_batch, chosen.train)
    spent, batch = 0, float(chosen.first_batch)
    while batch < largest:
        spent += iteration(nfe, round(batch))
        batch *= chosen.batch_growth
    return spent + CONVERGED * iteration(nfe, largest)


def make_plan(
    facts: ModelFacts,
    settings: DistilSettings,
    *,
    learned: Learned,
    timing: Timing,
    hosts: int,
    memory_bytes: int,
    per_pair: dict[float, int] | None = None,
) -> Plan:
    """Plan a distillation.

    Args:
        facts: Facts of the model.
        settings: What is asked.
        learned: What is learned.
        timing: Measured time of an evaluation.
        hosts, memory_bytes: See :class:`Plan`.
        per_pair: Evaluations of a pair by tolerance; None: not measured yet.
    """
    dimensions = math.prod(facts.shape)
    pair = per_pair or PER_PAIR
    scales = len(learned.scales)
    wanted = [wanted_sizes(learned, nfe, dimensions) for nfe in settings.nfe]
    train, validation = max(chosen.train for chosen in wanted), max(chosen.validation for chosen in wanted)
    fixed = _fixed(facts, settings, hosts)
    smallest = _evaluations(settings.nfe, fixed, BATCH, BATCH, pair[COARSE_TOLERANCE], scales)
    for chosen, nfe in zip(wanted, settings.nfe, strict=True):
        smallest["grid search"] += 2 * 20 * nfe
        smallest["distillation"] += LEAST_ITERATIONS * iteration(nfe, chosen.first_batch) * scales
        smallest["validation"] += 3 * BATCH * nfe * scales
    tolerance = FIRST_TOLERANCE
    if settings.budget is not None:
        left = max(0, settings.budget - sum(fixed.values()))
        if PAIR_SHARE * left < 32 * scales * pair[FIRST_TOLERANCE]:
            tolerance = COARSE_TOLERANCE
        train = min(train, _floored(PAIR_SHARE * left / (scales * pair[tolerance])))
        validation = min(validation, _floored(VALIDATION_SHARE * left / (scales * pair[tolerance])))
    expected = _evaluations(settings.nfe, fixed, train, validation, pair[tolerance], scales)
    for chosen, nfe in zip(wanted, settings.nfe, strict=True):
        expected["grid search"] += 45 * nfe * 4
        expected["distillation"] += distillation(nfe, replace(chosen, train=max(train, chosen.first_batch))) * scales
        expected["validation"] += 20 * validation * nfe * scales
    if settings.budget is not None:
        rest = settings.budget - sum(value for item, value in expected.items() if item != "distillation")
        expected["distillation"] = max(0, min(expected["distillation"], rest))
    return Plan(
        training_pairs=train,
        validation_pairs=validation,
        tolerance=tolerance,
        evaluations=expected,
        limit=settings.budget,
        seconds_per_evaluation=timing.seconds[max(timing.seconds)],
        hosts=hosts,
        memory_bytes=memory_bytes,
        least=sum(smallest.values()),
        least_after_pairs=sum(smallest[item] for item in ("grid search", "distillation", "validation")),
    )


def _floored(pairs: float) -> int:
    return max(BATCH, math.floor(pairs / BATCH) * BATCH)


def _fixed(facts: ModelFacts, settings: DistilSettings, hosts: int) -> dict[Item, int]:
    """Evaluations that do not depend on the budget, by item."""
    examined = batch_size(math.prod(facts.shape))
    batches = sum(STEPS["plain"] + EXAMINATION + (scale != 1) * STEPS["guided"] for scale in settings.guidance_scales)
    return {
        "examination": hosts * CHECK_EVALUATIONS + TIMING + batches * examined,
        "report": 2 * REPORT_SAMPLES * sum(settings.nfe),
    }


def _evaluations(
    nfes: Sequence[int], fixed: dict[Item, int], train: int, validation: int, per_pair: int, scales: int
) -> dict[Item, int]:
    """Evaluations by item, without the race, distillation and validation of theta."""
    again = 2 * AGAIN * per_pair * scales
    choice = round(CHOICE * SAMPLES * per_pair) * scales
    return {
        "examination": fixed["examination"] + again,
        "pairs": (train + validation) * per_pair * scales + choice,
        "grid search": sum(nfes) * validation * scales,
        "distillation": 0,
        "validation": 0,
        "report": fixed["report"],
    }
