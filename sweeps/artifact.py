"""The theta artifact of a solver that a sweep or a distillation has found."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.models.facts import ModelFacts
from orchestrator.pool.requests import Pool, Request
from solvers.guided import GuidedSolver
from solvers.ns import NSSolver
from solvers.theta import ThetaArtifact


def theta_artifact(
    facts: ModelFacts,
    pool: Pool,
    solver: NSSolver | GuidedSolver,
    *,
    family: str,
    start: str | None,
    guidance_scale: float,
    sigma0: float,
    pairs: str | None,
    validation_psnr_db: float,
    validation_psnr_db_by_scale: Mapping[float, float] | None = None,
) -> ThetaArtifact:
    """A solver with its provenance.

    Args:
        facts: Facts of the model.
        pool: Hosts of the model.
        solver: The solver, or the solvers of a range of guidance scales.
        family, start: Its family, and the solver that its distillation started from.
        guidance_scale, sigma0: Guidance scale, which a range has not, and preconditioning.
        pairs: Name of the training pairs.
        validation_psnr_db: PSNR on the validation pairs, dB.
        validation_psnr_db_by_scale: For a range, PSNR at each guidance scale of the validation pairs, dB.
    """
    schedule = None
    if isinstance(solver, NSSolver):
        schedule = pool.call(Request.of(HostProtocol.schedule, times=to_numpy(solver.times)))
    return ThetaArtifact(
        solver=solver,
        family=family,
        start=start,
        prediction=facts.prediction,
        scheduler=facts.scheduler.name,
        native_scheduler=facts.native_scheduler,
        guidance_scale=guidance_scale,
        sigma0=sigma0,
        model_digest=facts.digest,
        pairs_digest=pairs,
        validation_psnr_db=validation_psnr_db,
        schedule=schedule,
        validation_psnr_db_by_scale=dict(validation_psnr_db_by_scale or {}),
        packages={name: importlib.metadata.version(name) for name in ("torch", "bespoke-solvers")},
    )
