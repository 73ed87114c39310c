"""The pair sets of a distillation: they grow by whole batches, and are made again at a finer tolerance on need."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.config.pair_plan import PairKey, split_spec
from orchestrator.config.sections import PairsConfig
from orchestrator.cost import load_costs
from orchestrator.datasets.base import Split
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import complete, cost_item, ensure_pairs
from orchestrator.results.bill import guided
from orchestrator.results.steps import SharedSteps, find_steps
from orchestrator.results.truth import Truth, find_truth
from sweeps.distil.budget import Budget
from sweeps.distil.place import Place

BATCH = 8
"""Pairs per solver batch and file, by which sets grow; files are made by several hosts at the same time."""

AGAIN = 4
"""Pairs that are solved again to measure the accuracy of ground truth."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """Which pairs are in use, per guidance scale.

    Attributes:
        tolerance: Tolerance of ground truth.
        train, validation: Numbers of pairs, multiples of :data:`BATCH`.
    """

    tolerance: float
    train: int
    validation: int


class PairSets:
    """Makes the pair sets of a distillation and charges them to its budget, also those that were made earlier.

    All pairs of a guidance scale and tolerance share steps that are chosen on the first training pairs.

    Args:
        place: Where it runs.
        scales: Guidance scales of the pairs.
        seed: Seed of the training pairs.
        budget: What they are charged to.
    """

    def __init__(self, place: Place, scales: Collection[float], seed: int, budget: Budget):
        self.place, self.scales, self.seed, self.budget = place, tuple(scales), seed, budget
        self.truths: dict[float, dict[float, Truth]] = {}
        self._charged: dict[str, tuple[int, float]] = {}
        self._steps: dict[tuple[float, float], SharedSteps] = {}

    def spec(self, split: Split, scale: float, tolerance: float, count: int, seed: int | None = None) -> PairSpec:
        """The spec of one pair set, without shared steps; of training pairs with the distillation's seed by default."""
        place = self.place
        pairs = PairsConfig(rtol=tolerance, atol=tolerance, batch_size=BATCH, shard_size=BATCH, seed=place.pairs_seed)
        key = PairKey(split, scale, 0 if split != "train" else self.seed if seed is None else seed)
        return split_spec(pairs, place.conditioning, place.facts, key, count=count, trajectory=False)

    def specs(self, split: Split, level: Level) -> dict[float, PairSpec]:
        """The specs of a split's pair sets, by guidance scale. Their steps are chosen if they are not yet."""
        count = level.train if split == "train" else level.validation
        return {
            scale: self._shared(scale, level.tolerance).of(self.spec(split, scale, level.tolerance, count))
            for scale in self.scales
        }

    def _shared(self, scale: float, tolerance: float) -> SharedSteps:
        """The steps of this guidance scale and tolerance, which are charged once."""
        if (scale, tolerance) not in self._steps:
            spec = self.spec("train", scale, tolerance, BATCH, seed=0)  # all seeds share validation pairs
            self.place.need([f"pairs/{spec.digest}"])
            steps = find_steps(self.place.storage, self.place.pool, spec)
            self._steps[scale, tolerance] = steps
            self.budget.spend(
                "pairs",
                f"choice of steps at {tolerance:g}{guided(scale)}",
                steps.chosen.evaluations,
                guidance_scale=scale,
                seconds=steps.seconds,
                reused=steps.reused,
            )
        return self._steps[scale, tolerance]

    def names(self, split: Split, level: Level) -> dict[float, str]:
        """Names of a split's pairs, by guidance scale."""
        return {scale: spec.name for scale, spec in self.specs(split, level).items()}

    def ensure(self, level: Level) -> None:
        """Make the missing pairs of a level, and charge those that are not charged yet."""
        named = {
            f"{split} at {level.tolerance:g}{guided(scale)}": spec
            for split in ("train", "validation")
            for scale, spec in self.specs(split, level).items()
        }
        place, specs = self.place, list(named.values())
        place.need(f"pairs/{spec.digest}" for spec in specs)
        earlier = complete(place.storage, specs)
        missing = [spec for spec in specs if spec.name not in earlier]
        if missing:
            ensure_pairs(place.storage, missing, place.pool, wait=place.wait, announce=place.announce)
        for part, spec in named.items():
            self._charge(part, spec, spec.name in earlier)

    def _charge(self, part: str, spec: PairSpec, reused: bool) -> None:
        store = PairStore(self.place.storage, spec)
        costs = load_costs(self.place.storage, store.folder) or {}
        recorded = [costs.get(cost_item(record.indices)) for record in store.records()]
        evaluations, seconds = store.evaluations(), sum(cost.seconds or 0.0 for cost in recorded if cost is not None)
        before, earlier = self._charged.get(spec.digest, (0, 0.0))
        if evaluations > before:
            self.budget.spend(
                "pairs",
                part,
                evaluations - before,
                guidance_scale=spec.guidance_scale,
                seconds=max(0.0, seconds - earlier),
                reused=reused,
            )
            self._charged[spec.digest] = evaluations, seconds

    def truth(self, level: Level) -> float | None:
        """Accuracy of the validation pairs' ground truth at this tolerance, dB; None if it cannot be measured.

        Over several guidance scales it is the lowest. It is measured once per tolerance.
        """
        if level.tolerance not in self.truths:
            found = {}
            for scale, spec in self.specs("validation", level).items():
                truth = found[scale] = find_truth(self.place.storage, self.place.pool, spec, again=AGAIN)
                self.budget.spend(
                    "examination",
                    f"accuracy of ground truth at {level.tolerance:g}{guided(scale)}",
                    truth.facts.evaluations,
                    guidance_scale=scale,
                    seconds=truth.seconds,
                    reused=truth.reused,
                )
            self.truths[level.tolerance] = found
        values = [truth.facts.accuracy_db for truth in self.truths[level.tolerance].values()]
        known = [value for value in values if value is not None]
        return min(known) if len(known) == len(values) else None

    def cost(self, level: Level) -> float:
        """Evaluations per pair of this tolerance, over all guidance scales, as far as such pairs were made."""
        stores = [PairStore(self.place.storage, spec) for spec in self.specs("validation", level).values()]
        return sum(store.evaluations() / store.spec.count for store in stores)
