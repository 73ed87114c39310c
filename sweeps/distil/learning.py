"""Distils one theta from the best starts of a race: validation decides when it ends and when it needs more pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean as mean
from typing import Any, Literal

from orchestrator.errors import UserError
from orchestrator.hosts.distillation import advance, mean_psnr
from orchestrator.hosts.runs import AtScale, LearnedRun
from orchestrator.pairs.steps import SAMPLES
from orchestrator.pairs.tolerance import is_accurate_enough, next_tolerance
from orchestrator.results.bill import Item
from solvers.distil.methods.levenberg_marquardt import FOR_GROWING_BATCHES, LevenbergMarquardt, LMState
from solvers.distil.sizes import Sizes
from solvers.guided import GuidedSolver
from solvers.ns import NSSolver
from sweeps.distil.budget import Budget
from sweeps.distil.family import Learned, at
from sweeps.distil.journal import Journal
from sweeps.distil.outcome import Ending
from sweeps.distil.pair_sets import AGAIN, Level, PairSets
from sweeps.distil.place import Place
from sweeps.distil.plan import CHOICE, iteration, wanted_sizes
from sweeps.race import Candidate

MOST_ITERATIONS = 10**6
"""Length of a run in iterations, which never decides its end."""

LANE_ITERATIONS = 4
"""Iterations from each of several close starts, before the best one goes on."""

LANE_SHARE = 0.1
"""Most share of the evaluations of a theta that starts may take beside the first one."""

VALIDATE_EVERY, VALIDATION_COST = 0.25, 5
"""Growth of the spent evaluations from one validation to the next, and their least growth in validations."""

LEAST_GAIN_DB = 0.5
"""Gain that is worth twice the evaluations of iterations; a share of it is worth a share of a doubling. After a
doubling below it, and some validations (``Sizes.patience``), a distillation has converged, unless its batches are still
small: what few pairs cannot improve any more, larger batches do."""

OVERFIT_DB, FAR_OVERFIT_DB = 0.5, 3.0
"""Gain on training pairs above that on validation pairs from which on more pairs are worth their cost: if there are
fewer than the sizes of theta and of a sample ask for, and if there are as many. Two small sets of pairs differ by more
than the first number in how much can be gained on them."""

FORESIGHT_DB = 3.0
"""Gain that is foreseen when the tolerance of ground truth is chosen again."""

LAST_BATCH = 0.8
"""Least size of the last iteration's batch, as a share of what it would be with a larger budget."""

SLACK = 0.03
"""Share of the budget by which rejected steps of the last iteration may exceed it."""


@dataclass(kw_only=True)
class Progress:
    """How far a distillation has come: everything it needs to go on.

    Attributes:
        lanes: State of the method from each start; one, once the others are left behind.
        starts: Position of each lane's start among the candidates.
        begun: Parameters of the first lane at its start.
        levels: Pairs in use, last, and before.
        evaluations, validations: Velocity evaluations spent on iterations and on validations.
        seconds: Wall time.
        start_psnr_db: PSNR of the start of the first lane.
        best: PSNR of the best validated iterate, also at each guidance scale, its parameters, and the evaluations of
            iterations up to it.
        reference_db: PSNR from which a gain is counted.
        reference_at: Evaluations of iterations at which it was reached.
        stale: Validations without a gain.
        validated: Evaluations of iterations at the last validation.
        history: Evaluations of the whole command, and PSNR, at each validation.
        status: Why it has ended; None: it goes on.
        notes: What happened, in sentences.
    """

    lanes: list[dict[str, Any]]
    starts: list[int]
    begun: list[float]
    levels: list[dict[str, Any]]
    evaluations: int = 0
    validations: int = 0
    seconds: float = 0.0
    start_psnr_db: float = math.nan
    best: dict[str, Any] = field(default_factory=dict)
    reference_db: float = -math.inf
    reference_at: int = 0
    stale: int = 0
    validated: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    status: Ending | None = None
    notes: list[str] = field(default_factory=list)


