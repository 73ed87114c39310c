"""Scores theta on pair sets, split over the pool. Independent of how theta was obtained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from orchestrator import plugins
from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.metrics.base import summarise
from orchestrator.pool.requests import Pool, Request
from solvers.ns import NSSolver

CHUNK = 512
"""Pairs per request: small enough to spread over the hosts, large enough to fill one."""


def evaluate(
    pool: Pool, solver: NSSolver, pairs: str, metrics: Sequence[str], count: int | None = None
) -> dict[str, dict[str, float]]:
    """Mean, standard error and count of each metric on a pair set, by the metric's column.

    Args:
        pool: Hosts of the model that the pairs belong to.
        solver: The solver with this theta.
        pairs: Name of the pairs.
        metrics: Metric plugins.
        count: Number of pairs in the set, to split it over the hosts; None: one request for the whole set.
    """
    theta = to_numpy(solver.flat())
    chunks: list[list[int] | None] = [None]
    if count is not None:
        chunks = [list(range(first, min(first + CHUNK, count))) for first in range(0, count, CHUNK)]
    parts = pool.gather(
        [
            Request.of(HostProtocol.score, theta=theta, pairs=pairs, metrics=list(metrics), indices=chunk)
            for chunk in chunks
        ]
    )
    return {
        plugins.build("metrics", name).column: asdict(
            summarise(np.concatenate([part[name] for part in parts]).tolist())
        )
        for name in metrics
    }
