"""The time argument of described networks: affine maps, shapes, and networks of whole timesteps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_examples
import own_networks
import pytest
import torch
from adapter_examples import FLOW
from proofs import distance, noise
from torch import Tensor, nn

from orchestrator.errors import ConfigError
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs.ground_truth import solve
from solvers.families.base import GridSolver
from solvers.families.ddim import DDIM
from solvers.grids import UNIFORM

SHAPE = (1, 2, 3)
BARE = {"path": FLOW["path"], "shape": SHAPE, "prediction": "velocity", "native_scheduler": "cond_ot"}
ECHO = BARE | {"factory": "own_networks:Echo"}
LINEAR = {"name": "discrete_vp", "options": {"betas": [0.02 + 0.02 * k for k in range(20)]}}
TABLE = BARE | {
    "factory": "own_networks:NoiseTable",
    "prediction": "epsilon",
    "native_scheduler": LINEAR,
    "time": {"kind": "timestep", "integer": "interpolate"},
}
NONE = torch.zeros(4, dtype=torch.int64)


def build(options: dict[str, Any], **changes: Any) -> Any:
    return adapter_examples.build("torch_module", options | changes)


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


# ---- affine maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ({"scale": 2, "offset": -1}, -0.5),
        ({"scale": -1, "offset": 1}, 0.75),
        ({"kind": "1-t", "scale": 1000}, 750.0),
        ({"kind": "t", "scale": 0.001}, 0.00025),
        ({"offset": 0.5}, 0.75),
    ],
)
def test_time_is_mapped_by_scale_and_offset(time: dict[str, Any], expected: float) -> None:
    """The time that the network receives for t = 0.25."""
    prediction = build(ECHO, time=time).predict(noise(SHAPE), at(0.25), NONE)
    torch.testing.assert_close(prediction, torch.full_like(prediction, expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"time": "1-t"}, {"time": {"kind": "1-t"}}),
        ({"time": "1-t", "time_scale": 1000}, {"time": {"kind": "1-t", "scale": 1000}}),
        ({}, {"time": {"kind": "t", "offset": 0, "shape": "batch"}}),
    ],
)
def test_two_spellings_of_one_time_have_one_digest(short: dict[str, Any], long: dict[str, Any]) -> None:
    """Stored pairs of the short form are found by the long one."""
    assert build(ECHO, **short).digest == build(ECHO, **long).digest


@pytest.mark.parametrize("time", [{"offset": 1}, {"scale": -1}, {"shape": "column"}, {"scale": 2}])
def test_another_time_has_another_digest(time: dict[str, Any]) -> None:
    assert build(ECHO, time=time).digest != build(ECHO).digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "s"}, r"time must be one of 't', '1-t', 'timestep', 'sigma', got 's'"),
        ({"time": {"factor": 2}}, r"time has no option 'factor'.*; its options are: kind, scale, offset, shape, int"),
        ({"time": {"scale": 0}}, r"time\.scale is 0, so the network would not know the time"),
        ({"time": {"scale": "2"}}, r"time\.scale must be a finite number, got '2'"),
        ({"time": {"offset": float("inf")}}, r"time\.offset must be a finite number, got inf"),
        ({"time": {"shape": [1]}}, r"time\.shape must be one of 'batch', 'column', 'scalar', got \[1\]"),
        ({"time": {"scale": 2}, "time_scale": 3}, r"two factors for one time; leave one out"),
        ({"time": {"kind": "timestep"}}, r"time 'timestep' counts the training timesteps of 'discrete_vp', but"),
        ({"time": {"integer": "interpolate"}}, r"the kind of time is 't'; set it to 'timestep', or leave integer out"),
        ({"time": {"integer": "round"}}, r"time\.integer must be one of 'interpolate', got 'round'"),
        ({"time_scale": -1}, r"time_scale must be a positive number, got -1"),
    ],
)
def test_invalid_times_are_rejected_with_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ECHO, **options)


# ---- shapes -----------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """An affine function of state and time that records the shapes of the times."""

    def __init__(self, ndim: int):
        super().__init__()
        self.ndim, self.shapes = ndim, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.shapes.append(tuple(t.shape))
        assert t.ndim == self.ndim
        return x * (1 + t.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize(("shape", "ndim"), [("batch", 1), ("column", 2), ("scalar", 0)])
def test_time_has_the_networks_shape(shape: str, ndim: int) -> None:
    """One time for the batch, and one per sample, in groups of equal times for a network that takes a scalar."""
    model = build(ECHO, time={"shape": shape})
    recorder = model.__dict__["net"] = Recorder(ndim)
    x = noise((4, *SHAPE))[:, 0]
    torch.testing.assert_close(model.predict(x, at(0.5), NONE), 1.5 * x)
    assert recorder.shapes == [{"batch": (4,), "column": (4, 1), "scalar": ()}[shape]]
    times = torch.tensor([0.5, 0.25, 0.5, 1.0], dtype=torch.float64)
    expected = x * (1 + times.to(x.dtype)).view(-1, 1, 1, 1)
    torch.testing.assert_close(model.predict(x, times, NONE), expected)
    assert len(recorder.shapes) == (4 if shape == "scalar" else 2)


@pytest.mark.parametrize("shape", ["batch", "column", "scalar"])
def test_every_sample_has_the_derivative_of_its_own_time(shape: str) -> None:
    """Two solvers of one batch may have equal times, and each gets its own gradient."""
    model = build(ECHO, time={"shape": shape})
    model.__dict__["net"] = Recorder({"batch": 1, "column": 2, "scalar": 0}[shape])
    x = noise((4, *SHAPE))[:, 0]
    times = torch.tensor([0.5, 0.25, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    model.predict(x, times, NONE).sum().backward()
    torch.testing.assert_close(times.grad, x.double().flatten(1).sum(1))


# ---- whole timesteps --------------------------------------------------------------------------------------------


def table() -> own_networks.NoiseTable:
    return own_networks.NoiseTable().eval()


def test_a_table_of_timesteps_is_interpolated() -> None:
    """At a whole timestep the prediction is the network's; between two it is their weighted mean."""
    model, net, x = build(TABLE), table(), noise((4, *SHAPE))[:, 0].float()

    def prediction(k: float) -> Tensor:
        return model.predict(x, model.native.time_of(k), NONE)

    def exact(k: int) -> Tensor:
        return net(x, torch.full((4,), k))

    for k in (0, 7, 19):
        torch.testing.assert_close(prediction(k), exact(k), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prediction(7.25), 0.75 * exact(7) + 0.25 * exact(8), rtol=1e-4, atol=1e-4)


