"""The bill of a command: network passes and wall time by item, also of what was made by earlier commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from orchestrator.cost import Cost, load_costs, total
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import cost_item
from orchestrator.results.store import Result, ResultStore
from orchestrator.storage import Storage

Item = Literal["examination", "pairs", "grid search", "distillation", "validation", "scoring", "report"]
ITEMS: tuple[Item, ...] = get_args(Item)
UNKNOWN = "—"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a bill.

    Attributes:
        item: The item it belongs to.
        part: Which part of it, e.g. 'train, guidance 1' or a solver's label; entries of one part are summed.
        cost: What it cost when it was made; None if that was not recorded.
        reused: Whether it was made by an earlier command.
        detail: Name in the list of single runs; None: it is not listed there.
    """

    item: Item
    part: str
    cost: Cost | None
    reused: bool = False
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a bill: the entries of one part, or of an item.

    Attributes:
        item, part: What it is for.
        cost: Sum of the known costs; None if none is known.
        count, reused, unknown: Number of its entries, of those that were reused, and of those of unknown cost.
    """

    item: str
    part: str
    cost: Cost | None
    count: int
    reused: int
    unknown: int

    @property
    def texts(self) -> tuple[str, str, str, str, str]:
        """Evaluations, forwards, backwards, wall time and reuse, as shown."""
        cost = self.cost
        if cost is None:
            return (UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, self._reuse)
        numbers = (f"{number:,}" for number in (cost.evaluations, cost.forwards, cost.backwards))
        evaluations, forwards, backwards = numbers
        return (evaluations, forwards, backwards, duration(cost.seconds), self._reuse)

    @property
    def _reuse(self) -> str:
        if not self.reused:
            return ""
        return "all" if self.reused == self.count else f"{self.reused} of {self.count}"


@dataclass
class Bill:
    """What a command, and the earlier ones whose work it reuses, spent.

    Attributes:
        forwards_per_evaluation: Forward passes of the network per velocity evaluation at a guidance scale.
        entries: All entries, in the order in which they were added.
    """

    forwards_per_evaluation: Callable[[float], int]
    entries: list[Entry] = field(default_factory=list)

    def add(self, item: Item, part: str, cost: Cost | None, *, reused: bool = False, detail: str | None = None) -> None:
        """Add an entry."""
        self.entries.append(Entry(item=item, part=part, cost=cost, reused=reused, detail=detail))

    def add_evaluations(
        self, item: Item, part: str, evaluations: int, guidance_scale: float, seconds: float | None = None
    ) -> None:
        """Add velocity evaluations, each of one sample, that were not stored before."""
        forwards = evaluations * self.forwards_per_evaluation(guidance_scale)
        self.add(item, part, Cost(evaluations=evaluations, forwards=forwards, seconds=seconds))

    def add_pairs(self, storage: Storage, spec: PairSpec, name: str, *, reused: bool) -> None:
        """Add a complete pair set: its needed pairs, and the pairs that were thrown away.

        Evaluations are those of the manifest. Thrown away are the last batch's pairs beyond the needed ones,
        and files that were damaged and made again.

        Args:
            storage: Storage of the pairs.
            spec: Spec of the needed pairs.
            name: What they are for, e.g. 'train'.
            reused: Whether they were complete before this command.
        """
        store = PairStore(storage, spec)
        records = store.records()
        costs = load_costs(storage, store.folder) or {}
        recorded = [costs.get(cost_item(record.indices)) for record in records]
        made = sum(record.nfe_sum for record in records)
        needed = store.evaluations()
        seconds = None
        if all(cost is not None for cost in recorded):
            seconds = total(cost for cost in recorded if cost is not None).seconds
        spent = sum(cost.evaluations for cost in recorded if cost is not None)
        known = sum(record.nfe_sum for record, cost in zip(records, recorded, strict=True) if cost is not None)
        batches = [nfe for record in records for nfe in record.nfe]
        last = batches[spec.made // spec.batch_size - 1]
        surplus = last * (spec.made - spec.count) + max(0, spent - known)
        forwards = self.forwards_per_evaluation(spec.guidance_scale)
        # A set that has grown for another experiment has cost more than the pairs that are needed here.
        share = None if seconds is None else seconds * needed / max(made, spent)
        self.add("pairs", name, Cost(evaluations=needed, forwards=needed * forwards, seconds=share), reused=reused)
        if surplus:
            lost = None if seconds is None else seconds * surplus / max(made, spent)
            cost = Cost(evaluations=surplus, forwards=surplus * forwards, seconds=lost)
            self.add("pairs", "thrown away", cost, reused=reused)

    def add_results(self, storage: Storage, results: Iterable[Result], reused: Iterable[str]) -> None:
        """Add the results of points.

        Args:
            storage: Storage of the points.
            results: The results.
            reused: Keys of the points that were complete before this command.
        """
        earlier = set(reused)
        for result in results:
            scale = result.point["guidance_scale"]
            part = f"{result.label}{guided(scale)}"
            costs = load_costs(storage, ResultStore(storage, result.key).folder)
            again = result.key in earlier
            if costs is None:
                made: Item = "distillation" if result.kind == "learned" else "grid search"
                self.add(made, part, None, reused=again, detail=result.name)
                continue
            for item in ITEMS:
                cost = costs.get(item)
                if cost is None or not (cost.evaluations or cost.forwards):
                    continue
                # Every solver is validated and scored; how much for each follows from its NFE alone.
                of_solver = item in ("grid search", "distillation")
                kind = "learned solvers" if result.kind == "learned" else "fixed solvers"
                detail = result.name if of_solver else None
                self.add(item, part if of_solver else kind, cost, reused=again, detail=detail)

    # ---- sums -------------------------------------------------------------------------------------------------

    def lines(self) -> list[Line]:
        """One line per item and part, by item."""
        lines = []
        for item in ITEMS:
            parts: dict[str, list[Entry]] = {}
            for entry in self.entries:
                if entry.item == item:
                    parts.setdefault(entry.part, []).append(entry)
            lines += [_line(item, part, entries) for part, entries in parts.items()]
        return lines

    def items(self) -> list[Line]:
        """One line per item that has entries."""
        groups = {item: [entry for entry in self.entries if entry.item == item] for item in ITEMS}
        return [_line(item, "", entries) for item, entries in groups.items() if entries]

    def runs(self) -> list[tuple[str, Line]]:
        """One line per grid search and distillation, with its name."""
        named = [(entry.detail, entry) for entry in self.entries if entry.detail is not None]
        return [(name, _line(entry.item, entry.part, [entry])) for name, entry in named]

    def total(self) -> Line:
        """The sum of all entries of known cost."""
        return _line("total", "", self.entries)

    def metrics(self) -> dict[str, float]:
        """The bill as metrics of an MLflow run: ``bill/forwards/pairs`` and so on."""
        values: dict[str, float] = {}
        for line in [*self.items(), self.total()]:
            if line.cost is not None:
                name = line.item.replace(" ", "_")
                values |= {
                    f"bill/evaluations/{name}": line.cost.evaluations,
                    f"bill/forwards/{name}": line.cost.forwards,
                    f"bill/backwards/{name}": line.cost.backwards,
                }
                if line.cost.seconds is not None:
                    values[f"bill/seconds/{name}"] = line.cost.seconds
        return values

    def sentence(self) -> str:
        """The total, and the share of it that was reused, as a sentence."""
        total = self.total()
        evaluations, forwards, backwards, time, _ = total.texts
        earlier = _line("total", "", [entry for entry in self.entries if entry.reused]).cost
        reused = "" if earlier is None else f", {earlier.forwards:,} of the forward passes in earlier commands"
        return (
            f"{evaluations} velocity evaluations, {forwards} forward and {backwards} backward passes of the network"
            f"{reused}; wall times sum to {time}"
        )

    def notes(self) -> list[str]:
        """What a reader of the bill has to know."""
        notes = [
            "An evaluation is one velocity of one sample; with guidance it takes up to two forward passes of the "
            "network. Reused work has the cost of when it was made.",
            "Wall times of solvers that were computed at the same time overlap, so their sum may exceed the duration "
            "of the command; validations during a distillation are in its time.",
        ]
        if unknown := self.total().unknown:
            what = "One entry was" if unknown == 1 else f"{unknown} entries were"
            notes.append(
                f"{what} made by a version that recorded no costs ({UNKNOWN}) and {'is' if unknown == 1 else 'are'} "
                f"not in the sums."
            )
        return notes

    def markdown(self) -> str:
        """The bill as a Markdown table."""
        header = ["item", "part", *COLUMNS]
        lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        rows = [*self.lines(), self.total()]
        lines += ["| " + " | ".join([line.item, line.part.replace("|", "\\|"), *line.texts]) + " |" for line in rows]
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes()), ""])


COLUMNS = ("evaluations", "forward passes", "backward passes", "wall time", "reused")
"""Headings of :attr:`Line.texts`."""


def _line(item: str, part: str, entries: Iterable[Entry]) -> Line:
    entries = list(entries)
    known = [entry.cost for entry in entries if entry.cost is not None]
    return Line(
        item=item,
        part=part,
        cost=total(known) if known else None,
        count=len(entries),
        reused=sum(entry.reused for entry in entries),
        unknown=sum(entry.cost is None for entry in entries),
    )


def guided(guidance_scale: float) -> str:
    """``, guidance 2``; empty for scale 1."""
    return "" if guidance_scale == 1 else f", guidance {guidance_scale:g}"


def duration(seconds: float | None) -> str:
    """A wall time as text; a dash if it was not recorded."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
