"""The scheduling policy: every item is assigned once, no host is overloaded, and no item starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pool.queue import PATIENCE, SLOTS, Assignment, HostState, RequestQueue, Reservation


def _assign(queue: RequestQueue[HostState, int]) -> list[tuple[int, list[int]]]:
    """Assign what can start now: the index of each host, and its items."""
    return [(queue.hosts.index(assignment.host), assignment.items) for assignment in queue.assignments()]


def test_items_without_a_key_go_to_the_least_loaded_host_until_all_slots_are_taken() -> None:
    """Each of two hosts gets one item, then a second one; the fifth item waits."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState(), HostState()], max_batch=4)
    for item in range(5):
        queue.add(item)
    assert _assign(queue) == [(0, [0]), (1, [1]), (0, [2]), (1, [3])]
    assert len(queue) == 1


def test_a_host_that_is_down_gets_no_items() -> None:
    """Items wait for the other hosts or, if all hosts are down, for one that comes back."""
    down, up = HostState(up=False), HostState()
    queue: RequestQueue[HostState, int] = RequestQueue([down, up], max_batch=4)
    for item in range(3):
        queue.add(item)
    assert _assign(queue) == [(1, [0]), (1, [1])]
    up.up = False
    assert _assign(queue) == []
    down.up = True
    assert _assign(queue) == [(0, [2])]


def test_items_of_one_key_accumulate_while_every_host_is_busy() -> None:
    """They run in order of arrival, at most ``max_batch`` at a time, and take both slots of an idle host."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=3)
    queue.add(0)
    (first,) = queue.assignments()
    for item in range(1, 6):
        queue.add(item, "b" if item == 3 else "a")
    assert _assign(queue) == [], "one slot is free, but a batch needs an idle host"
    queue.release(first)
    (batch,) = queue.assignments()
    assert (batch.items, batch.slots) == ([1, 2, 4], SLOTS)
    queue.release(batch)
    assert _assign(queue) == [(0, [3])]


def test_no_host_takes_more_than_its_share_of_a_key() -> None:
    """Eight items on two hosts are split four and four. Otherwise the first host would take all eight."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState(), HostState()], max_batch=8)
    for item in range(8):
        queue.add(item, "a")
    first, second = queue.assignments()
    assert (len(first.items), len(second.items)) == (4, 4)


def test_the_share_counts_running_items_but_no_host_that_is_down() -> None:
    """Of three hosts, one is down: 2 running items and 4 queued ones make a share of 3 for each of the others."""
    hosts = [HostState(), HostState(), HostState(up=False)]
    queue: RequestQueue[HostState, int] = RequestQueue(hosts, max_batch=8)
    for item in range(2):
        queue.add(item, "a")
    first, second = queue.assignments()
    for item in range(2, 6):
        queue.add(item, "a")
    queue.add(0, "a")
    queue.release(first)
    assert [assignment.items for assignment in queue.assignments()] == [[2, 3, 4]]
    queue.release(second)
    assert [assignment.items for assignment in queue.assignments()] == [[5, 0]]


def _reservation_after_a_batch(queue: RequestQueue[HostState, int]) -> Reservation:
    """Run two items of key "a" as one batch, and reserve their host for two more."""
    for item in range(2):
        queue.add(item, "a")
    (assignment,) = queue.assignments()
    reservation = queue.release(assignment, reserve=True)
    assert reservation is not None
    return reservation


def test_a_host_is_reserved_for_requests_answered_in_one_batch() -> None:
    """The first to return waits for the second. Otherwise each would run alone forever."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=2)
    _reservation_after_a_batch(queue)
    queue.add(0, "a")
    assert _assign(queue) == []
    queue.add(1, "a")
    assert _assign(queue) == [(0, [0, 1])]


def test_a_cancelled_reservation_frees_the_host() -> None:
    """The second item does not return, since its run has ended."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=2)
    reservation = _reservation_after_a_batch(queue)
    queue.add(0, "a")
    queue.cancel(queue.hosts[0], reservation)
    assert _assign(queue) == [(0, [0])]


