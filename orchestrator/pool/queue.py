"""Who is given to which host, and when: hosts with free places, and the work that waits for one.

Bookkeeping alone, without Ray, clock or locks: the router asks it after everything that happens, and so does the
simulation of the pool. What an item is, and what a host does with it, is not its concern.

A host has two places: one item runs, one waits, so that the device never idles. Work goes to the least loaded host, the
longest waiting first. Items of equal keys that wait at the same time go together. They take a host that is idle, and
all of it: a short item behind a shared call would wait for the whole of it, and elsewhere it need not. While every host
is busy they gather, and no host takes more of them than its share, or others would have none. Those who were answered
together mostly ask again together: their host can be kept for them for a moment, or the first would go alone.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

PLACES = 2
"""Items at a host at once: one running, one waiting."""

PATIENCE = 50
"""Items per host that may be placed while one with a key waits for an idle host; then it takes any place."""

LINGER = 0.1
LINGER_SECONDS = 1.0

T = TypeVar("T")
"""What waits."""


def linger_seconds(answered: float) -> float:
    """How long a host may be kept for those whom it has answered after so many seconds: a share that it can lose."""
    return min(LINGER * answered, LINGER_SECONDS)


@dataclass(eq=False)
class Seat:
    """A host as the waiting see it.

    Attributes:
        in_flight: Places that are taken.
        up: Whether it may be given work.
        expected: Who it is kept for.
    """

    in_flight: int = 0
    up: bool = True
    expected: Expected | None = None


@dataclass(frozen=True, eq=False)
class Expected:
    """Items of one key that should come in a moment."""

    key: Hashable
    count: int


S = TypeVar("S", bound=Seat)
"""What a host is to the caller."""


@dataclass(eq=False)
class _Item(Generic[T]):
    """Something that waits, since it was the ``number``-th to come and ``placed`` had been placed before it."""

    content: T
    number: int
    placed: int


class Placement(NamedTuple, Generic[S, T]):
    """These items, of one key and together, are the seat's now; they take so many of its places."""

    seat: S
    places: int
    items: list[T]
    key: Hashable


class Waiting(Generic[S, T]):
    """The items that wait for one of these seats.

    Args:
        seats: All hosts.
        together: Most items of one key that are placed as one.
    """

    def __init__(self, seats: Sequence[S], together: int):
        self.seats, self.together = seats, together
        self._lone: deque[_Item[T]] = deque()
        # In each queue, and so among their first ones, the longest waiting comes first.
        self._by_key: dict[Hashable, deque[_Item[T]]] = {}
        self._numbers = itertools.count()
        self._placed = 0
        self._keyed = 0  # items with a key that wait or are at a host

    def __len__(self) -> int:
        # A copy: another thread may look, for the metrics.
        return len(self._lone) + sum(map(len, list(self._by_key.values())))

    def add(self, content: T, key: Hashable = None, *, alone: bool = False) -> None:
        """Let it wait.

        Args:
            content: The item.
            key: Items of equal keys may be placed together; None: this one never is.
            alone: It gets a host for itself, and nothing else is placed until it has one, or no host would run dry.
        """
        queue = self._lone if alone else self._by_key.setdefault(key, deque())
        queue.append(_Item(content, next(self._numbers), self._placed))
        self._keyed += key is not None

    def placements(self) -> Iterator[Placement[S, T]]:
        """Place whatever can be placed now; to be used up at once."""
        while (placement := self._next()) is not None:
            self._placed += 1
            placement.seat.in_flight += placement.places
            yield placement

    def leave(self, placement: Placement[S, T], *, keep: bool = False) -> Expected | None:
        """Its places are free again.

        Args:
            placement: What is answered.
            keep: Keep the seat until as many of this key wait, or anybody else does, or it is given up. Without a key
                there is nobody to keep it for.

        Returns:
            What to give up (:meth:`give_up`) in a moment; None where the seat is not kept.
        """
        placement.seat.in_flight -= placement.places
        if placement.key is None:
            return None
        self._keyed -= len(placement.items)
        placement.seat.expected = Expected(placement.key, len(placement.items)) if keep else None
        return placement.seat.expected

    def give_up(self, seat: S, expected: Expected) -> None:
        """Do not keep the seat any longer; nothing where it has been taken since."""
        if seat.expected is expected:
            seat.expected = None

    def _next(self) -> Placement[S, T] | None:
        waiting = len(self)
        up = [seat for seat in self.seats if seat.up]
        free = (seat for seat in up if not self._is_kept(seat, waiting))
        seat = min(free, key=lambda seat: seat.in_flight, default=None)
        if seat is None:
            return None
        room = PLACES - seat.in_flight
        if self._lone:
            return self._take(seat, PLACES, self._lone, None, 1) if room >= PLACES else None
        key = min(
            (key for key, queue in self._by_key.items() if self._places(key, queue[0]) <= room),
            key=lambda key: self._by_key[key][0].number,
            default=_NOBODY,
        )
        if key is _NOBODY:
            return None
        queue = self._by_key[key]
        places = self._places(key, queue[0])
        share = -(-self._keyed // len(up))
        placement = self._take(seat, places, queue, key, 1 if key is None else min(self.together, share, len(queue)))
        if not queue:
            del self._by_key[key]
        return placement

    def _take(self, seat: S, places: int, queue: deque[_Item[T]], key: Hashable, size: int) -> Placement[S, T]:
        seat.expected = None
        return Placement(seat, places, [queue.popleft().content for _ in range(size)], key)

    def _is_kept(self, seat: S, waiting: int) -> bool:
        """Whether those for whom a seat is kept are still on their way, and nobody else is among the waiting."""
        if seat.expected is None:
            return False
        there = len(self._by_key.get(seat.expected.key, ()))
        return there < seat.expected.count and there == waiting

    def _places(self, key: Hashable, first: _Item[T]) -> int:
        """What the first of a queue takes: all of a host where it may take others along, but for impatience."""
        overdue = self._placed - first.placed > PATIENCE * len(self.seats)
        return 1 if key is None or overdue else PLACES


_NOBODY = object()
