"""Who is given to which host: nobody is lost, no host is asked too much, and the longest waiting comes first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pool.queue import PATIENCE, PLACES, Expected, Placement, Seat, Waiting


def _placed(waiting: Waiting[Seat, int]) -> list[tuple[int, list[int]]]:
    """Which seat got what, now."""
    return [(waiting.seats.index(placement.seat), placement.items) for placement in waiting.placements()]


def test_lone_work_goes_to_the_least_loaded_host_until_all_places_are_taken() -> None:
    """Two hosts: one item each, then a second each; the fifth waits."""
    waiting: Waiting[Seat, int] = Waiting([Seat(), Seat()], together=4)
    for item in range(5):
        waiting.add(item)
    assert _placed(waiting) == [(0, [0]), (1, [1]), (0, [2]), (1, [3])]
    assert len(waiting) == 1


def test_a_host_that_is_down_gets_nothing() -> None:
    """Whatever waits, waits for the others; where all are down, for one that comes back."""
    down, up = Seat(up=False), Seat()
    waiting: Waiting[Seat, int] = Waiting([down, up], together=4)
    for item in range(3):
        waiting.add(item)
    assert _placed(waiting) == [(1, [0]), (1, [1])]
    up.up = False
    assert _placed(waiting) == []
    down.up = True
    assert _placed(waiting) == [(0, [2])]


def test_items_of_one_key_gather_while_every_host_is_busy() -> None:
    """They take all of a host that is idle, at most so many together, and go in order of arrival."""
    waiting: Waiting[Seat, int] = Waiting([Seat()], together=3)
    waiting.add(0)
    (first,) = waiting.placements()
    for item in range(1, 6):
        waiting.add(item, "b" if item == 3 else "a")
    assert _placed(waiting) == [], "one place is free, and they want an idle host"
    waiting.leave(first)
    (group,) = waiting.placements()
    assert (group.items, group.places) == ([1, 2, 4], PLACES)
    waiting.leave(group)
    assert _placed(waiting) == [(0, [3])]


def test_no_host_takes_more_of_those_who_go_together_than_its_share() -> None:
    """Eight on two hosts are four and four, whoever is free first: or one host would have seven, the other one."""
    waiting: Waiting[Seat, int] = Waiting([Seat(), Seat()], together=8)
    for item in range(8):
        waiting.add(item, "a")
    first, second = waiting.placements()
    assert (len(first.items), len(second.items)) == (4, 4)


def test_the_share_counts_those_who_are_at_other_hosts_and_no_host_that_is_down() -> None:
    """One of three hosts is down: 2 that run and 4 that wait are three for each of the others."""
    seats = [Seat(), Seat(), Seat(up=False)]
    waiting: Waiting[Seat, int] = Waiting(seats, together=8)
    for item in range(2):
        waiting.add(item, "a")
    first, second = waiting.placements()
    for item in range(2, 6):
        waiting.add(item, "a")
    waiting.add(0, "a")
    waiting.leave(first)
    assert [placement.items for placement in waiting.placements()] == [[2, 3, 4]]
    waiting.leave(second)
    assert [placement.items for placement in waiting.placements()] == [[5, 0]]


def _answered_together(waiting: Waiting[Seat, int]) -> Expected:
    """Two of key "a" have been answered, and their host is kept for them."""
    for item in range(2):
        waiting.add(item, "a")
    (placement,) = waiting.placements()
    expected = waiting.leave(placement, keep=True)
    assert expected is not None
    return expected


def test_a_host_is_kept_for_those_who_were_answered_together() -> None:
    """The first that asks again waits for the second, or each would go alone for ever."""
    waiting: Waiting[Seat, int] = Waiting([Seat()], together=2)
    _answered_together(waiting)
    waiting.add(0, "a")
    assert _placed(waiting) == []
    waiting.add(1, "a")
    assert _placed(waiting) == [(0, [0, 1])]


def test_a_host_is_not_kept_any_longer_once_it_is_given_up() -> None:
    """The other one has come to its end and does not ask again."""
    waiting: Waiting[Seat, int] = Waiting([Seat()], together=2)
    expected = _answered_together(waiting)
    waiting.add(0, "a")
    waiting.give_up(waiting.seats[0], expected)
    assert _placed(waiting) == [(0, [0])]


def test_a_host_is_not_kept_from_others() -> None:
    """Somebody else wants it now: those who come back gather while it works."""
    waiting: Waiting[Seat, int] = Waiting([Seat()], together=2)
    _answered_together(waiting)
    waiting.add(7)
    assert _placed(waiting) == [(0, [7])]


def test_giving_up_too_late_takes_nothing_from_who_is_expected_next() -> None:
    """The timer of an earlier call rings while the host is kept after a later one."""
    waiting: Waiting[Seat, int] = Waiting([Seat()], together=2)
    old = _answered_together(waiting)
    _answered_together(waiting)
    waiting.give_up(waiting.seats[0], old)
    waiting.add(0, "a")
    assert _placed(waiting) == []


def test_who_wants_a_host_alone_stops_the_others_until_it_has_one() -> None:
    """Or a host that always has work would never run dry."""
    waiting: Waiting[Seat, int] = Waiting([Seat()], together=1)
    waiting.add(0)
    waiting.add(1)
    first, second = waiting.placements()
    waiting.add(2)
    waiting.add(3, alone=True)
    waiting.leave(first)
    assert _placed(waiting) == []
    waiting.leave(second)
    (alone,) = waiting.placements()
    assert (alone.items, alone.places) == ([3], PLACES)
    waiting.leave(alone)
    assert _placed(waiting) == [(0, [2])]


@pytest.mark.parametrize("hosts", [1, 3])
def test_a_key_is_not_starved_by_a_stream_of_lone_items(hosts: int) -> None:
    """No host is ever idle: after so many others per host, one place will do."""
    waiting: Waiting[Seat, int] = Waiting([Seat() for _ in range(hosts)], together=2)
    for _ in range(PLACES * hosts):
        waiting.add(0)
    running = list(waiting.placements())
    waiting.add(1, "a")
    others = 0
    while 1 not in running[-1].items:
        waiting.add(0)
        waiting.leave(running.pop(0))
        running += waiting.placements()
        others += 1
    assert others == PATIENCE * hosts + 2


@given(
    hosts=st.integers(1, 4),
    together=st.integers(1, 4),
    events=st.lists(st.sampled_from(["a", "b", None, "alone", "done"]), max_size=80),
)
def test_whatever_comes_everything_is_placed_once_and_no_host_is_overfull(
    hosts: int, together: int, events: list[str | None]
) -> None:
    """Any order of arrivals and answers: places add up, groups are of one key and in order, nothing is left."""
    seats = [Seat() for _ in range(hosts)]
    waiting: Waiting[Seat, tuple[int, str | None]] = Waiting(seats, together)
    running: list[Placement[Seat, tuple[int, str | None]]] = []
    done: list[int] = []
    kept: list[tuple[Seat, Expected | None]] = []
    come = 0

    def place() -> None:
        for placement in waiting.placements():
            running.append(placement)
            keys = {key for _, key in placement.items}
            numbers = [number for number, _ in placement.items]
            assert len(keys) == 1
            assert len(numbers) <= (together if keys <= {"a", "b"} else 1)
            assert numbers == sorted(numbers)
        for seat in seats:
            assert seat.in_flight == sum(each.places for each in running if each.seat is seat) <= PLACES

    def answer() -> None:
        placement = running.pop(0)
        done.extend(number for number, _ in placement.items)
        kept.append((placement.seat, waiting.leave(placement, keep=True)))

    for event in events:
        if event != "done":
            waiting.add((come, event), event if event in ("a", "b") else None, alone=event == "alone")
            come += 1
        elif running:
            answer()
        place()
    while running or kept:
        if running:
            answer()
        else:  # as the router does a moment later
            seat, expected = kept.pop(0)
            if expected is not None:
                waiting.give_up(seat, expected)
        place()
    assert sorted(done) == list(range(come))
    assert len(waiting) == 0
