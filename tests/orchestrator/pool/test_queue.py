"""Who is given to which host: nobody is lost, no host is asked too much, and the longest queue comes first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pool.queue import PATIENCE, SLOTS, Assignment, HostState, RequestQueue, Reservation


def _placed(queue: RequestQueue[HostState, int]) -> list[tuple[int, list[int]]]:
    """Which host got what, now."""
    return [(queue.hosts.index(assignment.host), assignment.items) for assignment in queue.assignments()]


def test_lone_work_goes_to_the_least_loaded_host_until_all_places_are_taken() -> None:
    """Two hosts: one item each, then a second each; the fifth waits."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState(), HostState()], max_batch=4)
    for item in range(5):
        queue.add(item)
    assert _placed(queue) == [(0, [0]), (1, [1]), (0, [2]), (1, [3])]
    assert len(queue) == 1


def test_a_host_that_is_down_gets_nothing() -> None:
    """Whatever waits, waits for the others; where all are down, for one that comes back."""
    down, up = HostState(up=False), HostState()
    queue: RequestQueue[HostState, int] = RequestQueue([down, up], max_batch=4)
    for item in range(3):
        queue.add(item)
    assert _placed(queue) == [(1, [0]), (1, [1])]
    up.up = False
    assert _placed(queue) == []
    down.up = True
    assert _placed(queue) == [(0, [2])]


def test_items_of_one_key_gather_while_every_host_is_busy() -> None:
    """They take all of a host that is idle, at most so many max_batch, and go in order of arrival."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=3)
    queue.add(0)
    (first,) = queue.assignments()
    for item in range(1, 6):
        queue.add(item, "b" if item == 3 else "a")
    assert _placed(queue) == [], "one place is free, and they want an idle host"
    queue.release(first)
    (group,) = queue.assignments()
    assert (group.items, group.slots) == ([1, 2, 4], SLOTS)
    queue.release(group)
    assert _placed(queue) == [(0, [3])]


def test_no_host_takes_more_of_those_who_go_together_than_its_share() -> None:
    """Eight on two hosts are four and four, whoever is free first: or one host would have seven, the other one."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState(), HostState()], max_batch=8)
    for item in range(8):
        queue.add(item, "a")
    first, second = queue.assignments()
    assert (len(first.items), len(second.items)) == (4, 4)


def test_the_share_counts_those_who_are_at_other_hosts_and_no_host_that_is_down() -> None:
    """One of three hosts is down: 2 that run and 4 that wait are three for each of the others."""
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


def _answered_together(queue: RequestQueue[HostState, int]) -> Reservation:
    """Two of key "a" have been answered, and their host is kept for them."""
    for item in range(2):
        queue.add(item, "a")
    (assignment,) = queue.assignments()
    reservation = queue.release(assignment, reserve=True)
    assert reservation is not None
    return reservation


def test_a_host_is_kept_for_those_who_were_answered_together() -> None:
    """The first that asks again waits for the second, or each would go exclusive for ever."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=2)
    _answered_together(queue)
    queue.add(0, "a")
    assert _placed(queue) == []
    queue.add(1, "a")
    assert _placed(queue) == [(0, [0, 1])]


def test_a_host_is_not_kept_any_longer_once_it_is_given_up() -> None:
    """The other one has come to its end and does not ask again."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=2)
    reservation = _answered_together(queue)
    queue.add(0, "a")
    queue.cancel(queue.hosts[0], reservation)
    assert _placed(queue) == [(0, [0])]


def test_a_host_is_not_kept_from_others() -> None:
    """Somebody else wants it now: those who come back gather while it works."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=2)
    _answered_together(queue)
    queue.add(7)
    assert _placed(queue) == [(0, [7])]


def test_giving_up_too_late_takes_nothing_from_who_is_expected_next() -> None:
    """The timer of an earlier call rings while the host is kept after a later one."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=2)
    old = _answered_together(queue)
    _answered_together(queue)
    queue.cancel(queue.hosts[0], old)
    queue.add(0, "a")
    assert _placed(queue) == []


def test_who_wants_a_host_alone_stops_the_others_until_it_has_one() -> None:
    """Or a host that always has work would never run dry."""
    queue: RequestQueue[HostState, int] = RequestQueue([HostState()], max_batch=1)
    queue.add(0)
    queue.add(1)
    first, second = queue.assignments()
    queue.add(2)
    queue.add(3, exclusive=True)
    queue.release(first)
    assert _placed(queue) == []
    queue.release(second)
    (exclusive,) = queue.assignments()
    assert (exclusive.items, exclusive.slots) == ([3], SLOTS)
    queue.release(exclusive)
    assert _placed(queue) == [(0, [2])]


@pytest.mark.parametrize("hosts", [1, 3])
def test_a_key_is_not_starved_by_a_stream_of_lone_items(hosts: int) -> None:
    """No host is ever idle: after so many others per host, one place will do."""
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
    hosts=st.integers(1, 4),
    max_batch=st.integers(1, 4),
    events=st.lists(st.sampled_from(["a", "b", None, "exclusive", "done"]), max_size=80),
)
def test_whatever_comes_everything_is_placed_once_and_no_host_is_overfull(
    hosts: int, max_batch: int, events: list[str | None]
) -> None:
    """Any order of arrivals and answers: slots add up, groups are of one key and in order, nothing is left."""
    hosts = [HostState() for _ in range(hosts)]
    queue: RequestQueue[HostState, tuple[int, str | None]] = RequestQueue(hosts, max_batch)
    running: list[Assignment[HostState, tuple[int, str | None]]] = []
    done: list[int] = []
    kept: list[tuple[HostState, Reservation | None]] = []
    come = 0

    def place() -> None:
        for assignment in queue.assignments():
            running.append(assignment)
            keys = {key for _, key in assignment.items}
            numbers = [number for number, _ in assignment.items]
            assert len(keys) == 1
            assert len(numbers) <= (max_batch if keys <= {"a", "b"} else 1)
            assert numbers == sorted(numbers)
        for host in hosts:
            assert host.in_flight == sum(each.slots for each in running if each.host is host) <= SLOTS

    def answer() -> None:
        assignment = running.pop(0)
        done.extend(number for number, _ in assignment.items)
        kept.append((assignment.host, queue.release(assignment, reserve=True)))

    for event in events:
        if event != "done":
            queue.add((come, event), event if event in ("a", "b") else None, exclusive=event == "exclusive")
            come += 1
        elif running:
            answer()
        place()
    while running or kept:
        if running:
            answer()
        else:  # as the router does a moment later
            host, reservation = kept.pop(0)
            if reservation is not None:
                queue.cancel(host, reservation)
        place()
    assert sorted(done) == list(range(come))
    assert len(queue) == 0
