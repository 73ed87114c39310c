"""``diffusers``: theta as a scheduler for the pipeline it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.export.base import Exporter, ExportError, check_artifact
from orchestrator.models._diffusers_networks import DiT
from orchestrator.models.diffusers import DTYPES, DiffusersModel, load_pipeline, pipeline_index
from solvers.ns import InvalidThetaError
from solvers.schedulers import DiscreteVP
from solvers.theta import ThetaArtifact

LARGEST_START_DEVIATION = 0.01
"""Of a_0 from 1, in pipelines that start from their noise whatever the scheduler says."""

_DIT_NULL_CLASS = 1000
"""The class that DiTPipeline takes for a dropped label, whatever the network's number of classes."""


def ns_scheduler(
    artifact: ThetaArtifact, pipe: Any, *, guidance_scale: float | None = None, allow_transfer: bool = False
) -> Any:
    """theta as the scheduler of a pipeline in memory: ``pipe.scheduler = ns_scheduler(theta, pipe)``.

    Args:
        artifact: The solver with its provenance.
        pipe: The diffusers pipeline that it was made for; its networks are frozen.
        guidance_scale: What the pipeline will be called with, to be checked; None for theta's own.
        allow_transfer: Whether to take a theta of another model.

    Returns:
        An ``NSScheduler``; its ``config`` has theta's ``guidance_scale``.

    Raises:
        InvalidThetaError: theta was made for another model, prediction, path or guidance.
        ExportError: The pipeline cannot do what theta needs.
        ConfigError: There is no adapter for the pipeline.
    """
    from orchestrator.export.ns_scheduler import FLOW, NSScheduler

    artifact = check_artifact(artifact)
    model = DiffusersModel.of(pipe)
    _check(artifact, model, guidance_scale, allow_transfer)
    solver, native = artifact.solver, model.native
    betas = native.betas if isinstance(native, DiscreteVP) else None
    return NSScheduler(
        times=solver.times.tolist(),
        a=solver.a.tolist(),
        b=[row[:k] for k, row in enumerate(solver.b.tolist())],
        prediction_type=FLOW if model.network.is_flow else model.prediction,
        trained_betas=None if betas is None else list(betas),
        num_train_timesteps=1000 if betas is None else len(betas),
        guidance_scale=float(artifact.guidance_scale),
        model_digest=artifact.model_digest,
        use_flow_sigmas=model.network.is_flow,
    )


def _check(artifact: ThetaArtifact, model: DiffusersModel, guidance_scale: float | None, allow_transfer: bool) -> None:
    pairs = (
        ("prediction", artifact.prediction, model.prediction),
        ("native scheduler", artifact.native_scheduler, model.native.name),
        ("scheduler", artifact.scheduler, model.scheduler.name),
    )
    for noun, made_for, found in pairs:
        if made_for != found:
            raise InvalidThetaError(
                f"this theta was made for the {noun} {made_for!r}, and the pipeline's is {found!r}; distil one for "
                f"this pipeline"
            )
    artifact.check_model(model.digest, allow_transfer=allow_transfer)
    scale = artifact.guidance_scale
    if guidance_scale is not None and guidance_scale != scale:
        raise InvalidThetaError(
            f"this theta was made for guidance_scale {scale:g}, not {guidance_scale:g}; call the pipeline with "
            f"{scale:g}, or distil one for {guidance_scale:g}"
        )
    network = model.network
    name = type(network.pipe).__name__
    if network.guidance == "none" and scale != 1:
        raise ExportError(f"this theta was made for guidance_scale {scale:g}, and {name} here knows no guidance")
    if network.guidance == "classifier_free" and scale < 1:
        raise ExportError(
            f"this theta was made for guidance_scale {scale:g}, and {name} takes any scale below 1 for unguided; "
            f"distil one for 1 or more"
        )
    if isinstance(network, DiT) and scale != 1 and network.classes != _DIT_NULL_CLASS:
        raise ExportError(
            f"DiTPipeline guides with class {_DIT_NULL_CLASS}, but this network's dropped label is {network.classes}; "
            f"distil a theta for guidance_scale 1"
        )
    start = float(artifact.solver.a[0])
    if start <= 0 or (not network.scales_noise and abs(start - 1) > LARGEST_START_DEVIATION):
        raise ExportError(
            f"this theta starts from {start:.4g} x0, and {name} starts from its noise itself; distil one from a start "
            f"at the first time of the path, such as 'midpoint'"
        )


@dataclass(frozen=True)
class DiffusersScheduler(Exporter):
    """A folder inside a diffusers pipeline's, with theta as a scheduler for it."""

    name = "diffusers"

    def export(self, artifact: ThetaArtifact, destination: Path) -> list[Path]:
        """Write ``scheduler_config.json`` to ``destination``, a folder inside the pipeline's, e.g. ``PIPELINE/bns``.

        The pipeline itself stays as it is; it is loaded to see that theta was made for it. See
        :meth:`Exporter.export`.

        Raises:
            ExportError: ``destination`` is not inside a pipeline's folder, or is one of its own components.
            InvalidThetaError: theta was made for another pipeline.
        """
        folder = destination.parent
        if not (folder / "model_index.json").is_file():
            inside = destination if (destination / "model_index.json").is_file() else Path("PIPELINE")
            raise ExportError(
                f"the export is a folder inside that of the pipeline, and the destination is {destination}; write for "
                f"example {inside / 'bns'}"
            )
        if destination.name in pipeline_index(str(folder)):
            raise ExportError(
                f"{destination} is a component of the pipeline itself; write beside it, for example {folder / 'bns'}"
            )
        scheduler = ns_scheduler(artifact, _pipeline_of(artifact, folder))
        scheduler.save_pretrained(destination)
        return [destination / "scheduler_config.json"]


def _pipeline_of(artifact: ThetaArtifact, folder: Path) -> Any:
    """The pipeline in the dtype that theta was made in; in float32 where none is that of theta."""
    for dtype in DTYPES:
        pipe = load_pipeline(str(folder), dtype)
        if DiffusersModel.of(pipe).digest == artifact.model_digest:
            return pipe
    return load_pipeline(str(folder))


EXPORTER = DiffusersScheduler
