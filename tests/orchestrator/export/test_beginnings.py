"""A theta whose beginning was learned gives the same samples wherever it is exported, for every kind of pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from test_diffusers_export import condition_of, relative_error, solver_samples
from torch import Tensor

from orchestrator.export.base import ExportError
from orchestrator.export.beginnings import beginning_for
from orchestrator.export.diffusers import ns_scheduler
from orchestrator.export.python import PythonFile
from orchestrator.export.safetensors import Safetensors
from orchestrator.models.diffusers import DiffusersModel
from orchestrator.models.facts import ModelFacts
from solvers.families import GridSolver
from solvers.families.bns import BNS, Beginning
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.theta import ThetaArtifact, load_theta

NFE = 4

EXPECTED: dict[str, Beginning] = {
    "ddpm-epsilon": "time",
    "ddpm-v": "time",
    "ddim": "time",
    "dit": "free",
    "sd-epsilon": "free",
    "sd-v": "free",
    "sdxl": "free",
    "sd3": "time",
    "flux": "time",
    "stable-audio": "free",
}
"""What can be learned of the beginning, by kind of pipeline: 'time' where the network gets the unscaled noise."""


def ddim() -> Any:
    """The other pipeline of unconditional pixel models."""
    pipe = tiny.ddpm()
    return diffusers.DDIMPipeline(pipe.unet, diffusers.DDIMScheduler(**tiny.VP, clip_sample=False))


KINDS: dict[str, tuple[Callable[[], Any], float]] = {**tiny.KINDS, "ddim": (ddim, 1.0)}


def learned_theta(model: DiffusersModel, scale: float, beginning: Beginning) -> ThetaArtifact:
    """A theta as distillation leaves it: every number that is learned lies a little away from its start."""
    family, scheduler = BNS(beginning=beginning), model.scheduler
    start = family.start(GridSolver(Midpoint(), NFE, Grid()), scheduler)
    away = 0.05 * torch.rand(len(start), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = family.project(start * (1 - away) + 0.5 * away, scheduler, 1.0)
    solver = family.to_ns(parameters, scheduler, 1.0)
    return ThetaArtifact(
        solver,
        prediction=model.prediction,
        scheduler=scheduler.name,
        native_scheduler=model.native.name,
        guidance_scale=scale,
        model_digest=model.digest,
        schedule=model.schedule(solver.times),
    )


def raw_network(model: DiffusersModel, scale: float) -> Callable[[Tensor, float], Tensor]:
    """The guided output at the network's own time, in the direction of ``model.prediction``."""
    condition, network = condition_of(model), model.network
    null = network.null_condition(condition)

    def output(x: Tensor, timestep: float) -> Tensor:
        times, embedded = torch.full((len(x),), timestep), scale if network.guidance == "embedded" else 1.0
        result = network(x, times, condition, embedded)
        if network.guidance == "classifier_free":
            dropped = network(x, times, null, embedded)
            result = dropped + scale * (result - dropped)
        return -result if network.is_flow else result

    return output


def facts_of(model: DiffusersModel, facts: ModelFacts) -> ModelFacts:
    """Facts with what this model says of its first state."""
    return dataclasses.replace(facts, scales_start=model.scales_start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_beginning_reaches_every_format(kind: str, facts: ModelFacts, tmp_path: Path) -> None:
    """The unchanged pipeline, the Python file and the safetensors file sample as the solver does, to 1e-5."""
    make, scale = KINDS[kind]
    pipe = make()
    model = DiffusersModel.of(pipe, tiny.sample_size(pipe))
    beginning = beginning_for(facts_of(model, facts))
    assert beginning == EXPECTED[kind]
    artifact, x0 = learned_theta(model, scale, beginning), tiny.noise(model.shape)
    solver, scheduler = artifact.solver, model.scheduler
    assert float(solver.times[0]) > scheduler.t_min + 0.01
    assert (abs(float(solver.a[0]) - float(scheduler.start(scheduler.t_min))) > 0.01) == (beginning == "free")
    expected = solver_samples(model, artifact, x0)

    (path,) = Safetensors().export(artifact, tmp_path / "theta.safetensors")
    assert torch.equal(load_theta(path).solver.flat(), solver.flat())
    (path,) = PythonFile().export(artifact, tmp_path / "sampler.py")
    names: dict[str, Any] = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    with torch.no_grad():
        field = model.field(condition_of(model), scale)
        by_velocity = names["sample"](lambda x, t: field(x, torch.tensor(t, dtype=torch.float64)), x0)
        by_network = names["sample_network"](raw_network(model, scale), x0)
    assert relative_error(by_velocity, expected) < 1e-5
    assert relative_error(by_network, expected) < 1e-5

    exported = ns_scheduler(artifact, pipe, guidance_scale=scale)
    samples = tiny.run(pipe, exported, NFE, scale, model.shape)
    # Without scaling, the pipeline's noise is a_0 x0, and a_0 is 1 but for the trace of data at t_min.
    start = float(solver.a[0]) if beginning == "time" else 1.0
    assert relative_error(samples, solver_samples(model, artifact, x0 / start)) < 1e-5
    assert relative_error(samples, expected) < 1e-3


@pytest.mark.parametrize("kind", [kind for kind, beginning in EXPECTED.items() if beginning == "time"])
def test_a_scaled_first_state_is_refused_where_the_network_gets_the_unscaled_noise(kind: str) -> None:
    """The pipeline would start from x0 in place of a_0 x0, without an error."""
    make, scale = KINDS[kind]
    pipe = make()
    artifact = learned_theta(DiffusersModel.of(pipe, tiny.sample_size(pipe)), scale, "free")
    with pytest.raises(ExportError, match=r"starts from the unscaled noise; distil one with the option beginning"):
        ns_scheduler(artifact, pipe)


def test_a_first_state_that_the_pipeline_does_not_scale_is_refused() -> None:
    """A DiT scheduler in a pipeline that never calls ``scale_model_input``."""
    pipe = tiny.dit()
    model = DiffusersModel.of(pipe)
    scheduler = ns_scheduler(learned_theta(model, 1.0, "free"), pipe)
    scheduler.set_timesteps(NFE)
    x = tiny.noise(model.shape)
    with pytest.raises(ValueError, match=r"does not call scale_model_input, but theta starts from 0\.\d+ x0"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_a_saved_dit_pipeline_keeps_its_first_state(tmp_path: Path) -> None:
    """How the first state is scaled is part of the saved scheduler."""
    pipe = tiny.dit()
    model = DiffusersModel.of(pipe)
    artifact = learned_theta(model, 3.0, "free")
    pipe.scheduler = ns_scheduler(artifact, pipe)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    samples = tiny.run(loaded, loaded.scheduler, NFE, 3.0, model.shape)
    assert relative_error(samples, solver_samples(model, artifact, tiny.noise(model.shape))) < 1e-5
