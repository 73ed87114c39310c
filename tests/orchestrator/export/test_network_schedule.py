"""The exported Python file samples with the network itself: same numbers, without this package."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapter_examples
import numpy as np
import pytest
import torch
from adapter_examples import FLOW, HERE
from proofs import distance, noise
from torch import Tensor

from orchestrator.export.python import FORMULAS, PythonFile
from orchestrator.export.safetensors import Safetensors
from solvers.families.base import GridSolver
from solvers.families.dpmpp_2m import DPMpp2M
from solvers.grids import UNIFORM
from solvers.ns import InvalidThetaError
from solvers.prediction import PREDICTIONS
from solvers.theta import ThetaArtifact, load_theta

SHAPE = (1, 2, 3)
NONE = torch.zeros(4, dtype=torch.int64)
BETAS = {"name": "discrete_vp", "options": {"betas": {"schedule": "linear", "end": 0.3, "count": 20}}}
CUT = {"name": "vp", "options": {"t_min": 0.01, "t_max": 0.99}}
TIMESTEPS = {"factory": "own_networks:Fractional", "time": "timestep", "native_scheduler": BETAS}
TABLE = {"factory": "own_networks:NoiseTable", "time": {"kind": "timestep", "integer": "interpolate"}}

MODELS: dict[str, dict[str, Any]] = {
    "epsilon on discrete timesteps": TIMESTEPS | {"prediction": "epsilon"},
    "epsilon from a table": TIMESTEPS | TABLE | {"prediction": "epsilon"},
    "epsilon started from the noise": TIMESTEPS
    | {"prediction": "epsilon", "native_scheduler": {**BETAS, "options": BETAS["options"] | {"start_scale": 1.0}}},
    "sample on vp": {"prediction": "sample", "native_scheduler": CUT, "time": {"kind": "1-t", "scale": 20}},
    "score on vp": {"prediction": "score", "native_scheduler": CUT, "time": {"scale": 20, "offset": -1}},
    "v_prediction on cosine": {"prediction": "v_prediction", "native_scheduler": "cosine"},
    "velocity": {"prediction": "velocity", "native_scheduler": "cond_ot"},
    "velocity on vp": {"prediction": "velocity", "native_scheduler": CUT},
    "noise_minus_data": {
        "prediction": "noise_minus_data",
        "native_scheduler": "cond_ot",
        "time": {"kind": "1-t", "scale": 20},
    },
    "sample on edm": {"prediction": "sample", "native_scheduler": "edm", "time": "sigma", "time_scale": 0.2},
}


def build(name: str) -> Any:
    bare = {"path": FLOW["path"], "shape": SHAPE, "factory": "own_networks:Fractional"}
    return adapter_examples.build("torch_module", bare | MODELS[name])


def theta(model: Any, guidance_scale: float = 1.0) -> ThetaArtifact:
    """A theta of four evaluations with the model's schedule, as a sweep makes it."""
    solver = GridSolver(DPMpp2M(), 4, UNIFORM).to_ns(model.scheduler)
    return ThetaArtifact(
        solver,
        prediction=model.prediction,
        scheduler=model.scheduler.name,
        guidance_scale=guidance_scale,
        schedule=model.schedule(solver.times),
    )


def export(artifact: ThetaArtifact, folder: Path) -> str:
    (path,) = PythonFile().export(artifact, folder / "sampler.py")
    return path.read_text(encoding="utf-8")


def run(code: str, folder: Path) -> Tensor:
    """What ``code`` saves as samples.npy, in a process that sees the exported file and the third-party network only."""
    guard = "\nassert not {'orchestrator', 'solvers'} & set(sys.modules)\nnp.save('samples.npy', x1)\n"
    script = f"import sys; sys.path[:0] = ['.', {str(HERE)!r}]\nimport numpy as np\nx0 = np.load('x0.npy')\n"
    done = subprocess.run(
        [sys.executable, "-c", script + code + guard], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(folder / "samples.npy"))


OUTSIDE = """
import torch
from own_networks import {factory}
from sampler import sample_network
net = {factory}().eval()
with torch.no_grad():
    x1 = sample_network(lambda x, t: net(x, torch.full((len(x),), t)), torch.from_numpy(x0))
"""


def test_every_prediction_has_a_formula_and_a_model_here() -> None:
    assert set(FORMULAS) == set(PREDICTIONS) == {options["prediction"] for options in MODELS.values()}


@pytest.mark.parametrize("name", MODELS)
def test_three_lines_outside_give_the_same_samples(name: str, tmp_path: Path) -> None:
    """Every prediction, on discrete and continuous paths, with the network's own time."""
    model = build(name)
    artifact, x0 = theta(model), noise((4, *SHAPE))[:, 0].float()
    namespace: dict[str, Any] = {}
    exec(export(artifact, tmp_path), namespace)
    net = model.net
    with torch.no_grad():
        expected = artifact.solver.sample(model.field(NONE, 1.0), x0)
        sampled = namespace["sample_network"](lambda x, t: net(x, torch.full((len(x),), t)), x0)
    assert distance(sampled, expected) < 1e-5