def test_interpolation_costs_two_forwards_per_evaluation() -> None:
    """The bill counts both, and both again for the dropped condition."""
    model = build(TABLE)
    assert [model.forwards_per_evaluation(scale) for scale in (1.0, 2.0)] == [2, 4]
    calls: list[int] = []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    model.predict(noise((4, *SHAPE))[:, 0], at(0.5), NONE)
    assert len(calls) == 2


def test_the_facts_of_a_host_say_that_timesteps_are_interpolated(tmp_path: Path) -> None:
    """Clients bill by them, and the report and the notes of a sweep print the sentence."""

    def facts(options: dict[str, Any]) -> ModelFacts:
        return Host(HostSettings(adapter="torch_module", options=options, storage=str(tmp_path))).facts()

    interpolated = facts(TABLE)
    assert [interpolated.forwards_per_evaluation(scale) for scale in (1.0, 2.0)] == [2, 4]
    assert interpolated.interpolation == "outputs at whole timesteps interpolated, 2 forwards per evaluation"
    assert facts(ECHO).interpolation == ""


@pytest.mark.parametrize("factory", ["own_networks:NoiseTable", "own_networks:Truncating"])
def test_a_table_that_is_not_declared_is_refused_with_the_option(factory: str) -> None:
    """Both one that fails for fractions and one that drops them, at the first evaluation."""
    model = build(TABLE, factory=factory, time="timestep")
    with pytest.raises(ConfigError, match=r"takes whole timesteps only: .*set time to \{kind: timestep, integer: int"):
        model.field(NONE, 1.0)(noise((4, *SHAPE))[:, 0], at(0.5))


def test_a_table_counted_from_one_is_interpolated_too() -> None:
    """Affine maps keep timesteps whole."""
    model, x = build(TABLE), noise((4, *SHAPE))[:, 0]
    shifted = build(TABLE, time={"kind": "timestep", "offset": 1, "integer": "interpolate"})
    shifted.net.register_forward_pre_hook(lambda _, given: (given[0], given[1] - 1))
    torch.testing.assert_close(shifted.predict(x, at(0.4), NONE), model.predict(x, at(0.4), NONE))


def test_ground_truth_of_a_table_converges() -> None:
    """Interpolated, the field is continuous: a tighter tolerance changes little, and DDIM's error is of first order."""
    model = build(TABLE)
    field, x0 = model.field(NONE, 1.0), noise((4, *SHAPE))[:, 0].double()
    coarse, fine = (solve(field, x0, tolerance, tolerance) for tolerance in (1e-5, 1e-6))
    assert fine.nfe < 400
    assert distance(coarse.x1, fine.x1) < 1e-3
    errors = [float((GridSolver(DDIM(), nfe, UNIFORM).sample(field, x0) - fine.x1).norm()) for nfe in (19, 38, 76)]
    assert errors[0] > 1.6 * errors[1] > 2.5 * errors[2]


def test_a_network_of_any_timestep_is_left_alone() -> None:
    """The examination at the first evaluation takes a smooth network for what it is."""
    model = build(TABLE, factory="own_networks:Noise", call="x, t, y", classes=3, time="timestep")
    assert bool(model.predict(noise((4, *SHAPE))[:, 0], at(0.5), NONE).isfinite().all())
