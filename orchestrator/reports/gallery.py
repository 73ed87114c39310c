"""Samples of every solver and of ground truth from the same noise, for reports and MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.pairs import PairSpec
from orchestrator.pool.requests import Pool, Request
from orchestrator.results.store import ResultStore, Row
from orchestrator.storage import Storage
from solvers.theta import ThetaArtifact

SAMPLES = 12
FIXED_SHOWN = 3
LEARNED_SHOWN = 4
HEARD = 4
"""Samples per solver that have an audio player."""
DIFFERENCE_GAIN = 4
"""Factor by which differences from ground truth are amplified."""
GROUND_TRUTH = "Ground truth (dopri5)"

Entry = tuple[str, npt.NDArray[np.float64] | None, float | None]
"""Name, theta (None for ground truth) and PSNR of a solver to show."""


@dataclass(frozen=True)
class Strip:
    """One solver's samples.

    Attributes:
        name: Name of the solver.
        samples: Decoded samples, (N, ...), float32.
        psnr_db: PSNR over all test pairs; None for ground truth.
        waves: The first M samples as sound, (M, samples); None for images.
        rate: Sampling rate of the sound, in samples per second; None for images.
    """

    name: str
    samples: npt.NDArray[np.float32]
    psnr_db: float | None
    waves: npt.NDArray[np.float32] | None = None
    rate: int | None = None


@dataclass(frozen=True)
class Panel:
    """Samples of several solvers at one NFE and guidance scale from the same noise; ground truth comes first."""

    nfe: int
    guidance_scale: float
    strips: tuple[Strip, ...]


def make_gallery(
    pool: Pool, storage: Storage, tests: Mapping[float, PairSpec], table: Sequence[Row], rate: int | None = None
) -> list[Panel]:
    """One panel per NFE and guidance scale, with the best learned solvers, the best fixed solvers, and Euler.

    Args:
        pool: Hosts of the model.
        storage: Storage of the thetas.
        tests: Test pair specs by guidance scale; the samples start from the noise of the first pairs.
        table: Rows of the comparison.
        rate: Sampling rate of an audio model, in samples per second; None for images.
    """
    panels = []
    for scale, nfe in sorted({(row.guidance_scale, row.nfe) for row in table}):
        if scale not in tests:
            continue
        chosen = _chosen([row for row in table if (row.guidance_scale, row.nfe) == (scale, nfe)])
        solvers: list[Entry] = [(GROUND_TRUTH, None, None)]
        for row in chosen:
            artifact = ThetaArtifact.from_json(ResultStore(storage, row.keys[0]).read_theta(), origin=row.keys[0])
            theta = to_numpy(artifact.solver.flat().to(torch.float64))
            solvers.append((row.name, theta, row.metrics.get("psnr_db")))
        panels.append(Panel(nfe, scale, make_strips(pool, tests[scale], solvers, rate)))
    return panels


def make_strips(
    pool: Pool, pairs: PairSpec, solvers: Sequence[Entry], rate: int | None, count: int = SAMPLES
) -> tuple[Strip, ...]:
    """Sample these solvers from the noise of the first pairs.

    Args:
        pool: Hosts of the model.
        pairs: Spec of the pair set.
        solvers: Name, theta and PSNR of each solver.
        rate: Sampling rate of an audio model, in samples per second; None for images.
        count: Maximum number of samples per solver.
    """
    indices = list(range(min(count, pairs.count)))

    pictures = pool.gather(
        [Request.of(HostProtocol.pictures, theta=theta, pairs=pairs.name, indices=indices) for _, theta, _ in solvers]
    )
    waves: Sequence[npt.NDArray[np.float32] | None] = [None] * len(solvers)
    if rate is not None:
        heard = indices[:HEARD]
        waves = pool.gather(
            [Request.of(HostProtocol.sound, theta=theta, pairs=pairs.name, indices=heard) for _, theta, _ in solvers]
        )
    return tuple(
        Strip(name, samples, psnr_db, sound, rate)
        for (name, _, psnr_db), samples, sound in zip(solvers, pictures, waves, strict=True)
    )


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """The rows to show: the best learned solvers, the best fixed solvers, and Euler."""
    ordered = sorted(rows, key=lambda row: -row.metrics.get("psnr_db", -np.inf))
    learned = [row for row in ordered if row.kind == "learned"][:LEARNED_SHOWN]
    searched = [row for row in ordered if row.kind == "best grid"][:FIXED_SHOWN]
    common = [row for row in ordered if row.kind == "common grid"]
    # Euler is the best-known reference; without it, show the weakest fixed solver on its common grid.
    plain = [row for row in common if row.label == "Euler"] or common[-1:]
    return [*learned, *searched, *plain]
