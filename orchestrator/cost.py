"""What a piece of work cost: network passes and wall time, stored beside what was made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from orchestrator.storage import Storage

FILE = "cost.json"
"""Name of the file with the costs of a folder's content. No digest depends on it."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Network passes and wall time.

    Attributes:
        evaluations: Velocity evaluations, each of one sample.
        forwards: Forward passes of the network, each of one sample: with guidance, two per evaluation.
        backwards: Backward passes, each of one sample.
        seconds: Wall time; None if it was not recorded.
    """

    evaluations: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float | None = 0.0

    def __add__(self, other: Cost) -> Cost:
        known = None if self.seconds is None or other.seconds is None else self.seconds + other.seconds
        return Cost(
            evaluations=self.evaluations + other.evaluations,
            forwards=self.forwards + other.forwards,
            backwards=self.backwards + other.backwards,
            seconds=known,
        )


def total(costs: Iterable[Cost]) -> Cost:
    """The sum; its seconds are those of the costs that have them, None if there are only costs without."""
    costs = list(costs)
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    return Cost(
        evaluations=sum(cost.evaluations for cost in costs),
        forwards=sum(cost.forwards for cost in costs),
        backwards=sum(cost.backwards for cost in costs),
        seconds=sum(known) if known or not costs else None,
    )


class Ledger:
    """Costs by item, of work whose items follow one another: each gets the time since the one before.

    Args:
        forwards_per_evaluation: Forward passes of the network per velocity evaluation.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(self, forwards_per_evaluation: int, clock: Callable[[], float] = time.monotonic):
        self.forwards_per_evaluation, self.clock = forwards_per_evaluation, clock
        self.costs: dict[str, Cost] = {}
        self.last = clock()

    def add(self, item: str, evaluations: int, seconds: float | None = 0.0) -> None:
        """Add evaluations to an item."""
        forwards = evaluations * self.forwards_per_evaluation
        self.add_cost(item, Cost(evaluations=evaluations, forwards=forwards, seconds=seconds))

    def add_cost(self, item: str, cost: Cost) -> None:
        """Add a cost to an item."""
        self.costs[item] = self.costs[item] + cost if item in self.costs else cost

    def lap(self, item: str, evaluations: int = 0) -> None:
        """Add evaluations, and the time since the last lap, to an item."""
        now = self.clock()
        self.add(item, evaluations, now - self.last)
        self.last = now


def save_costs(storage: Storage, folder: str, costs: Mapping[str, Cost]) -> None:
    """Write the costs of a folder's content, by item."""
    storage.write_json(f"{folder}/{FILE}", {item: asdict(cost) for item, cost in costs.items()})


def load_costs(storage: Storage, folder: str) -> dict[str, Cost] | None:
    """Read the costs of a folder's content; None if they were not recorded, or cannot be read."""
    if not storage.exists(f"{folder}/{FILE}"):
        return None
    try:
        return {item: Cost(**cost) for item, cost in storage.read_json(f"{folder}/{FILE}").items()}
    except (ValueError, TypeError, AttributeError):
        return None
