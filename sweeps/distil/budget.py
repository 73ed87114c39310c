"""The budget of a distillation: what was spent, by item, and what may still be spent."""

from __future__ import annotations

import math
from collections.abc import Callable

from orchestrator.cost import Cost
from orchestrator.results.bill import Bill, Item

REPORT_SAMPLES = 4
"""Samples that a report may draw from each of two solvers, theta and the best fixed one: they are paid in advance."""


class Budget:
    """Velocity evaluations, each of one sample: those spent, by item, and those left.

    Args:
        limit: How many may be spent; None: any number.
        forwards_per_evaluation: Forward passes of the network per velocity evaluation at a guidance scale.
        on_spend: Receives velocity evaluations as they are spent.
    """

    def __init__(
        self,
        limit: int | None,
        forwards_per_evaluation: Callable[[float], int],
        on_spend: Callable[[int], object] = lambda evaluations: None,
    ):
        self.limit, self.on_spend = limit, on_spend
        self.forwards_per_evaluation = forwards_per_evaluation
        self.spent = 0
        self._costs: dict[tuple[Item, str, bool], Cost] = {}

    @property
    def left(self) -> float:
        """Evaluations that may still be spent; infinite without a limit."""
        return math.inf if self.limit is None else self.limit - self.spent

    def spend(
        self,
        item: Item,
        part: str,
        evaluations: int,
        *,
        guidance_scale: float = 1.0,
        seconds: float | None = 0.0,
        reused: bool = False,
    ) -> None:
        """Charge evaluations, also those that an earlier command made.

        Args:
            item, part: Entry of the bill.
            evaluations: Velocity evaluations.
            guidance_scale: Guidance scale, on which their forward passes depend.
            seconds: Wall time; None if it was not recorded.
            reused: Whether an earlier command made them.
        """
        forwards = evaluations * self.forwards_per_evaluation(guidance_scale)
        cost = Cost(evaluations=evaluations, forwards=forwards, seconds=seconds)
        key = (item, part, reused)
        self._costs[key] = self._costs[key] + cost if key in self._costs else cost
        self.spent += evaluations
        if evaluations:
            self.on_spend(evaluations)

    def bill(self) -> Bill:
        """The bill of everything spent."""
        bill = Bill(self.forwards_per_evaluation)
        for (item, part, reused), cost in self._costs.items():
            bill.add(item, part, cost, reused=reused)
        return bill
