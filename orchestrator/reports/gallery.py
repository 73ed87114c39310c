"""Samples of every solver and of ground truth from the same noise, for reports and MLflow.

Samples are decoration: those that cannot be made cost a sentence, never the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.errors import Failure
from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.log import record
from orchestrator.models.facts import ModelFacts
from orchestrator.models.kinds import Kind
from orchestrator.pairs import PairSpec
from orchestrator.pool.requests import Pool, Request
from orchestrator.results.store import ResultStore, Row
from orchestrator.storage import Storage
from solvers.theta import ThetaArtifact

SAMPLES = 12
"""Samples per solver in the report of a sweep; :data:`MOST` and :data:`SCATTERED` apply as well."""
SCATTERED = 512
"""Vectors per solver, each a dot."""
FIXED_SHOWN = 3
LEARNED_SHOWN = 4
HEARD = 4
"""Samples per solver that have an audio player."""
MOST: dict[Kind, int] = {"sound": HEARD, "series": 4, "trajectory": 3, "points": 6, "video": 2}
"""Most samples per solver that fit into a figure, for kinds whose samples take more room than a picture."""
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
        waves: The first M samples as sound, (M, samples); None without sound.
        rate: Sampling rate of the sound, in samples per second; None without sound.
    """

    name: str
    samples: npt.NDArray[np.float32]
    psnr_db: float | None
    waves: npt.NDArray[np.float32] | None = None
    rate: int | None = None


@dataclass(frozen=True)
class Panel:
    """Samples of several solvers at one NFE and guidance scale from the same noise.

    Attributes:
        nfe: Velocity evaluations of the solvers.
        guidance_scale: Guidance scale.
        strips: One per solver; ground truth comes first. Empty if ``missing``.
        missing: Why there are no samples; None if there are.
    """

    nfe: int
    guidance_scale: float
    strips: tuple[Strip, ...]
    missing: str | None = None

    @property
    def compared(self) -> tuple[Strip, ...]:
        """What is drawn over ground truth: the solvers, or ground truth itself if it is alone."""
        return self.strips[1:] or self.strips

    @classmethod
    def sampled(
        cls,
        pool: Pool,
        facts: ModelFacts,
        pairs: PairSpec,
        nfe: int,
        solvers: Sequence[Entry],
        count: int = SAMPLES,
        *,
        most: int | None = None,
    ) -> Panel:
        """Sample these solvers from the noise of the first pairs, at the guidance scale of the pairs.

        Args:
            pool: Hosts of the model.
            facts: The model.
            pairs: Spec of the pair set.
            nfe: Velocity evaluations of the solvers.
            solvers: Name, theta and PSNR of each solver.
            count: Maximum number of samples per solver; fewer or more if samples are not pictures.
            most: Maximum whatever the kind of samples; None: none.

        Returns:
            The panel, whatever fails: ``missing`` then has the reason.
        """
        try:
            return cls(nfe, pairs.guidance_scale, _strips(pool, facts, pairs, solvers, count, most))
        except Exception as error:  # of a decoder, for example
            failure = Failure.of(error)
            record(f"samples at NFE {nfe}", failure.details)
            return cls(nfe, pairs.guidance_scale, (), failure.reason)


def make_gallery(
    pool: Pool, storage: Storage, tests: Mapping[float, PairSpec], table: Sequence[Row], facts: ModelFacts
) -> list[Panel]:
    """One panel per NFE and guidance scale, with the best learned solvers, the best fixed solvers, and Euler.

    Args:
        pool: Hosts of the model.
        storage: Storage of the thetas.
        tests: Test pair specs by guidance scale; the samples start from the noise of the first pairs.
        table: Rows of the comparison.
        facts: The model.
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
        panels.append(Panel.sampled(pool, facts, tests[scale], nfe, solvers))
    return panels


def _strips(
    pool: Pool, facts: ModelFacts, pairs: PairSpec, solvers: Sequence[Entry], count: int, most: int | None
) -> tuple[Strip, ...]:
    count = SCATTERED if facts.kind == "vectors" else min(count, MOST.get(facts.kind, count))
    count = count if most is None else min(count, most)
    indices = list(range(min(count, pairs.count)))
    pictures = pool.gather(
        [Request.of(HostProtocol.pictures, theta=theta, pairs=pairs.name, indices=indices) for _, theta, _ in solvers]
    )
    waves: Sequence[npt.NDArray[np.float32] | None] = [None] * len(solvers)
    if facts.rate is not None:
        waves = pool.gather(
            [Request.of(HostProtocol.sound, theta=theta, pairs=pairs.name, indices=indices) for _, theta, _ in solvers]
        )
    return tuple(
        Strip(name, samples, psnr_db, sound, facts.rate)
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
