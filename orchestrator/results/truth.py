"""Facts about ground truth, stored beside the pairs, and which scores its own error decides."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

from orchestrator.cost import Cost
from orchestrator.errors import UserError
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.truth import TruthFacts
from orchestrator.metrics.base import EXACT_DB, shown_db
from orchestrator.pairs import PairSpec, PairStore, accuracy
from orchestrator.pairs.tolerance import MARGIN_DB, is_accurate_enough
from orchestrator.pool.requests import Pool, Request
from orchestrator.progress import Note
from orchestrator.storage import Storage

K = TypeVar("K")

MARK = "†"
"""Marks a PSNR that is near ground truth's own accuracy."""


@dataclass(frozen=True)
class Truth:
    """Ground truth of one pair set.

    Attributes:
        spec: Spec of the pairs.
        facts: Facts about them.
        seconds: Wall time of making some pairs again.
        reused: Whether the facts are from an earlier command.
    """

    spec: PairSpec
    facts: TruthFacts
    seconds: float
    reused: bool

    @property
    def cost(self) -> Cost:
        """Cost of making some pairs again."""
        facts = self.facts
        return Cost(evaluations=facts.evaluations, forwards=facts.forwards, seconds=self.seconds)

    def mark(self, psnr_db: float) -> str:
        """:data:`MARK` if a PSNR on these pairs is within :data:`MARGIN_DB` of their own accuracy, else nothing."""
        accuracy = self.facts.accuracy_db
        if accuracy is None or accuracy >= EXACT_DB:  # an exact ground truth decides no score
            return ""
        return "" if is_accurate_enough(accuracy, psnr_db) else MARK

    def sentence(self) -> str:
        """The facts as a sentence."""
        facts = self.facts
        own = f"own accuracy unknown: {facts.problem}"
        if facts.accuracy_db is not None:
            tighter = "at a tenth of the tolerance" if self.spec.steps is None else "on half the steps"
            again = f"{facts.again} pairs solved again {tighter}"
            own = f"own accuracy {shown_db(facts.accuracy_db, 1)} dB ({again})"
        return (
            f"values from {facts.low:.3g} to {facts.high:.3g}, mean {facts.mean:.3g}, standard deviation "
            f"{facts.std:.3g}; {facts.nfe:.0f} evaluations per pair; {own}"
        )

    def numbers(self) -> dict[str, float]:
        """The facts as metrics of an MLflow run, without those that are not known."""
        facts = self.facts
        values = {"low": facts.low, "high": facts.high, "mean": facts.mean, "std": facts.std, "nfe": facts.nfe}
        return values if facts.accuracy_db is None else values | {"accuracy_db": facts.accuracy_db}

    def footnote(self) -> str:
        """What :data:`MARK` means, and the remedy."""
        return (
            f"{MARK} within {MARGIN_DB:g} dB of ground truth's own accuracy of {self.facts.accuracy_db or 0:.1f} dB: "
            f"its error, not the solver's alone, decides this value. Tighter tolerances (pairs.rtol and pairs.atol, "
            f"now {self.spec.rtol:g} and {self.spec.atol:g}) give pairs that can tell such solvers apart"
        )


def find_truths(storage: Storage, pool: Pool, specs: Mapping[K, PairSpec], announce: Note) -> dict[K, Truth]:
    """:func:`find_truth` of several pair sets. One that fails costs a note, since no score depends on it."""
    truths = {}
    for key, spec in specs.items():
        try:
            truths[key] = find_truth(storage, pool, spec)
        except UserError as error:
            announce(f"the accuracy of the ground truth of {spec.name} is not known: {error}")
    return truths


def find_truth(storage: Storage, pool: Pool, spec: PairSpec, again: int = accuracy.PAIRS) -> Truth:
    """Facts about the ground truth of complete pairs; a host finds them unless they are stored.

    Args:
        storage: Storage of the pairs, where the facts are kept.
        pool: Hosts of the model.
        spec: Spec of the pairs.
        again: Pairs that are solved again to measure their accuracy.
    """
    fewer = "" if again == accuracy.PAIRS else f"-{again}"
    key = f"{PairStore(storage, spec).folder}/truth-{spec.count}{fewer}.json"
    if storage.exists(key):
        try:
            content = storage.read_json(key)
            return Truth(spec, TruthFacts(**content["facts"]), content["seconds"], reused=True)
        except (ValueError, KeyError, TypeError):  # of another version, or damaged
            storage.delete(key)
    begin = time.monotonic()
    facts = pool.call(Request.of(HostProtocol.truth, pairs=spec.name, again=again))
    seconds = time.monotonic() - begin
    storage.write_json(key, {"facts": asdict(facts), "seconds": seconds})
    return Truth(spec, facts, seconds, reused=False)
