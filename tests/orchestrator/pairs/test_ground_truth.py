"""Ground truth is as exact as it says, whatever a sample's neighbours, and stays inside the model's time domain."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.config.reading import load_config
from orchestrator.models.zoo import ZooModel
from orchestrator.models.zoo.adapter import zoo_names
from orchestrator.pairs.ground_truth import largest_sample_rms, solve
from orchestrator.randomness import noise
from solvers.field import FunctionField, VelocityField
from solvers.schedulers.cond_ot import CondOT

PAIRS = 32


def _model(weights: str) -> ZooModel:
    return plugins.build("models", "zoo", {"weights": weights})


def _field(weights: str, pairs: int = PAIRS) -> tuple[VelocityField, Tensor]:
    model = _model(weights)
    dataset = plugins.build("datasets", model.net.conditioning)
    condition = model.encode_conditions(torch.from_numpy(dataset.conditions(0, range(pairs))), dataset)
    return model.field(condition, 1.0), torch.from_numpy(noise(0, range(pairs), model.shape))


def _rotation(frequencies: list[float]) -> tuple[VelocityField, Callable[[Tensor], Tensor]]:
    """Each sample turns at its own frequency; the field, and the exact solution at t = 1."""
    omega = torch.tensor(frequencies, dtype=torch.float64)[:, None]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return omega * torch.stack([-x[:, 1], x[:, 0]], dim=1)

    def exact(x: Tensor) -> Tensor:
        x, y, angle = x[:, :1].double(), x[:, 1:].double(), omega
        return torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=1)

    return FunctionField(velocity, CondOT()), exact


def test_the_solution_is_as_exact_as_the_tolerance_asks() -> None:
    """Against the exact solution; ten times tighter is about ten times better."""
    field, exact = _rotation([3.0, 7.0])
    x0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    errors = {}
    for tolerance in (1e-4, 1e-6, 1e-8):
        x1, *_ = solve(field, x0, tolerance, tolerance)
        errors[tolerance] = float((x1 - exact(x0)).abs().max())
        assert errors[tolerance] < 20 * tolerance
    assert errors[1e-8] < errors[1e-6] / 10 < errors[1e-4] / 100


def test_easy_neighbours_do_not_loosen_the_solution_of_a_difficult_sample() -> None:
    """63 samples that stand still beside one that turns fast change nothing for it, to the last bit.

    An error norm that averages over the batch would divide the difficult sample's error by eight.
    """
    difficult, _ = _rotation([15.0])
    crowded, _ = _rotation([15.0] + [0.0] * 63)
    alone, nfe_alone, _ = solve(difficult, torch.tensor([[1.0, 0.0]]), 1e-6, 1e-6)
    together, nfe_together, _ = solve(crowded, torch.tensor([[1.0, 0.0]]).expand(64, 2), 1e-6, 1e-6)
    assert nfe_together == nfe_alone
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=0)


def test_the_error_norm_is_that_of_the_worst_sample() -> None:
    """The RMS of each sample, and the largest of them."""
    error = torch.tensor([[3.0, 4.0], [0.1, 0.1]])
    assert float(largest_sample_rms(error)) == pytest.approx(math.sqrt(12.5))
    assert float(largest_sample_rms(torch.tensor(-2.0))) == 2.0


def test_the_model_is_asked_at_the_end_and_never_beyond() -> None:
    """The last step lands on t_max: a network knows nothing of later times."""
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return -5 * x

    solve(FunctionField(velocity, CondOT()), torch.ones(2, 3), 1e-5, 1e-5)
    assert 1 - 1e-12 < max(asked) <= 1
    assert min(asked) == 0


def test_the_state_is_double_and_the_count_is_that_of_the_evaluations() -> None:
    """float32 state would drown tight tolerances in rounding; NFE is what the field was asked."""
    asked: list[torch.dtype] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x.dtype)
        return -x

    x1, nfe, _ = solve(FunctionField(velocity, CondOT()), torch.ones(2, 3, dtype=torch.float32), 1e-5, 1e-5)
    assert x1.dtype == torch.float64
    assert set(asked) == {torch.float64}
    assert nfe == len(asked)


@pytest.mark.parametrize("weights", zoo_names())
def test_ground_truth_of_a_shipped_model_stands_under_a_ten_times_tighter_tolerance(
    repository: Path, weights: str
) -> None:
    """At the tolerance of its experiment no value moves by 1/20,000 of the data range: no noise to compare with."""
    experiment = {"cifar10_gray16_fm_ot": "cifar10", "spoken_digits_fm_ot": "spoken_digits"}.get(weights, "digits")
    pairs = load_config(repository / f"sweeps/configs/{experiment}.yaml").pairs
    field, x0 = _field(weights, PAIRS if experiment == "digits" else 2)
    loose, *_ = solve(field, x0, pairs.rtol, pairs.atol)
    tight, *_ = solve(field, x0, pairs.rtol / 10, pairs.atol / 10)
    assert float((loose - tight).abs().max()) < 5e-5 * _model(weights).data_range


@pytest.mark.parametrize("weights", zoo_names())
def test_a_shipped_model_has_a_finite_velocity_on_its_whole_domain(weights: str) -> None:
    """Ends included, also where the native path's velocity is infinite: there the model is presented under CondOT."""
    field, x0 = _field(weights, 4)
    ends = (field.scheduler.t_min, field.scheduler.t_max)
    for t in ends:
        assert torch.isfinite(field(x0.double(), torch.tensor(t, dtype=torch.float64))).all()
    x1, *_ = solve(field, x0, 1e-4, 1e-4)
    assert float(x1.abs().max()) < 4  # images lie in [-1, 1], frames of sound in about [-3, 3]


def test_a_vp_model_is_presented_under_cond_ot_cut_to_where_it_begins() -> None:
    """VP starts at alpha > 0: the domain begins at that signal-to-noise ratio, a little after t = 0."""
    model = _model("digits_eps_vp")
    assert model.native.name == "vp"
    assert model.scheduler.name == "cond_ot"
    assert 0 < model.scheduler.t_min < 0.01
    assert model.scheduler.t_max == 1


@pytest.mark.parametrize(
    "velocity",
    [
        lambda x, t: x * float("nan"),
        lambda x, t: x if t < 0.5 else x * float("nan"),
        lambda x, t: 1e30 * x * x,
    ],
    ids=["not a number", "not a number from the middle on", "blows up"],
)
def test_a_velocity_that_is_not_finite_is_told(velocity: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The error names the causes a user can check, not a step size."""
    with pytest.raises(
        FloatingPointError, match=r"ground truth .* not finite; check the model, its data range and the guidance scale"
    ):
        solve(FunctionField(velocity, CondOT()), torch.ones(4, 3), 1e-4, 1e-4)


def test_a_velocity_that_begins_small_is_not_asked_beyond_the_end() -> None:
    """The first step is guessed from the velocity at the start: where that is small, the guess leaves the domain."""
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return (1e-4 + 9 * t**8) * torch.ones_like(x)

    x1, *_ = solve(FunctionField(velocity, CondOT()), torch.ones(2, 3), 1e-6, 1e-6)
    torch.testing.assert_close(x1, torch.full((2, 3), 2.0001, dtype=torch.float64), rtol=0, atol=1e-5)
    assert max(asked) <= 1
