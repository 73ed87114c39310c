"""Scores of a solver from all hosts of the pool, and galleries of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from orchestrator.config.pair_plan import PairKey
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.reports.gallery import SAMPLES, make_gallery
from orchestrator.results import scoring as evaluate_module
from orchestrator.results.scoring import evaluate
from orchestrator.results.store import Kind, ResultStore, Row
from orchestrator.storage import Storage
from solvers.families import GridSolver
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.ns import NSSolver
from solvers.theta import ThetaArtifact


@pytest.fixture
def solver(facts: ModelFacts) -> NSSolver:
    """Midpoint at 4 evaluations."""
    return GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler)


@pytest.fixture
def pairs(specs: dict[PairKey, PairSpec]) -> str:
    """Digest of the 40 test pairs."""
    return specs[PairKey("test", 1.0, 0)].name


def test_scoring_in_chunks_equals_scoring_at_once(
    pool: LocalPool, solver: NSSolver, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means, standard errors and counts do not depend on how the pairs are split over hosts."""
    metrics = ["psnr", "snr", "rmse"]
    at_once = evaluate(pool, solver, pairs, metrics)
    monkeypatch.setattr(evaluate_module, "CHUNK", 7)
    in_chunks = evaluate(pool, solver, pairs, metrics, count=40)
    assert set(at_once) == set(in_chunks) == {"psnr_db", "snr_db", "rmse"}
    for column, summary in at_once.items():
        assert summary["count"] == in_chunks[column]["count"] == 40
        assert summary["not_finite"] == 0
        assert in_chunks[column]["mean"] == pytest.approx(summary["mean"], rel=1e-5)
        assert in_chunks[column]["stderr"] == pytest.approx(summary["stderr"], rel=1e-4)


def test_a_finer_solver_scores_higher(pool: LocalPool, facts: ModelFacts, pairs: str) -> None:
    """More evaluations bring samples nearer to ground truth, by every metric."""
    coarse, fine = (
        evaluate(pool, GridSolver(Midpoint(), nfe, Grid()).to_ns(facts.scheduler), pairs, ["psnr", "snr", "rmse"])
        for nfe in (4, 16)
    )
    assert fine["psnr_db"]["mean"] > coarse["psnr_db"]["mean"] + 5
    assert fine["snr_db"]["mean"] > coarse["snr_db"]["mean"] + 5
    assert fine["rmse"]["mean"] < coarse["rmse"]["mean"]


def _row(label: str, kind: Kind, key: str, psnr: float) -> Row:
    values: dict[str, Any] = {"metrics": {"psnr_db": psnr}, "stderr": {"psnr_db": 0.1}, "seeds": 1}
    cell = {"nfe": 4, "guidance_scale": 1.0, "sigma0": 1.0, "detail": "uniform"}
    return Row(label=label, kind=kind, keys=(key,), forwards=0, backwards=0, **cell, **values)


def test_a_panel_shows_samples_of_solvers_beside_ground_truth(
    pool: LocalPool,
    copied: Storage,
    host_settings: Callable[..., HostSettings],
    facts: ModelFacts,
    specs: dict[PairKey, PairSpec],
    pairs: str,
) -> None:
    """From the same noise: ground truth, learned solvers, the best fixed one and Euler, each with its PSNR."""
    for key, family in (("euler", Euler()), ("midpoint", Midpoint())):
        theta = ThetaArtifact(GridSolver(family, 4, Grid()).to_ns(facts.scheduler)).to_json()
        copied.write(ResultStore(copied, key).theta_key, theta.encode())
    table = [
        _row("Euler", "common grid", "euler", 20.0),
        _row("Midpoint", "best grid", "midpoint", 30.0),
        _row("Midpoint", "common grid", "midpoint", 25.0),
        _row("BNS", "start", "midpoint", 30.0),
        _row("BNS", "learned", "midpoint", 40.0),
    ]
    (panel,) = make_gallery(
        LocalPool(Host(host_settings(copied))), copied, {1.0: specs[PairKey("test", 1.0, 0)]}, table, facts
    )
    assert [(strip.name, strip.psnr_db) for strip in panel.strips] == [
        ("Ground truth (dopri5)", None),
        ("BNS", 40.0),
        ("Midpoint, best grid", 30.0),
        ("Euler", 20.0),
    ]
    assert all(strip.samples.shape == (SAMPLES, 1, 8, 8) for strip in panel.strips)
    truth = pool.call(Request.of(HostProtocol.pictures, theta=None, pairs=pairs, indices=range(SAMPLES)))
    np.testing.assert_array_equal(panel.strips[0].samples, truth)
    errors = [float(np.square(strip.samples - panel.strips[0].samples).mean()) for strip in panel.strips]
    assert errors[0] == 0
    assert 0 < errors[1] == errors[2] < errors[3]


def test_a_gallery_may_have_fewer_test_pairs_than_samples(
    copied: Storage, host_settings: Callable[..., HostSettings], facts: ModelFacts, specs: dict[PairKey, PairSpec]
) -> None:
    """A quick sweep with a handful of pairs must not fail after all the work."""
    small = dataclasses.replace(specs[PairKey("test", 1.0, 0)], count=5)
    pool = LocalPool(Host(host_settings(copied)))
    ensure_pairs(copied, [small], pool, wait=False, announce=lambda sentence: None)
    theta = ThetaArtifact(GridSolver(Euler(), 4, Grid()).to_ns(facts.scheduler)).to_json()
    copied.write(ResultStore(copied, "euler").theta_key, theta.encode())
    (panel,) = make_gallery(pool, copied, {1.0: small}, [_row("Euler", "common grid", "euler", 20.0)], facts)
    assert all(len(strip.samples) == 5 for strip in panel.strips)
