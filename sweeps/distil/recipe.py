"""The recipe: examination, pairs, race, distillation and comparison, each paid from one budget; resumable."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import replace

from orchestrator.errors import UserError
from orchestrator.export.beginnings import beginning_for
from orchestrator.hosts.distillation import mean_psnr
from orchestrator.hosts.network_check import EVALUATIONS as CHECK_EVALUATIONS
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.timing import Timing
from orchestrator.pool.requests import Request
from orchestrator.results.bill import guided
from solvers.grids import Grid
from sweeps.artifact import theta_artifact
from sweeps.distil.budget import REPORT_SAMPLES, Budget
from sweeps.distil.family import Learned
from sweeps.distil.journal import Journal, RecordedPool, folder
from sweeps.distil.learning import Learner
from sweeps.distil.outcome import Distilled, DistilOutcome
from sweeps.distil.pair_sets import Level, PairSets
from sweeps.distil.place import Place
from sweeps.distil.plan import (
    ADAPTIVE,
    PER_PAIR,
    RACE_PAIRS,
    RACE_SHARE,
    TIMED,
    TIMING,
    Plan,
    distillation,
    make_plan,
    wanted_sizes,
)
from sweeps.distil.settings import DistilSettings
from sweeps.distil.starts import choose_starts, shortlist
from sweeps.examination import Subject, check_teacher, examine
from sweeps.point import SolverChoice
from sweeps.race import Candidate

EXAMINED = 1e-5
"""Tolerance at which an examination makes ground truth."""

FIRST_TRAIN = 32
"""Training pairs at the beginning; more of the planned ones are made as batches grow."""


def distil(
    place: Place,
    settings: DistilSettings,
    on_spend: Callable[[int], object] = lambda evaluations: None,
    on_plan: Callable[[Plan], object] = lambda plan: None,
) -> DistilOutcome:
    """Distil one theta per NFE. What an earlier command with equal settings has done in this storage is not repeated.

    Args:
        place: Where it runs.
        settings: What is asked.
        on_spend: Receives velocity evaluations as they are spent, for a progress bar; those of a resumed distillation
            come at once.
        on_plan: Receives the plan once an evaluation has been timed, before anything else is spent.

    Raises:
        UserError: The budget is too small for anything, the teacher is refused, or the model cannot be distilled.
    """
    return _Recipe(place, settings, on_spend, on_plan).run()


class _Recipe:
    """One run of the recipe, see :func:`distil`."""

    def __init__(
        self,
        place: Place,
        settings: DistilSettings,
        on_spend: Callable[[int], object],
        on_plan: Callable[[Plan], object],
    ):
        asked = settings.beginning
        self.learned = Learned(
            beginning=beginning_for(place.facts) if asked == "auto" else asked,
            guidance_scales=settings.guidance_scales,
        )
        self.place, self.settings, self.on_plan = place, settings, on_plan
        self.budget = Budget(settings.budget, place.facts.forwards_per_evaluation, on_spend)
        self.journal = Journal(place.storage, folder(place, settings))
        self.pairs = PairSets(place, self.learned.scales, settings.seed, self.budget)
        # The scale in the middle stands for a range, where one solver must do for all.
        self.scale = self.learned.scales[len(self.learned.scales) // 2]

    def run(self) -> DistilOutcome:
        place, settings = self.place, self.settings
        place.need([self.journal.folder])
        timing = self._time()
        plan = self._plan(timing, None)
        plan.check()
        self.on_plan(plan)
        plan = self._plan(timing, self._examine(plan))
        plan.check()
        # The report is paid in advance, so that the distillation leaves enough for it.
        self.budget.spend(
            "report", "samples to look at", 2 * REPORT_SAMPLES * sum(settings.nfe), guidance_scale=self.scale
        )
        level = replace(plan.level, train=min(plan.training_pairs, FIRST_TRAIN))
        self.pairs.ensure(level)
        self.pairs.truth(level)
        self._check_rest(plan)
        results = {}
        for position, nfe in enumerate(settings.nfe):
            results[nfe], level = self._distil(plan, level, settings.nfe[position:])
        return DistilOutcome(
            results=results,
            bill=self.budget.bill(),
            plan=plan,
            truths=self.pairs.truths[level.tolerance],
            key=self.journal.folder,
        )

    def _check_rest(self, plan: Plan) -> None:
        """Refuse to go on if the pairs of this model have left too little, which shows only once they are made."""
        if self.budget.left < plan.least_after_pairs:
            raise UserError(
                f"the ground-truth pairs of {self.place.facts.name} took more evaluations than models usually need, "
                f"and {max(0, self.budget.left):,.0f} of {plan.limit:,} are left; give a budget of at least "
                f"{self.budget.spent + plan.least_after_pairs:,}, which uses these pairs"
            )

    # ---- before the distillation ------------------------------------------------------------------------------

    def _time(self) -> Timing:
        """Time an evaluation, once."""
        content = self.journal.read("timing")
        reused = content is not None
        begin = time.monotonic()
        if content is None:
            timing = self.place.pool.call(
                Request.of(
                    HostProtocol.time_evaluation,
                    conditioning=self.place.conditioning.model_dump(),
                    guidance_scale=self.scale,
                    batch_sizes=TIMED,
                )
            )
            content = {"timing": dataclasses.asdict(timing), "seconds": time.monotonic() - begin}
            self.journal.write("timing", content)
        values = content["timing"]
        timing = Timing(**values | {"seconds": {int(size): s for size, s in values["seconds"].items()}})
        self.budget.spend(
            "examination",
            "an evaluation is timed",
            TIMING,
            guidance_scale=self.scale,
            seconds=content["seconds"],
            reused=reused,
        )
        return timing

    def _plan(self, timing: Timing, per_pair: dict[float, int] | None) -> Plan:
        return make_plan(
            self.place.facts,
            self.settings,
            learned=self.learned,
            timing=timing,
            hosts=self.place.hosts,
            memory_bytes=self.place.memory_bytes,
            per_pair=per_pair,
        )

    def _examine(self, plan: Plan) -> dict[float, int] | None:
        """Examine the teacher at each guidance scale; returns the evaluations of a pair, if they were measured."""
        place = self.place
        checked = place.hosts * CHECK_EVALUATIONS
        self.budget.spend("examination", "each host checks the network", checked, guidance_scale=self.scale)
        # Of one seed, so that what an examination costs does not depend on who was first to ask for it.
        scales = self.settings.guidance_scales
        specs = [self.pairs.spec("train", scale, EXAMINED, plan.training_pairs, seed=0) for scale in scales]
        measured = 0
        for subject in map(Subject.of, specs):
            examination = examine(place.storage, place.pool, place.facts, subject)
            evidence = examination.evidence
            self.budget.spend(
                "examination",
                f"the teacher is looked at{guided(subject.guidance_scale)}",
                round(evidence.evaluations * evidence.samples),
                guidance_scale=subject.guidance_scale,
                seconds=evidence.seconds,
                reused=examination.stored,
            )
            measured = max(measured, evidence.truth_evaluations or 0)
        check_teacher(place.storage, place.pool, place.facts, specs, force=place.force, announce=place.announce)
        if not measured:
            return None
        return scaled_costs(EXAMINED, measured)

    # ---- one NFE ----------------------------------------------------------------------------------------------

    def _distil(self, plan: Plan, level: Level, nfes: tuple[int, ...]) -> tuple[Distilled, Level]:
        """Distil the first of these NFEs, for which a share of the budget is left; returns the pairs in use, too."""
        place, nfe = self.place, nfes[0]
        dimensions = math.prod(place.facts.shape)
        expected = [distillation(n, wanted_sizes(self.learned, n, dimensions)) for n in nfes]
        share = self.budget.left * expected[0] / sum(expected)
        limit = self.budget.spent + share - self._comparison(level, nfe)
        candidates, fixed = self._race(level, nfe, share)
        learner = Learner(
            place,
            nfe=nfe,
            learned=self.learned,
            seed=self.settings.seed,
            sizes=replace(wanted_sizes(self.learned, nfe, dimensions), train=plan.training_pairs),
            level=level,
            pairs=self.pairs,
            budget=self.budget,
            limit=limit,
            journal=self.journal,
        )
        progress = learner.distil(candidates)
        level, best = learner.level, progress.best
        start = candidates[progress.starts[0]].choice
        fixed_db = self._compare(level, fixed, nfe)
        by_scale = dict(zip(self.learned.scales, best["each_psnr_db"], strict=True))
        notes = list(progress.notes)
        if fixed_db > best["psnr_db"]:
            notes.append(f"the fixed solver {fixed.choice.label} is better than theta; give a larger budget")
        artifact = theta_artifact(
            place.facts,
            place.pool,
            learner.solver(best["parameters"]),
            family=self.learned.name,
            start=f"{start.label} on the {start.grid.label} grid",
            guidance_scale=self.scale,
            sigma0=1.0,
            pairs=", ".join(self.pairs.names("train", level).values()),
            validation_psnr_db=best["psnr_db"],
            validation_psnr_db_by_scale={} if self.learned.guidance_range is None else by_scale,
        )
        assert progress.status is not None
        distilled = Distilled(
            nfe=nfe,
            artifact=artifact,
            psnr_db=best["psnr_db"],
            best_fixed=fixed.choice,
            best_fixed_psnr_db=fixed_db,
            start=start,
            start_psnr_db=progress.start_psnr_db,
            history=progress.history,
            status=progress.status,
            training_pairs=level.train,
            validation=self.pairs.names("validation", level),
            train=self.pairs.names("train", level),
            notes=notes,
        )
        return distilled, level

    def _race(self, level: Level, nfe: int, share: float) -> tuple[list[Candidate], Candidate]:
        """The solvers to start from, best first, and the best fixed solver."""
        scheduler, name = self.place.facts.scheduler, f"race-nfe{nfe}"
        content = self.journal.read(name)
        reused = content is not None
        begin = time.monotonic()
        if content is None:
            least = 2 * nfe * len(shortlist(nfe, scheduler))  # two pairs
            starts, baseline, spent = choose_starts(
                nfe,
                scheduler,
                self.pairs.names("train", level)[self.scale],
                pool=RecordedPool(self.place.pool, self.journal, f"{name}-round"),
                last_pairs=min(RACE_PAIRS, level.train),
                most_evaluations=None if math.isinf(share) else max(int(RACE_SHARE * share), least),
            )
            raced = [*starts, *([] if baseline is None else [baseline])]  # the baseline is the last one
            choices = [dataclasses.asdict(candidate.choice) for candidate in raced]
            content = {"raced": choices, "evaluations": spent, "seconds": time.monotonic() - begin}
            self.journal.write(name, content)
        self.budget.spend(
            "grid search",
            f"race of fixed solvers at NFE {nfe}",
            content["evaluations"],
            guidance_scale=self.scale,
            seconds=content["seconds"],
            reused=reused,
        )
        if len(content["raced"]) < 2:
            raise UserError(
                f"no fixed solver gives finite samples at NFE {nfe}, so that a distillation has no start; check the "
                f"model with `bespoke check`, or take another NFE"
            )
        solvers = [SolverChoice(**choice | {"grid": Grid(**choice["grid"])}) for choice in content["raced"]]
        *close, fixed = [Candidate(choice=own, solver=own.solver(nfe, 1.0).to_ns(scheduler)) for own in solvers]
        return close, fixed

    def _comparison(self, level: Level, nfe: int) -> int:
        """Evaluations of a fixed solver on the validation pairs."""
        return level.validation * nfe * len(self.pairs.scales)

    def _compare(self, level: Level, fixed: Candidate, nfe: int) -> float:
        """PSNR of a fixed solver on the validation pairs, dB."""
        name = f"fixed-nfe{nfe}"
        content = self.journal.read(name)
        reused = content is not None
        begin = time.monotonic()
        if content is None:
            pairs = self.pairs.names("validation", level).values()
            values = [mean_psnr(fixed.solver, pair_set, self.place.pool.gather) for pair_set in pairs]
            content = {"psnr_db": sum(values) / len(values), "seconds": time.monotonic() - begin}
            self.journal.write(name, content)
        self.budget.spend(
            "validation",
            "best fixed solver",
            self._comparison(level, nfe),
            guidance_scale=self.scale,
            seconds=content["seconds"],
            reused=reused,
        )
        return float(content["psnr_db"])


def scaled_costs(tolerance: float, measured: int) -> dict[float, int]:
    """Evaluations of a pair by tolerance, from those of an adaptive solution at one of them."""
    return {other: round(measured * cost / ADAPTIVE[tolerance]) for other, cost in PER_PAIR.items()}
