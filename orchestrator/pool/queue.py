"""Scheduling policy of the pool: which queued request goes to which host, and when.

Pure bookkeeping, without Ray, a clock, or locks. The router and the simulation of the pool
(``benchmarks/simulate_pool.py``) both drive it. What an item is does not matter here.

A host has two slots: one item runs while another waits, so that the device never idles. Items go to the least loaded
host, oldest first. Items with equal keys that are queued at the same time run as one batch. A batch needs an idle host
and takes both slots: a short item behind a batch would wait for all of it, and another host may be free. While every
host is busy, items with equal keys accumulate. No host gets more than its share of them, so that no host runs dry.
Requests answered in one batch usually come back together, so their host can be reserved for them for a moment;
otherwise the first to return would run alone.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

SLOTS = 2
"""Items at a host at once: one running, one waiting."""

PATIENCE = 50
"""Items per host that may overtake an item that waits for an idle host. After that it takes any free slot."""

RESERVED_SHARE = 0.1
RESERVED_SECONDS = 1.0

T = TypeVar("T")
"""A queued item."""


def reservation_seconds(call_seconds: float) -> float:
    """How long a host may stay reserved after a call of this duration: a tenth of it, at most a second."""
    return min(RESERVED_SHARE * call_seconds, RESERVED_SECONDS)


@dataclass(frozen=True, eq=False)
class Reservation:
    """A host kept free for ``count`` items of one key that are expected shortly."""

    key: Hashable
    count: int


@dataclass(eq=False)
class HostState:
    """Load of one host, as the queue sees it.

    Attributes:
        in_flight: Occupied slots.
        up: Whether the host may be given work.
        reservation: What the host is kept free for; None: nothing.
    """

    in_flight: int = 0
    up: bool = True
    reservation: Reservation | None = None


H = TypeVar("H", bound=HostState)
"""The caller's own host type."""


@dataclass(eq=False)
class _Item(Generic[T]):
    """A queued item.

    Attributes:
        content: The item.
        number: Position in order of arrival.
        assigned_before: Assignments made before it arrived.
    """

    content: T
    number: int
    assigned_before: int


class Assignment(NamedTuple, Generic[H, T]):
    """A scheduling decision: ``items`` (of one key) run as one call on ``host`` and occupy ``slots``."""

    host: H
    slots: int
    items: list[T]
    key: Hashable


class RequestQueue(Generic[H, T]):
    """Items that wait for a host.

    Args:
        hosts: All hosts.
        max_batch: Largest number of items that run as one call.
    """

    def __init__(self, hosts: Sequence[H], max_batch: int):
        self.hosts, self.max_batch = hosts, max_batch
        self._exclusive: deque[_Item[T]] = deque()
        # Each queue is in order of arrival, and so are the queues' first items.
        self._by_key: dict[Hashable, deque[_Item[T]]] = {}
        self._numbers = itertools.count()
        self._assigned = 0
        self._keyed = 0  # items with a key, queued or at a host

    def __len__(self) -> int:
        # A copy: the metrics thread may call this concurrently.
        return len(self._exclusive) + sum(map(len, list(self._by_key.values())))

    def add(self, content: T, key: Hashable = None, *, exclusive: bool = False) -> None:
        """Queue an item.

        Args:
            content: The item.
            key: Items with equal keys may run as one batch; None: the item runs alone.
            exclusive: The item gets a host to itself. Nothing else is assigned before it is, since otherwise no host
                would become idle.
        """
        queue = self._exclusive if exclusive else self._by_key.setdefault(key, deque())
        queue.append(_Item(content, next(self._numbers), self._assigned))
        self._keyed += key is not None

    def assignments(self) -> Iterator[Assignment[H, T]]:
        """Assign everything that can start now. The iterator must be exhausted at once."""
        while (assignment := self._next()) is not None:
            self._assigned += 1
            assignment.host.in_flight += assignment.slots
            yield assignment

    def release(self, assignment: Assignment[H, T], *, reserve: bool = False) -> Reservation | None:
        """Free the slots of a finished assignment.

        Args:
            assignment: The assignment.
            reserve: Keep the host free until as many items of this key are queued, any other item is queued, or the
                reservation is cancelled. Has no effect for an assignment without a key.

        Returns:
            The reservation, which the caller must cancel after a moment; None if the host is not reserved.
        """
        assignment.host.in_flight -= assignment.slots
        if assignment.key is None:
            return None
        self._keyed -= len(assignment.items)
        assignment.host.reservation = Reservation(assignment.key, len(assignment.items)) if reserve else None
        return assignment.host.reservation

    def cancel(self, host: H, reservation: Reservation) -> None:
        """Cancel a reservation. Does nothing if the host has been assigned work since."""
        if host.reservation is reservation:
            host.reservation = None

    def _next(self) -> Assignment[H, T] | None:
        queued = len(self)
        up = [host for host in self.hosts if host.up]
        available = (host for host in up if not self._is_reserved(host, queued))
        host = min(available, key=lambda host: host.in_flight, default=None)
        if host is None:
            return None
        free_slots = SLOTS - host.in_flight
        if self._exclusive:
            return self._assign(host, SLOTS, self._exclusive, None, 1) if free_slots >= SLOTS else None
        key = min(
            (key for key, queue in self._by_key.items() if self._slots(key, queue[0]) <= free_slots),
            key=lambda key: self._by_key[key][0].number,
            default=_NO_KEY,
        )
        if key is _NO_KEY:
            return None
        queue = self._by_key[key]
        slots = self._slots(key, queue[0])
        share = -(-self._keyed // len(up))
        size = 1 if key is None else min(self.max_batch, share, len(queue))
        assignment = self._assign(host, slots, queue, key, size)
        if not queue:
            del self._by_key[key]
        return assignment

    def _assign(self, host: H, slots: int, queue: deque[_Item[T]], key: Hashable, size: int) -> Assignment[H, T]:
        host.reservation = None
        return Assignment(host, slots, [queue.popleft().content for _ in range(size)], key)

    def _is_reserved(self, host: H, queued: int) -> bool:
        """Whether the items the host is reserved for are still to come, and nothing else is queued."""
        if host.reservation is None:
            return False
        arrived = len(self._by_key.get(host.reservation.key, ()))
        return arrived < host.reservation.count and arrived == queued

    def _slots(self, key: Hashable, first: _Item[T]) -> int:
        """Slots that a queue's next assignment needs: all of a host for a batch, unless its first item is overdue."""
        overdue = self._assigned - first.assigned_before > PATIENCE * len(self.hosts)
        return 1 if key is None or overdue else SLOTS


_NO_KEY = object()
