"""Samples of every solver from the same noise, beside ground truth: what the report and MLflow show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.distillation import to_numpy
from orchestrator.pairs import PairSpec
from orchestrator.pool import Pool, Request
from orchestrator.results import ResultStore, Row
from orchestrator.storage import Storage
from solvers.ns import ThetaArtifact

SAMPLES = 12
FIXED_SHOWN = 3
LEARNED_SHOWN = 4


@dataclass(frozen=True)
class Strip:
    """One solver's samples.

    Attributes:
        title: The solver.
        samples: (N, ...), float32.
        psnr_db: On the whole test set; None for ground truth.
    """

    title: str
    samples: npt.NDArray[np.float32]
    psnr_db: float | None


@dataclass(frozen=True)
class Panel:
    """All solvers at one NFE and guidance scale from the same noise; ground truth first."""

    nfe: int
    guidance_scale: float
    strips: tuple[Strip, ...]


def make_gallery(pool: Pool, storage: Storage, tests: Mapping[float, PairSpec], table: Sequence[Row]) -> list[Panel]:
    """Panels for every NFE and guidance scale: the best learned solvers, the best fixed ones, and Euler.

    Args:
        pool: Hosts of the model.
        storage: Where theta are.
        tests: Test pairs by guidance scale; its first pairs are shown.
        table: The comparison.
    """
    panels = []
    for scale, nfe in sorted({(row.guidance_scale, row.nfe) for row in table}):
        if scale not in tests:
            continue
        shown = _chosen([row for row in table if (row.guidance_scale, row.nfe) == (scale, nfe)])
        pairs, indices = tests[scale].digest, list(range(min(SAMPLES, tests[scale].count)))
        requests = [Request("pictures", {"theta": None, "pairs": pairs, "indices": indices})]
        for row in shown:
            artifact = ThetaArtifact.from_json(ResultStore(storage, row.keys[0]).read_theta(), origin=row.keys[0])
            theta = to_numpy(artifact.solver.flat().to(torch.float64))
            requests.append(Request("pictures", {"theta": theta, "pairs": pairs, "indices": indices}))
        truth, *samples = pool.gather(requests)
        strips = [Strip("Ground truth (dopri5)", truth, None)]
        strips += [
            Strip(row.title, sample, row.metrics.get("psnr_db")) for row, sample in zip(shown, samples, strict=True)
        ]
        panels.append(Panel(nfe, scale, tuple(strips)))
    return panels


def _chosen(found: Sequence[Row]) -> list[Row]:
    ordered = sorted(found, key=lambda row: -row.metrics.get("psnr_db", -np.inf))
    learned = [row for row in ordered if row.kind == "learned"][:LEARNED_SHOWN]
    searched = [row for row in ordered if row.kind == "best grid"][:FIXED_SHOWN]
    common = [row for row in ordered if row.kind == "common grid"]
    # The simplest solver, as a yardstick that everybody knows; else the weakest.
    plain = [row for row in common if row.label == "Euler"] or common[-1:]
    return [*learned, *searched, *plain]
