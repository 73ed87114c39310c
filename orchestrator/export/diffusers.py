"""``diffusers``: exports theta as a scheduler for the pipeline it was made for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.export.base import Exporter, ExportError, check_artifact
from orchestrator.models._diffusers_files import pipeline_json, variants_in
from orchestrator.models._diffusers_networks import NETWORKS, DiT
from orchestrator.models.diffusers import DTYPES, DiffusersModel, load_pipeline
from solvers.ns import InvalidThetaError
from solvers.schedulers import DiscreteVP
from solvers.theta import ThetaArtifact
from solvers.theta_content import values_of

LARGEST_START_DEVIATION = 0.01
"""Largest deviation of a_0 from 1 in pipelines whose network gets the unscaled noise."""

_DIT_NULL_CLASS = 1000
"""Class that DiTPipeline uses as the dropped label, whatever the number of classes of the network."""


def ns_scheduler(
    artifact: ThetaArtifact, pipe: Any, *, guidance_scale: float | None = None, allow_transfer: bool = False
) -> Any:
    """The scheduler of theta for a pipeline in memory: ``pipe.scheduler = ns_scheduler(theta, pipe)``.

    Args:
        artifact: The solver with its provenance.
        pipe: The diffusers pipeline that theta was made for; its networks are frozen.
        guidance_scale: Scale that the pipeline will be called with, checked against theta's; None for theta's own. For
            a range, None means the scale of each call, as far as the pipeline states it (``NSScheduler.watch``).
        allow_transfer: Whether to accept a theta that was made for another model.

    Returns:
        An ``NSScheduler``; its ``config`` holds theta's ``guidance_scale``, or ``guidance_range``. A call of ``pipe``
        with a scale that it does not suit is refused, if the pipeline states its scale.

    Raises:
        InvalidThetaError: theta was made for another model, prediction, path or guidance.
        ExportError: The pipeline cannot sample with this theta.
        ConfigError: The pipeline has no adapter.
    """
    from orchestrator.export.ns_scheduler import FLOW, NSScheduler

    artifact = check_artifact(artifact)
    model = DiffusersModel.of(pipe)
    ends = [artifact]
    if artifact.guidance_range is not None:
        ends = [artifact.at(guidance_scale=end) for end in artifact.guidance_range]
        if guidance_scale is not None:
            artifact.at(guidance_scale=guidance_scale)  # refuses a scale outside the range
    elif guidance_scale is not None and guidance_scale != artifact.guidance_scale:
        raise InvalidThetaError(
            f"this theta was made for guidance_scale {artifact.guidance_scale:g}, not {guidance_scale:g}; call the "
            f"pipeline with {artifact.guidance_scale:g}, or distil one for {guidance_scale:g}"
        )
    for end in ends:
        _check(end, model, allow_transfer)
    native = model.native
    betas = native.betas if isinstance(native, DiscreteVP) else None
    scheduler = NSScheduler(
        **{name: values_of(tensor) for name, tensor in artifact.tensors().items()},
        prediction_type=FLOW if model.network.is_flow else model.prediction,
        trained_betas=None if betas is None else list(betas),
        num_train_timesteps=1000 if betas is None else len(betas),
        guidance_scale=guidance_scale if artifact.guidance_range is not None else float(artifact.guidance_scale),
        guidance_range=None if artifact.guidance_range is None else list(artifact.guidance_range),
        model_digest=artifact.model_digest,
        use_flow_sigmas=model.network.is_flow,
        scales_input=model.network.scaled_by == "scale_model_input",
    )
    if model.network.guidance != "none":
        scheduler.watch(pipe)
    return scheduler


def _check(artifact: ThetaArtifact, model: DiffusersModel, allow_transfer: bool) -> None:
    """Check that a theta of one guidance scale can sample in the model's pipeline."""
    pairs = (
        ("prediction", artifact.prediction, model.prediction),
        ("native scheduler", artifact.native_scheduler, model.native.name),
        ("scheduler", artifact.scheduler, model.scheduler.name),
    )
    for noun, made_for, actual in pairs:
        if made_for != actual:
            raise InvalidThetaError(
                f"this theta was made for the {noun} {made_for!r}, but the pipeline's is {actual!r}; distil one for "
                f"this pipeline"
            )
    artifact.check_model(model.digest, allow_transfer=allow_transfer)
    scale = artifact.guidance_scale
    network = model.network
    name = type(network.pipe).__name__
    if network.guidance == "none" and scale != 1:
        raise ExportError(
            f"this theta was made for guidance_scale {scale:g}, but this {name} does not support guidance; distil one "
            f"for 1"
        )
    if network.guidance == "classifier_free" and scale < 1:
        raise ExportError(
            f"this theta was made for guidance_scale {scale:g}, but {name} treats every scale below 1 as unguided; "
            f"distil one for 1 or more"
        )
    if isinstance(network, DiT) and scale != 1 and network.classes != _DIT_NULL_CLASS:
        raise ExportError(
            f"DiTPipeline guides with class {_DIT_NULL_CLASS}, but this network's dropped label is {network.classes}; "
            f"distil a theta for guidance_scale 1"
        )
    start = float(artifact.solver.a[0])
    if start <= 0:
        raise ExportError(f"this theta starts from {start:.4g} x0, but {name} needs a positive weight; distil another")
    if network.scaled_by == "nothing" and abs(start - 1) > LARGEST_START_DEVIATION:
        raise ExportError(
            f"this theta starts from {start:.4g} x0, but {name} starts from the unscaled noise; distil one with the "
            f"option beginning of BNS set to 'time' or 'held', from a start such as 'midpoint'"
        )


@dataclass(frozen=True)
class DiffusersScheduler(Exporter):
    """Exports theta as a scheduler folder inside the folder of a diffusers pipeline."""

    name = "diffusers"

    def export(self, artifact: ThetaArtifact, destination: Path) -> list[Path]:
        """Write ``scheduler_config.json`` to ``destination``, a folder inside the pipeline's, e.g. ``PIPELINE/bns``.

        The pipeline is loaded to check that theta was made for it, and is not changed. See :meth:`Exporter.export`.

        Raises:
            ExportError: ``destination`` is not inside a pipeline's folder, or is one of the pipeline's components.
            InvalidThetaError: theta was made for another pipeline.
        """
        folder = destination.parent
        if not (folder / "model_index.json").is_file():
            pipeline = destination if (destination / "model_index.json").is_file() else Path("PIPELINE")
            raise ExportError(
                f"the export is a folder inside the pipeline's folder, but the destination is {destination}; write for "
                f"example {pipeline / 'bns'}"
            )
        if destination.name in pipeline_json(str(folder)):
            raise ExportError(
                f"{destination} is a component of the pipeline; choose another folder, for example {folder / 'bns'}"
            )
        scheduler = ns_scheduler(artifact, _pipeline_of(artifact, folder))
        scheduler.save_pretrained(destination)
        return [destination / "scheduler_config.json"]


def _pipeline_of(artifact: ThetaArtifact, folder: Path) -> Any:
    """Load the pipeline with the weights and dtype whose digest matches theta's model, or in float32 if none does."""
    network = NETWORKS.get(str(pipeline_json(str(folder)).get("_class_name")))
    # For an unknown class, or without weights, load_pipeline raises the error.
    variants = (network and variants_in(folder / network.component)) or [None]
    for variant, dtype in itertools.product(variants, DTYPES):
        pipe = load_pipeline(str(folder), dtype, variant)
        if DiffusersModel.of(pipe).digest == artifact.model_digest:
            return pipe
    return load_pipeline(str(folder), variant=variants[0])


EXPORTER = DiffusersScheduler
