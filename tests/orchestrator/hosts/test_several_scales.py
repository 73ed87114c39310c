"""A host distils one theta on the pairs of several guidance scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from orchestrator.config.pair_plan import PairKey
from orchestrator.hosts.distillation import advance, mean_psnr
from orchestrator.hosts.host import Host
from orchestrator.hosts.runs import AtScale, LearnedRun, State
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import UNIFORM

SCALES = (1.0, 2.0, 3.0)
METHOD = LevenbergMarquardt(iterations=4, batch_size=16, first_batch_size=4, batch_growth=2.0, training_pairs=16)


@pytest.fixture(scope="module")
def storage_of_scales(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage.at(tmp_path_factory.mktemp("scales"))


@pytest.fixture(scope="module")
def host(storage_of_scales: Storage, host_settings: Callable[..., HostSettings]) -> Host:
    return Host(host_settings(storage_of_scales))


@pytest.fixture(scope="module")
def sets(storage_of_scales: Storage, host: Host, specs: dict[PairKey, PairSpec]) -> tuple[AtScale, ...]:
    """Sixteen training pairs at each scale."""
    train = specs[PairKey("train", 1.0, 0)]
    each = [
        dataclasses.replace(train, guidance_scale=w, count=16, batch_size=16, shard_size=16, rtol=1e-3, atol=1e-3)
        for w in SCALES
    ]
    ensure_pairs(storage_of_scales, each, LocalPool(host), wait=True, announce=lambda sentence: None)
    return tuple(AtScale(spec.guidance_scale, spec.name) for spec in each)


@pytest.fixture(scope="module")
def run(sets: tuple[AtScale, ...]) -> LearnedRun:
    options = {"low": 1.0, "high": 3.0}
    return LearnedRun(family="bns_guided", options=options, sigma0=1.0, train=sets, method=METHOD)


@pytest.fixture(scope="module")
def start(run: LearnedRun, facts: ModelFacts) -> State:
    return METHOD.begin(run.build().start(GridSolver(Midpoint(), 4, UNIFORM), facts.scheduler))


def test_one_theta_is_validated_at_each_scale(
    host: Host, run: LearnedRun, start: State, sets: tuple[AtScale, ...], facts: ModelFacts
) -> None:
    """Every validation has the PSNR of each scale, and their mean; the run gains at all of them."""
    pool = LocalPool(host)
    before = host.advance(run, start, 0, validation=sets).validated[-1]
    after = host.advance(run, start, 4, validation=sets).validated[-1]
    solvers = [run.solver(after["parameters"], facts.scheduler, scale) for scale in SCALES]
    each = [mean_psnr(solver, s.pairs, pool.gather) for solver, s in zip(solvers, sets, strict=True)]
    assert after["each_psnr_db"] == pytest.approx(each)
    assert after["psnr_db"] == pytest.approx(sum(each) / 3)
    gains = [b - a for a, b in zip(before["each_psnr_db"], each, strict=True)]
    assert min(gains) > 3


def test_a_run_over_the_pool_and_a_resumed_one_equal_that_on_a_host(
    host: Host, run: LearnedRun, start: State, sets: tuple[AtScale, ...], facts: ModelFacts
) -> None:
    """To the bit: blocks of every set are asked for at once, and summed in a fixed order."""
    on_host = host.advance(run, start, 4)
    asked: list[list[str]] = []

    def ask(requests: Sequence[Request[Any]]) -> list[Any]:
        asked.append([request.arguments["pairs"] for request in requests])
        return LocalPool(host).gather(requests)

    over_pool = advance(run, start, 4, facts.scheduler, ask)
    resumed = host.advance(run, host.advance(run, start, 1), 3)
    assert on_host.parameters == over_pool.parameters == resumed.parameters
    assert asked[0] == [each.pairs for each in sets]