class Learner:
    """Distils the theta of one NFE.

    Args:
        place: Where it runs.
        nfe: Number of velocity evaluations.
        learned: What is learned.
        seed: Seed of the order of batches.
        sizes: Numbers of pairs.
        level: Pairs to begin with.
        pairs: The pair sets.
        budget: What everything is charged to.
        limit: Evaluations of the whole command at which it ends.
        journal: Where its progress is kept.
    """

    def __init__(
        self,
        place: Place,
        *,
        nfe: int,
        learned: Learned,
        seed: int,
        sizes: Sizes,
        level: Level,
        pairs: PairSets,
        budget: Budget,
        limit: float,
        journal: Journal,
    ):
        self.place, self.nfe, self.seed, self.sizes = place, nfe, seed, sizes
        self.level, self.pairs, self.budget, self.limit = level, pairs, budget, limit
        self.journal, self.name = journal, f"theta-nfe{nfe}"
        self.learned = learned
        self.scheduler = place.facts.scheduler
        self.clock = time.monotonic()

    # ---- the run ----------------------------------------------------------------------------------------------

    def distil(self, candidates: Sequence[Candidate]) -> Progress:
        """Distil from the first of these solvers, and from the others as far as they are affordable."""
        progress = self._restored() or self._begun(candidates)
        while len(progress.lanes) > 1:
            self._advance_lanes(progress)
        while progress.status is None:
            self._step(progress)
        return progress

    def solver(self, parameters: Sequence[float]) -> NSSolver | GuidedSolver:
        """The solver, or the solvers of a range of guidance scales, at these parameters."""
        return self.learned.solver(parameters, self.scheduler)

    def _begun(self, candidates: Sequence[Candidate]) -> Progress:
        """The progress before the first iteration, with the starts that can be afforded."""
        starts = self.learned.starts([candidate.solver for candidate in candidates], self.scheduler)
        states = [asdict(self._method().begin(parameters)) for _, parameters in starts]
        batches = [len(self._method().batch(k)) for k in range(LANE_ITERATIONS)]
        lane = sum(self._cost(batch) for batch in batches) + self._validation_cost
        affordable = LANE_SHARE * (self.limit - self.budget.spent) / lane
        count = 1 + max(0, min(len(states) - 1, math.floor(min(affordable, len(states)))))
        progress = Progress(
            lanes=states[:count],
            starts=[position for position, _ in starts[:count]],
            begun=states[0]["parameters"],
            levels=[asdict(self.level)],
        )
        values = self._validate(progress, states[0]["parameters"])
        if not math.isfinite(mean(values)):
            raise UserError(
                f"the start of a distillation at NFE {self.nfe} gives validation samples that are not finite; check "
                f"the model with `bespoke check`"
            )
        progress.start_psnr_db = progress.reference_db = mean(values)
        self._note_best(progress, values, states[0]["parameters"])
        self._save(progress)
        return progress

    def _restored(self) -> Progress | None:
        """The progress of an earlier command, which is charged to the budget."""
        content = self.journal.read(self.name)
        if content is None:
            return None
        content["history"] = [(spent, psnr) for spent, psnr in content["history"]]
        for name in ("start_psnr_db", "reference_db"):
            content[name] = float(content[name])
        progress = Progress(**content)
        for level in progress.levels:
            self._use(Level(**level))
        self._charge(progress.evaluations, progress.validations, progress.seconds, reused=True)
        return progress

    def _advance_lanes(self, progress: Progress) -> None:
        """One iteration of the lane that is furthest behind; after the last one, all but the best lane end."""
        iterations = [state["iteration"] for state in progress.lanes]
        behind = iterations.index(min(iterations))
        if iterations[behind] < LANE_ITERATIONS:
            self._iterate(progress, behind)
            self._save(progress)
            return
        scores = [self._validate(progress, state["parameters"]) for state in progress.lanes]
        means = [mean(values) if math.isfinite(mean(values)) else -math.inf for values in scores]
        best = means.index(max(means))
        progress.lanes, progress.starts = [progress.lanes[best]], [progress.starts[best]]
        self._judge(progress, scores[best])
        self._save(progress)

    def _step(self, progress: Progress) -> None:
        """One iteration, and a validation if it is time for one."""
        self._widen(progress)
        ended: Ending | None = None
        if not self._iterate(progress, 0):
            ended = "budget"
        elif progress.lanes[0]["status"] != "running":
            ended = "stalled"
        spent = progress.evaluations - progress.validated
        due = max(VALIDATE_EVERY * progress.validated, VALIDATION_COST * self._validation_cost)
        if spent and (ended or spent >= due):
            self._judge(progress, self._validate(progress, progress.lanes[0]["parameters"]))
        if ended == "stalled" and self._grow(progress):
            ended = None
        progress.status = ended or progress.status
        self._save(progress)

    # ---- parts of a step --------------------------------------------------------------------------------------

    def _iterate(self, progress: Progress, lane: int) -> bool:
        """One iteration; false if it cannot be afforded."""
        state = LMState(**progress.lanes[lane])
        method = self._method()
        pairs, following = (len(method.batch(state.iteration + ahead)) for ahead in (0, 1))
        left = self.limit - self.budget.spent - self._validation_cost
        each, rejected = self._cost(1, state), method.retries * self.nfe * len(self.pairs.scales)
        affordable = min(left / each, (left + SLACK * self.limit) / (each + rejected))
        if affordable < pairs + LAST_BATCH * following:  # the last iteration takes what is left
            # A much smaller batch would undo what larger ones have gained.
            if affordable < max(LAST_BATCH * pairs, self.sizes.first_batch + 1):
                return False
            method = self._method(min(math.floor(affordable), self.level.train))
        after = advance(self._run(method), state, 1, self.scheduler, self.place.pool.gather)
        assert isinstance(after, LMState)
        self._charge(after.evaluations - state.evaluations, 0, self._lap(progress))
        progress.evaluations += after.evaluations - state.evaluations
        progress.lanes[lane] = asdict(after)
        return True

    def _judge(self, progress: Progress, values: Sequence[float]) -> None:
        """Draw the consequences of a validation of the first lane."""
        psnr = mean(values)
        progress.validated = progress.evaluations
        parameters = progress.lanes[0]["parameters"]
        if not math.isfinite(psnr):
            progress.lanes[0]["status"] = "diverged"
            return
        self._note_best(progress, values, parameters)
        doublings = math.log2(progress.evaluations / progress.reference_at) if progress.reference_at else 1.0
        if psnr >= progress.reference_db + LEAST_GAIN_DB * doublings:
            progress.reference_db, progress.reference_at, progress.stale = psnr, progress.evaluations, 0
        else:
            progress.stale += 1
        if not is_accurate_enough(self.pairs.truth(self.level), progress.best["psnr_db"]):
            self._tighten(progress)
        is_stale = progress.stale >= self.sizes.patience and doublings >= 1
        if is_stale and 2 * self._batch(progress) >= self.sizes.train and not self._grow(progress):
            progress.status = "converged"

    def _note_best(self, progress: Progress, values: Sequence[float], parameters: Sequence[float]) -> None:
        psnr = mean(values)
        progress.history.append((self.budget.spent, psnr))
        if not progress.best or psnr > progress.best["psnr_db"]:
            progress.best = {
                "psnr_db": psnr,
                "each_psnr_db": list(values),
                "parameters": list(parameters),
                "evaluations": progress.evaluations,
            }

    def _batch(self, progress: Progress) -> float:
        """Pairs of the next iteration, if there are as many as planned."""
        sizes, done = self.sizes, progress.lanes[0]["iteration"]
        return min(sizes.first_batch * sizes.batch_growth ** min(done, 1000), sizes.largest_batch, sizes.train)

    def _widen(self, progress: Progress) -> None:
        """Make more of the planned training pairs once a batch takes half of those that there are."""
        while 2 * self._batch(progress) > self.level.train and self.level.train < self.sizes.train:
            level = replace(self.level, train=min(2 * self.level.train, self.sizes.train))
            if not self._affords(self.level, level):
                return
            self._change(progress, level)

    def _grow(self, progress: Progress) -> bool:
        """Double the training pairs if theta has gained more on these than on others, and the budget allows it.

        Gains are compared, since some sets are more difficult than others.
        """
        if 2 * self.level.train * self.nfe * len(self.pairs.scales) > self.limit - self.budget.spent:
            return False
        now, begun = (
            mean(self._validate(progress, parameters, "train"))
            for parameters in (progress.lanes[0]["parameters"], progress.begun)
        )
        gap = (now - begun) - (progress.history[-1][1] - progress.start_psnr_db)
        more = self.sizes.more_train(self.level.train)
        wanted = wanted_sizes(self.learned, self.nfe, math.prod(self.place.facts.shape)).train
        if more is None or gap < (OVERFIT_DB if self.level.train < wanted else FAR_OVERFIT_DB):
            return False
        level = replace(self.level, train=more)
        if not self._affords(self.level, level, share=0.5):
            progress.notes.append(
                f"theta has gained {gap:.1f} dB more on its {self.level.train} training pairs than on others; the "
                f"budget does not pay for more pairs"
            )
            return False
        before = self.level.train
        self._change(progress, level)
        progress.notes.append(
            f"theta had gained {gap:.1f} dB more on {before} training pairs than on others; it went on "
            f"with {self.level.train}"
        )
        method = self._method()
        progress.lanes[0] |= {
            "parameters": progress.best["parameters"],
            "status": "running",
            "reason": None,
            "failures": 0,
            "earlier": None,
            "damping": method.damping,
            "jacobian": method.jacobian,
        }
        progress.stale, progress.reference_db = 0, progress.best["psnr_db"]
        progress.reference_at = progress.evaluations
        return True

    def _tighten(self, progress: Progress) -> None:
        """Make all pairs again at a finer tolerance, if the budget allows it; the best iterate is validated again."""
        before, best = self.level, progress.best
        accuracy = self.pairs.truth(before)
        tolerance = next_tolerance(before.tolerance, accuracy, best["psnr_db"] + FORESIGHT_DB)
        known = "unknown" if accuracy is None else f"{accuracy:.1f} dB"
        if tolerance is None or not self._affords(before, replace(before, tolerance=tolerance), share=0.5):
            why = "rounding in the network decides it" if tolerance is None else "the budget does not pay for better"
            sentence = f"ground truth is accurate to {known} only, and {why}; the PSNR of theta is less certain"
            if sentence not in progress.notes:
                progress.notes.append(sentence)
            return
        self._change(progress, replace(before, tolerance=tolerance))
        progress.notes.append(
            f"theta came near the accuracy of ground truth at tolerance {before.tolerance:g}, {known}; pairs were "
            f"solved again at {tolerance:g}"
        )
        values = self._validate(progress, best["parameters"])
        psnr = mean(values)
        progress.reference_db += psnr - best["psnr_db"]
        progress.best = best | {"psnr_db": psnr, "each_psnr_db": values}
        progress.history.append((self.budget.spent, psnr))

    # ---- pairs and costs --------------------------------------------------------------------------------------

    def _use(self, level: Level) -> None:
        self.pairs.ensure(level)
        self.pairs.truth(level)
        self.level, self.sizes = level, replace(self.sizes, train=max(self.sizes.train, level.train))

    def _change(self, progress: Progress, level: Level) -> None:
        self._use(level)
        progress.levels.append(asdict(level))

    def _affords(self, before: Level, after: Level, share: float = 1.0) -> bool:
        """Whether ``share`` of what is left pays for the pairs of a level."""
        per_pair = self.pairs.cost(before)
        pairs: float = after.train - before.train
        if after.tolerance != before.tolerance:
            per_pair *= (before.tolerance / after.tolerance) ** 0.25
            pairs = after.train + after.validation + 2 * AGAIN + CHOICE * SAMPLES
        return pairs * per_pair <= share * (self.limit - self.budget.spent)

    def _cost(self, pairs: int, state: LMState | None = None) -> int:
        """Evaluations of an iteration on so many pairs whose first step is taken."""
        jacobian = self._jacobian if state is None else state.jacobian
        return iteration(self.nfe, pairs, jacobian) * len(self.pairs.scales)

    @property
    def _validation_cost(self) -> int:
        return self.level.validation * self.nfe * len(self.pairs.scales)

    @property
    def _jacobian(self) -> Literal["forward", "central"]:
        return "forward" if self.place.precision == "float32" else "central"

    def _method(self, size: int | None = None) -> LevenbergMarquardt:
        """The method on the present training pairs; its batches grow, unless their size is given."""
        largest = min(self.sizes.largest_batch, self.level.train) if size is None else size
        grows = size is None and self.sizes.first_batch < largest
        return LevenbergMarquardt(
            iterations=MOST_ITERATIONS,
            batch_size=largest,
            seed=self.seed,
            training_pairs=self.level.train,
            jacobian=self._jacobian,
            first_batch_size=self.sizes.first_batch if grows else None,
            batch_growth=self.sizes.batch_growth if grows else 1.0,
            memory_pairs=self.sizes.memory_pairs,
            **FOR_GROWING_BATCHES,
        )

    def _run(self, method: LevenbergMarquardt) -> LearnedRun:
        names = self.pairs.names("train", self.level)
        train = tuple(AtScale(scale, name) for scale, name in names.items())
        return LearnedRun(
            family=self.learned.name,
            options=self.learned.options,
            sigma0=1.0,
            train=train[0].pairs if self.learned.guidance_range is None else train,
            method=method,
        )

    def _validate(
        self, progress: Progress, parameters: Sequence[float], split: Literal["train", "validation"] = "validation"
    ) -> list[float]:
        """Mean PSNR of the solver at these parameters on a split's pairs, at each guidance scale, dB."""
        solver, names = self.solver(parameters), self.pairs.names(split, self.level)
        values = [mean_psnr(at(solver, scale), name, self.place.pool.gather) for scale, name in names.items()]
        count = self.level.validation if split == "validation" else self.level.train
        spent = count * self.nfe * len(names)
        self._charge(0, spent, self._lap(progress))
        progress.validations += spent
        return values

    def _charge(self, evaluations: int, validations: int, seconds: float, reused: bool = False) -> None:
        """Charge evaluations, of which every guidance scale has as many; the time goes to the first item."""
        part, scales = f"theta at NFE {self.nfe}", self.pairs.scales
        items: tuple[tuple[Item, int], ...] = (("distillation", evaluations), ("validation", validations))
        for item, spent in items:
            for scale in scales if spent else ():
                share = spent // len(scales)
                self.budget.spend(item, part, share, guidance_scale=scale, seconds=seconds, reused=reused)
                seconds = 0.0

    def _lap(self, progress: Progress) -> float:
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        progress.seconds += seconds
        return seconds

    def _save(self, progress: Progress) -> None:
        self.journal.write(self.name, asdict(progress))