@pytest.mark.parametrize("name", ["epsilon on discrete timesteps", "epsilon from a table", "score on vp"])
def test_a_process_without_this_package_samples_the_same(name: str, tmp_path: Path) -> None:
    model = build(name)
    artifact, x0 = theta(model), noise((4, *SHAPE))[:, 0].float()
    export(artifact, tmp_path)
    np.save(tmp_path / "x0.npy", x0.numpy())
    sampled = run(OUTSIDE.format(factory=type(model.net).__name__), tmp_path)
    with torch.no_grad():
        assert distance(sampled, artifact.solver.sample(model.field(NONE, 1.0), x0)) < 1e-5


NUMPY = """
from sampler import NETWORK_TIMES, sample_network
asked = []
def network(x, t):
    asked.append(t)
    return 0.5 * x + 0.1 * np.sin(x + t / 20)
x1 = sample_network(network, x0)
assert asked == list(NETWORK_TIMES) and x1.dtype == np.float32 and 'torch' not in sys.modules
"""


def test_numpy_is_enough(tmp_path: Path) -> None:
    """A noise prediction on a discrete path, in a process without torch."""
    model = build("epsilon on discrete timesteps")
    artifact, x0 = theta(model), noise((4, *SHAPE))[:, 0].float()
    export(artifact, tmp_path)
    np.save(tmp_path / "x0.npy", x0.numpy())
    sampled = run(NUMPY, tmp_path)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.5 * x + 0.1 * torch.sin(x + t.view(-1, 1, 1, 1) / 20)

    model.__dict__["net"] = Net()
    assert distance(sampled, artifact.solver.sample(model.field(NONE, 1.0), x0)) < 1e-5


def test_guidance_is_one_expression(tmp_path: Path) -> None:
    """The file of a guided theta documents it, and gives the guided samples."""
    bare = {"path": FLOW["path"], "shape": SHAPE, "factory": "own_networks:Noise", "call": "x, t, y"}
    labels = {"classes": 3, "null_label": 3}
    model = adapter_examples.build("torch_module", bare | TIMESTEPS | labels | {"prediction": "epsilon"} | bare)
    artifact, x0 = theta(model, 2.5), noise((4, *SHAPE))[:, 0].float()
    text, namespace = export(artifact, tmp_path), {}  # type: ignore[var-annotated]
    assert "f_null(x, t) + GUIDANCE_SCALE * (" in text
    exec(text, namespace)
    label, dropped = torch.arange(4) % 3, torch.full((4,), 3)

    def guided(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t)
        null = model.net(x, times, dropped)
        return null + namespace["GUIDANCE_SCALE"] * (model.net(x, times, label) - null)

    with torch.no_grad():
        expected = artifact.solver.sample(model.field(label, 2.5), x0)
        assert distance(namespace["sample_network"](guided, x0), expected) < 1e-5


def test_the_velocity_of_the_file_is_the_fields(tmp_path: Path) -> None:
    """``velocity_from`` alone, for programs with a loop of their own."""
    model = build("sample on vp")
    artifact, x = theta(model), noise((4, *SHAPE))[:, 0]
    namespace: dict[str, Any] = {}
    exec(export(artifact, tmp_path), namespace)
    for k, t in enumerate(artifact.solver.times):
        time = torch.full((4,), namespace["NETWORK_TIMES"][k])
        with torch.no_grad():
            output = model.net((x / namespace["SCALE"][k]).float(), time).double()
            expected = model.field(NONE, 1.0)(x, t)
        assert distance(namespace["velocity_from"](output, x, k), expected) < 1e-5


# ---- theta files ------------------------------------------------------------------------------------------------


def test_a_theta_keeps_its_schedule(tmp_path: Path) -> None:
    """In JSON and in safetensors; one without a schedule has no such field, as in files of earlier releases."""
    artifact = theta(build("epsilon from a table"))
    artifact.save(tmp_path / "theta.json")
    assert load_theta(tmp_path / "theta.json").schedule == artifact.schedule
    (path,) = Safetensors().export(artifact, tmp_path / "theta.safetensors")
    assert load_theta(path).schedule == artifact.schedule
    bare = dataclasses.replace(artifact, schedule=None)
    assert "schedule" not in json.loads(bare.to_json())
    assert "sample_network" not in export(bare, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": None}, "'schedule' must have the columns time, scale, alpha, sigma and their derivatives"),
        ({"share": [0.5] * 4}, "'schedule' must have the columns"),
        ({"beta": [0.5] * 4}, "'schedule' must have the columns"),
        ({"sigma": [0.5] * 3}, "'schedule' must hold 4 finite numbers as its 'sigma'"),
        ({"time": [0.5, "x", 1, 2]}, "'schedule' must hold 4 finite numbers as its 'time'"),
        ({"scale": [1, 0, 1, 1]}, "'schedule' must not divide by a 'scale' of 0"),
    ],
)
def test_a_schedule_that_is_damaged_is_refused(changes: dict[str, Any], message: str) -> None:
    content = json.loads(theta(build("score on vp")).to_json())
    content["schedule"] = {k: v for k, v in (content["schedule"] | changes).items() if v is not None}
    with pytest.raises(InvalidThetaError, match=message):
        ThetaArtifact.from_json(json.dumps(content))
