"""What is evaluated: distilled solvers, fixed ones beside them, and ground truth itself."""

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
        kind: Where it is from.
        name: Its name in tables; with ``nfe`` and ``guidance_scale`` no other has it.
        guidance_scale: 1 is unguided.
        ns: The solver itself; None for ground truth.
        artifact: Of a theta.
        origin: Where theta was found: a path, ``runs:/…`` or ``models:/…``.
        run_id: MLflow run that theta is from, where it is known.
        passes: Forwards plus backwards that its distillation took, where it is known.
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
        """Evaluations a sample; None for ground truth, whose number differs from dataset to dataset."""
        return None if self.ns is None else self.ns.nfe

    @property
    def digest(self) -> str:
        """What its samples follow from: equal for equal numbers of theta."""
        return GROUND_TRUTH if self.ns is None else ThetaArtifact(self.ns).digest[:16]

    @property
    def identity(self) -> tuple[str, str, float]:
        """Two of the same identity are one row of a table."""
        return (self.name, self.digest, self.guidance_scale)

    @property
    def theta(self) -> npt.NDArray[np.float64] | None:
        """Flat, float64; None for ground truth."""
        return None if self.ns is None else self.ns.flat().detach().to(torch.float64).numpy()

    @property
    def order(self) -> tuple[Any, ...]:
        """Rows of a table: ground truth, then by name and NFE."""
        kinds: dict[Kind, int] = {"ground truth": 0, "theta": 1, "baseline": 2}
        return (self.guidance_scale, kinds[self.kind], self.name, self.nfe or 0)
