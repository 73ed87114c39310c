"""The solvers of an evaluation: distilled thetas, fixed baselines, and ground truth itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from solvers.ns import NSSolver
from solvers.theta import ThetaArtifact

Kind = Literal["ground truth", "baseline", "theta"]
GROUND_TRUTH = "ground-truth"


@dataclass(frozen=True, kw_only=True)
class EvaluatedSolver:
    """One solver at one guidance scale.

    Attributes:
        kind: Ground truth, fixed baseline or distilled theta.
        name: Name in tables, unique for each ``nfe`` and ``guidance_scale``.
        guidance_scale: Guidance scale; 1 is unguided.
        ns: The solver itself; None for ground truth.
        artifact: The theta artifact; None for baselines and ground truth.
        origin: Location that theta was loaded from: a path, ``runs:/…`` or ``models:/…``.
        run_id: MLflow run that theta comes from, if known.
        passes: Forwards plus backwards that the distillation took, if known.
    """

    kind: Kind
    name: str
    guidance_scale: float
    ns: NSSolver | None = None
    artifact: ThetaArtifact | None = None
    origin: str | None = None
    run_id: str | None = None
    passes: float | None = None

    @property
    def nfe(self) -> int | None:
        """Evaluations per sample; None for ground truth, whose number varies with the dataset."""
        return None if self.ns is None else self.ns.nfe

    @property
    def digest(self) -> str:
        """Digest that identifies the solver's samples: equal for equal theta."""
        return GROUND_TRUTH if self.ns is None else ThetaArtifact(self.ns).digest[:16]

    @property
    def identity(self) -> tuple[str, str, float]:
        """Key of a table row: solvers with equal identity share one row."""
        return (self.name, self.digest, self.guidance_scale)

    @property
    def theta(self) -> npt.NDArray[np.float64] | None:
        """The flat theta, float64; None for ground truth."""
        return None if self.ns is None else self.ns.flat().detach().to(torch.float64).numpy()

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key of table rows: guidance scale, ground truth before thetas before baselines, then name and NFE."""
        kinds: dict[Kind, int] = {"ground truth": 0, "theta": 1, "baseline": 2}
        return (self.guidance_scale, kinds[self.kind], self.name, self.nfe or 0)
