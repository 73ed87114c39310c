"""Samples of every solver from the same noise, beside ground truth: what the report and MLflow show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.hosts.distillation import to_numpy
from orchestrator.pairs import PairSpec
from orchestrator.pool.requests import Pool, Request
from orchestrator.results.store import ResultStore, Row
from orchestrator.storage import Storage
from solvers.theta import ThetaArtifact

SAMPLES = 12
FIXED_SHOWN = 3
LEARNED_SHOWN = 4
HEARD = 4
"""Samples that can be listened to."""
GROUND_TRUTH = "Ground truth (dopri5)"

Entry = tuple[str, npt.NDArray[np.float64] | None, float | None]
"""Name, theta (None: ground truth) and PSNR of a solver that is shown."""


@dataclass(frozen=True)
class Strip:
    """One solver's samples.

    Attributes:
        name: The solver.
        samples: (N, ...), float32.
        psnr_db: On the whole test set; None for ground truth.
        waves: The first of them as sound, (M, samples); None for pictures.
        rate: Samples a second.
    """

    name: str
    samples: npt.NDArray[np.float32]
    psnr_db: float | None
    waves: npt.NDArray[np.float32] | None = None
    rate: int | None = None


@dataclass(frozen=True)
class Panel:
    """All solvers at one NFE and guidance scale from the same noise; ground truth first."""

    nfe: int
    guidance_scale: float
    strips: tuple[Strip, ...]


def make_gallery(
    pool: Pool, storage: Storage, tests: Mapping[float, PairSpec], table: Sequence[Row], rate: int | None = None
) -> list[Panel]:
    """Panels for every NFE and guidance scale: the best learned solvers, the best fixed ones, and Euler.

    Args:
        pool: Hosts of the model.
        storage: Where theta are.
        tests: Test pairs by guidance scale; its first pairs are shown.
        table: The comparison.
        rate: Of a model of sound: samples a second.
    """
    panels = []
    for scale, nfe in sorted({(row.guidance_scale, row.nfe) for row in table}):
        if scale not in tests:
            continue
        shown = _chosen([row for row in table if (row.guidance_scale, row.nfe) == (scale, nfe)])
        solvers: list[Entry] = [(GROUND_TRUTH, None, None)]
        for row in shown:
            artifact = ThetaArtifact.from_json(ResultStore(storage, row.keys[0]).read_theta(), origin=row.keys[0])
            theta = to_numpy(artifact.solver.flat().to(torch.float64))
            solvers.append((row.name, theta, row.metrics.get("psnr_db")))
        panels.append(Panel(nfe, scale, make_strips(pool, tests[scale], solvers, rate)))
    return panels


def make_strips(
    pool: Pool, pairs: PairSpec, solvers: Sequence[Entry], rate: int | None, count: int = SAMPLES
) -> tuple[Strip, ...]:
    """Samples of these solvers from the noise of the first pairs.

    Args:
        pool: Hosts of the model.
        pairs: The pair set.
        solvers: Name, theta and PSNR of each.
        rate: Of a model of sound: samples a second.
        count: How many samples.
    """
    indices = list(range(min(count, pairs.count)))

    def asked(method: str, indices: list[int]) -> list[npt.NDArray[np.float32]]:
        return pool.gather(
            [Request(method, {"theta": theta, "pairs": pairs.digest, "indices": indices}) for _, theta, _ in solvers]
        )

    pictures = asked("pictures", indices)
    waves: Sequence[npt.NDArray[np.float32] | None] = [None] * len(solvers)
    if rate is not None:
        waves = asked("sound", indices[:HEARD])
    return tuple(
        Strip(name, samples, psnr_db, heard, rate)
        for (name, _, psnr_db), samples, heard in zip(solvers, pictures, waves, strict=True)
    )


def _chosen(found: Sequence[Row]) -> list[Row]:
    ordered = sorted(found, key=lambda row: -row.metrics.get("psnr_db", -np.inf))
    learned = [row for row in ordered if row.kind == "learned"][:LEARNED_SHOWN]
    searched = [row for row in ordered if row.kind == "best grid"][:FIXED_SHOWN]
    common = [row for row in ordered if row.kind == "common grid"]
    # The simplest solver, as a yardstick that everybody knows; else the weakest.
    plain = [row for row in common if row.label == "Euler"] or common[-1:]
    return [*learned, *searched, *plain]
