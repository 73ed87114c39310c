"""The duration of a velocity evaluation, by which a distillation is planned, costs a few evaluations itself."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from orchestrator.hosts.host import Host
from orchestrator.hosts.timing import CALLS, LONG_ENOUGH, time_field
from orchestrator.pairs.ground_truth import NotFiniteError
from orchestrator.pool.requests import LocalPool
from solvers.field import FunctionField
from solvers.schedulers.cond_ot import CondOT

LABELS = {"name": "labels", "options": {"classes": 10}}


def _slow(calls: list[int]) -> FunctionField:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        time.sleep(2 * LONG_ENOUGH)
        return x.neg_()  # in place, as some networks do

    return FunctionField(velocity, CondOT())


def test_a_long_call_is_timed_once_after_one_warm_up() -> None:
    """For a model of half a second per call, three batch sizes take two seconds."""
    calls: list[int] = []
    field = _slow(calls)
    seconds = time_field(lambda condition: field, torch.zeros(8, dtype=torch.int64), (3,), [8, 1, 4, 4])
    assert calls == [1, 1, 4, 8]
    assert list(seconds) == [1, 4, 8]
    assert all(seconds[size] * size >= 2 * LONG_ENOUGH for size in seconds)


def test_a_short_call_is_timed_several_times() -> None:
    """Its duration is decided by chance; the shortest counts."""
    calls: list[int] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return x

    field = FunctionField(velocity, CondOT())
    time_field(lambda condition: field, torch.zeros(2, dtype=torch.int64), (3,), [2])
    assert calls == [2] * (1 + CALLS)


def test_velocities_that_are_not_finite_are_refused() -> None:
    """A network in float16 that overflows would otherwise be planned with."""
    field = FunctionField(lambda x, t: x / 0, CondOT())
    with pytest.raises(NotFiniteError, match=r"the network's first evaluation, at t=0\.5, is not finite for 1 of 1"):
        time_field(lambda condition: field, torch.zeros(1, dtype=torch.int64), (3,), [1])


@pytest.mark.parametrize(("scale", "forwards"), [(1.0, 1), (3.0, 2)])
def test_a_host_counts_all_that_it_spends(pool: LocalPool, scale: float, forwards: int) -> None:
    """Also the evaluations by which a network is checked before its first use; with guidance, two forwards each."""
    host = Host(pool.host.settings)
    timing = host.time_evaluation(LABELS, scale, [1, 16])
    assert timing.forwards == host.work.forwards == forwards * timing.evaluations
    assert set(timing.seconds) == {1, 16}
    assert timing.seconds[16] > 0
    assert timing.state_bytes == 4 * 64