def test_an_item_of_another_key_ends_a_reservation() -> None:
    """The expected items can accumulate while the other one runs."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=2)
    _reservation_after_a_batch(queue)
    queue.add(7)
    assert _assign(queue) == [(0, [7])]


def test_cancelling_an_old_reservation_does_not_affect_a_newer_one() -> None:
    """The timer of an earlier call fires while the host is reserved after a later one."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=2)
    old = _reservation_after_a_batch(queue)
    _reservation_after_a_batch(queue)
    queue.cancel(queue.hosts[0], old)
    queue.add(0, "a")
    assert _assign(queue) == []


def test_an_exclusive_item_holds_back_the_others_until_it_is_assigned() -> None:
    """Otherwise a host that always has work would never become idle."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=1)
    queue.add(0)
    queue.add(1)
    first, second = queue.assignments()
    queue.add(2)
    queue.add(3, exclusive=True)
    queue.release(first)
    assert _assign(queue) == []
    queue.release(second)
    (exclusive,) = queue.assignments()
    assert (exclusive.items, exclusive.slots) == ([3], SLOTS)
    queue.release(exclusive)
    assert _assign(queue) == [(0, [2])]


@pytest.mark.parametrize("hosts", [1, 3])
def test_a_stream_of_items_without_a_key_does_not_starve_a_key(hosts: int) -> None:
    """No host is ever idle: after ``PATIENCE`` other items per host, any free slot will do."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState() for _ in range(hosts)], max_batch=2)
    for _ in range(SLOTS * hosts):
        queue.add(0)
    running = list(queue.assignments())
    queue.add(1, "a")
    others = 0
    while 1 not in running[-1].items:
        queue.add(0)
        queue.release(running.pop(0))
        running += queue.assignments()
        others += 1
    assert others == PATIENCE * hosts + 2


@given(
    count=st.integers(1, 4),
    max_batch=st.integers(1, 4),
    events=st.lists(st.sampled_from(["a", "b", None, "exclusive", "done"]), max_size=80),
)
def test_every_item_is_assigned_once_and_no_host_is_overloaded(
    count: int, max_batch: int, events: list[str | None]
) -> None:
    """In any order of arrivals and answers, slots add up, batches have one key and stay in order, and none is left."""
    hosts = [HostState() for _ in range(count)]
    queue: RequestQueue[HostState, tuple[int, str | None]] = RequestQueue(hosts, max_batch)
    running: list[Assignment[HostState, tuple[int, str | None]]] = []
    done: list[int] = []
    reservations: list[tuple[HostState, Reservation | None]] = []
    added = 0

    def assign() -> None:
        for assignment in queue.assignments():
            running.append(assignment)
            keys = {key for _, key in assignment.items}
            numbers = [number for number, _ in assignment.items]
            assert len(keys) == 1
            assert len(numbers) <= (max_batch if keys <= {"a", "b"} else 1)
            assert numbers == sorted(numbers)
        for host in hosts:
            assert host.in_flight == sum(each.slots for each in running if each.host is host) <= SLOTS

    def finish() -> None:
        assignment = running.pop(0)
        done.extend(number for number, _ in assignment.items)
        reservations.append((assignment.host, queue.release(assignment, reserve=True)))

    for event in events:
        if event != "done":
            queue.add((added, event), event if event in ("a", "b") else None, exclusive=event == "exclusive")
            added += 1
        elif running:
            finish()
        assign()
    while running or reservations:
        if running:
            finish()
        else:  # the router does this a moment after each call
            host, reservation = reservations.pop(0)
            if reservation is not None:
                queue.cancel(host, reservation)
        assign()
    assert sorted(done) == list(range(added))
    assert len(queue) == 0
