"""Ground truth meets its tolerance, does not depend on a sample's batch, and stays in the model's time domain."""

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
from orchestrator.pairs.ground_truth import FIRST_STEP, NotFiniteError, largest_sample_rms, solve
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
    """A field in which each sample rotates at its own frequency, and its exact solution at t = 1."""
    omega = torch.tensor(frequencies, dtype=torch.float64)[:, None]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return omega * torch.stack([-x[:, 1], x[:, 0]], dim=1)

    def exact(x: Tensor) -> Tensor:
        x, y, angle = x[:, :1].double(), x[:, 1:].double(), omega
        return torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=1)

    return FunctionField(velocity, CondOT()), exact


def test_the_error_of_the_solution_follows_the_tolerance() -> None:
    """Compared with the exact solution: a ten times tighter tolerance gives about a tenth of the error."""
    field, exact = _rotation([3.0, 7.0])
    x0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    errors = {}
    for tolerance in (1e-4, 1e-6, 1e-8):
        x1, *_ = solve(field, x0, tolerance, tolerance)
        errors[tolerance] = float((x1 - exact(x0)).abs().max())
        assert errors[tolerance] < 20 * tolerance
    assert errors[1e-8] < errors[1e-6] / 10 < errors[1e-4] / 100


def test_easy_samples_in_the_batch_do_not_loosen_the_solution_of_a_difficult_one() -> None:
    """63 constant samples beside one that rotates fast do not change a bit of its solution.

    An error norm that averages over the batch would divide the difficult sample's error by eight.
    """
    difficult, _ = _rotation([15.0])
    crowded, _ = _rotation([15.0] + [0.0] * 63)
    alone, nfe_alone = solve(difficult, torch.tensor([[1.0, 0.0]]), 1e-6, 1e-6)[:2]
    together, nfe_together = solve(crowded, torch.tensor([[1.0, 0.0]]).expand(64, 2), 1e-6, 1e-6)[:2]
    assert nfe_together == nfe_alone
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=0)


def test_the_error_norm_is_the_largest_rms_of_a_sample() -> None:
    """The RMS is taken per sample, and the norm is the largest of them."""
    error = torch.tensor([[3.0, 4.0], [0.1, 0.1]])
    assert float(largest_sample_rms(error)) == pytest.approx(math.sqrt(12.5))
    assert float(largest_sample_rms(torch.tensor(-2.0))) == 2.0


def test_the_last_evaluation_is_at_the_end_of_the_domain() -> None:
    """The last step ends at t_max, since a network is not trained at later times."""
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return -5 * x

    solve(FunctionField(velocity, CondOT()), torch.ones(2, 3), 1e-5, 1e-5)
    assert 1 - 1e-12 < max(times) <= 1
    assert min(times) == 0


def test_the_state_is_float64_and_nfe_counts_the_evaluations() -> None:
    """With a float32 state, tight tolerances would drown in rounding."""
    dtypes: list[torch.dtype] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        dtypes.append(x.dtype)
        return -x

    x1, nfe = solve(FunctionField(velocity, CondOT()), torch.ones(2, 3, dtype=torch.float32), 1e-5, 1e-5)[:2]
    assert x1.dtype == torch.float64
    assert set(dtypes) == {torch.float64}
    assert nfe == len(dtypes)


@pytest.mark.parametrize("weights", zoo_names())
def test_ground_truth_of_a_shipped_model_has_converged(repository: Path, weights: str) -> None:
    """A ten times tighter tolerance than that of its experiment changes no value by 1/20,000 of the data range."""
    experiment = {"cifar10_gray16_fm_ot": "cifar10", "spoken_digits_fm_ot": "spoken_digits"}.get(weights, "digits")
    pairs = load_config(repository / f"sweeps/configs/{experiment}.yaml").pairs
    field, x0 = _field(weights, PAIRS if experiment == "digits" else 2)
    loose, *_ = solve(field, x0, pairs.rtol, pairs.atol)
    tight, *_ = solve(field, x0, pairs.rtol / 10, pairs.atol / 10)
    assert float((loose - tight).abs().max()) < 5e-5 * _model(weights).data_range


def test_a_short_first_step_sees_a_bend_at_the_noise_end() -> None:
    """On epsilon-prediction VP, the step that dopri5 estimates jumps over a bend, and its error estimate misses it."""
    field, x0 = _field("digits_eps_vp")
    reference = solve(field, x0, 1e-8, 1e-8).x1

    def error(first_step: float | None) -> float:
        x1 = solve(field, x0, 1e-5, 1e-5, first_step=first_step).x1
        return float((x1 - reference).flatten(1).square().mean(1).sqrt().mean())

    assert error(FIRST_STEP) < 1e-4
    assert error(None) > 5e-4


@pytest.mark.parametrize("weights", zoo_names())
def test_the_velocity_of_a_shipped_model_is_finite_on_its_whole_domain(weights: str) -> None:
    """This includes the ends. If the native path's velocity is infinite there, the model is presented under CondOT."""
    field, x0 = _field(weights, 4)
    ends = (field.scheduler.t_min, field.scheduler.t_max)
    for t in ends:
        assert torch.isfinite(field(x0.double(), torch.tensor(t, dtype=torch.float64))).all()
    x1, *_ = solve(field, x0, 1e-4, 1e-4)
    assert float(x1.abs().max()) < 4  # images are in [-1, 1], mel frames in about [-3, 3]


def test_a_vp_model_is_presented_under_cond_ot_from_its_first_signal_to_noise_ratio() -> None:
    """VP starts at alpha > 0, so the domain begins at that signal-to-noise ratio, slightly after t = 0."""
    model = _model("digits_eps_vp")
    assert model.native.name == "vp"
    assert model.scheduler.name == "cond_ot"
    assert 0 < model.scheduler.t_min < 0.01
    assert model.scheduler.t_max == 1


@pytest.mark.parametrize(
    ("velocity", "reason"),
    [
        (
            lambda x, t: x * float("nan"),
            r"first evaluation, at t=0, is not finite for 4 of 4 samples; check its weights",
        ),
        (
            lambda x, t: torch.where(torch.arange(4)[:, None] == 2, x / 0, x),
            r"first evaluation, at t=0, is not finite for 1 of 4 samples; check its weights",
        ),
        (
            lambda x, t: x if t < 0.5 else torch.where(torch.arange(4)[:, None] == 2, x / 0, x),
            r"the velocity is not finite for 1 of 4 samples; check the model, its data range and the guidance scale",
        ),
        (lambda x, t: 100 * x**3, "the velocity grows without bound or jumps; check the model, its data range"),
    ],
    ids=["not a number", "infinite for one sample", "infinite from the middle on", "blows up"],
)
def test_a_velocity_that_is_not_finite_is_an_error(velocity: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    """The error says when, for how many samples, and names causes that a user can check."""
    with pytest.raises(NotFiniteError, match=reason):
        solve(FunctionField(velocity, CondOT()), torch.ones(4, 3), 1e-4, 1e-4)


def test_a_small_initial_velocity_does_not_lead_to_evaluations_beyond_the_end() -> None:
    """The first step is guessed from the initial velocity. If that is small, the guess would leave the domain."""
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return (1e-4 + 9 * t**8) * torch.ones_like(x)

    x1, *_ = solve(FunctionField(velocity, CondOT()), torch.ones(2, 3), 1e-6, 1e-6)
    torch.testing.assert_close(x1, torch.full((2, 3), 2.0001, dtype=torch.float64), rtol=0, atol=1e-5)
    assert max(times) <= 1
