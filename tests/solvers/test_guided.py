"""One theta for a range of guidance scales: linear in the scale, learned on several scales, one file."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation import FIELD
from oracles import fine_rk4, gaussian, noise
from torch import Tensor

from solvers.distil.drive import drive
from solvers.distil.methods import levenberg_marquardt as lm
from solvers.distil.methods.base import LossQuery, NormalQuery, Problem, Query, Several
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.distil.normal_equations import normal_equations
from solvers.distil.pair_field import unconditional
from solvers.families import GridSolver
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.bns import BNS
from solvers.families.bns_guided import BNSGuided
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.field import FunctionField, VelocityField
from solvers.grids import UNIFORM, Grid
from solvers.guided import GuidedSolver, learning_scales
from solvers.losses import per_sample_mse, psnr_db, psnr_loss
from solvers.ns import InvalidThetaError, NSSolver
from solvers.schedulers import CondOT
from solvers.theta import ThetaArtifact, load_theta

NFE = 4
SCALES = (1.0, 2.0, 3.0)
PAIRS = 32
FAMILY = BNSGuided(low=1.0, high=3.0)
SETTINGS = LevenbergMarquardt(iterations=6, batch_size=16, training_pairs=PAIRS)
CONDITIONAL = gaussian((1.2, 0.7), 0.35).field(CondOT())
CHANGED = Midpoint(), AdamsBashforth(2)
"""Two solvers of equal NFE and different numbers."""


def guided(scale: float) -> VelocityField:
    """The velocity of a mixture, guided towards a part of it."""
    return FunctionField(lambda x, t: FIELD(x, t) + scale / 4 * (CONDITIONAL(x, t) - FIELD(x, t)), CondOT())


@functools.cache
def pairs(scale: float) -> tuple[Tensor, Tensor]:
    """(x0, x1) at a guidance scale: the training pairs, then 64 validation pairs."""
    x0 = noise(PAIRS + 64, 2)
    return x0, fine_rk4(guided(scale), x0, 0.0, 1.0, steps=60)


def answer(query: Query) -> Any:
    """The answer of a host that holds a training set of each scale."""
    if isinstance(query, Several):
        return [answer(single) for single in query.queries]
    assert isinstance(query, NormalQuery | LossQuery)
    scale = SCALES[query.pair_set]
    x0, x1 = (values[query.indices] for values in pairs(scale))
    if isinstance(query, LossQuery):
        with torch.no_grad():
            return float(psnr_loss(query.solver.sample(guided(scale), x0), x1).mean())
    options: Any = {"jacobian": query.jacobian, "free": query.free}
    return normal_equations(query.solver, unconditional(guided(scale)), x0, x1, memory_bytes=2**26, **options)


def between() -> Tensor:
    """Parameters whose solvers differ at the two ends."""
    lower, upper = (GridSolver(family, NFE, UNIFORM).to_ns(CondOT()) for family in CHANGED)
    return FAMILY.start_between(lower, upper, CondOT())


def learned(settings: LevenbergMarquardt, steps: int, state: Any = None) -> Any:
    state = state or settings.begin(FAMILY.start(GridSolver(Euler(), NFE, UNIFORM), CondOT()))
    return drive(settings.iterate(state, steps, Problem(FAMILY, CondOT(), guidance_scales=SCALES)), answer)


def psnr(solver: NSSolver, scale: float) -> float:
    """Mean PSNR on the validation pairs of a scale, dB."""
    x0, x1 = (values[PAIRS:] for values in pairs(scale))
    with torch.no_grad():
        return float(psnr_db(per_sample_mse(solver.sample(guided(scale), x0), x1), 2.0).mean())


# ---- the family ---------------------------------------------------------------------------------------------------


def test_a_constant_start_is_the_same_solver_at_every_scale() -> None:
    """What is added for guidance is zero at the start."""
    start = GridSolver(Midpoint(), NFE, Grid("warped", 1.4, 1.2), sigma0=2.0)
    parameters = FAMILY.start(start, CondOT())
    for scale in (1.0, 1.7, 3.0):
        flat = FAMILY.at(scale).to_ns(parameters, CondOT(), 2.0).flat()
        torch.testing.assert_close(flat, start.to_ns(CondOT()).flat(), rtol=1e-12, atol=1e-12)


def test_every_number_is_linear_in_the_guidance_scale() -> None:
    """theta(w) = c_0 + c_1 w, from the solver of one end to that of the other, in the family and in what it saves."""
    lower, upper = (GridSolver(family, NFE, UNIFORM).to_ns(CondOT()).flat() for family in CHANGED)
    solvers = FAMILY.to_guided(between(), CondOT())
    for scale in (1.0, 1.5, 2.0, 2.75, 3.0):
        expected = lower + (scale - 1) / 2 * (upper - lower)
        flat = FAMILY.at(scale).to_ns(between(), CondOT(), 1.0).flat()
        torch.testing.assert_close(flat, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(solvers.at(scale).flat(), expected, rtol=1e-12, atol=1e-12)


def test_projected_times_lie_in_the_domain_at_every_scale() -> None:
    """Both ends are projected, and the rest lies between them."""
    wild = FAMILY.project(5 * between() - 2, CondOT(), 1.0)
    times = torch.stack([FAMILY.at(w).to_ns(wild, CondOT(), 1.0).times for w in (1.0, 1.3, 2.0, 2.9, 3.0)])
    assert 0 <= float(times.min()) < float(times.max()) <= 1
    assert torch.equal(FAMILY.project(wild, CondOT(), 1.0), wild)


def test_the_beginning_is_learned_as_for_bns() -> None:
    """Held, t_0 and a_0 are the same at every scale; free, each end has its own."""
    start = GridSolver(Euler(), NFE, UNIFORM)
    for beginning, count in (("held", NFE * (NFE + 5) // 2 - 1), ("time", 18), ("free", 19)):
        family = dataclasses.replace(FAMILY, beginning=beginning)
        assert len(family.start(start, CondOT())) == 2 * count == 2 * family.freedom(NFE)
    held = FAMILY.at(2.0).to_ns(between(), CondOT(), 1.0)
    assert (float(held.times[0]), float(held.a[0])) == (0.0, 1.0)


@pytest.mark.parametrize("scale", [0.99, 3.01, -1.0, float("nan"), float("inf")])
def test_a_scale_outside_the_range_is_refused(scale: float) -> None:
    """By the family, by the solver and by the artifact; the message names the scale and the range."""
    artifact = ThetaArtifact(FAMILY.to_guided(between(), CondOT()))
    message = f"guidance_scale {scale:g} is outside the range that this theta was made for, 1 to 3; choose"
    for refuse in (FAMILY.at, lambda w: artifact.at(guidance_scale=w)):
        with pytest.raises(InvalidThetaError, match=message):
            refuse(scale)


@pytest.mark.parametrize(("low", "high"), [(3.0, 1.0), (2.0, 2.0), (1.0, float("inf"))])
def test_a_range_without_extent_is_refused(low: float, high: float) -> None:
    """A single scale needs no range."""
    with pytest.raises(ValueError, match="a range of guidance scales has a lower and a higher end"):
        BNSGuided(low=low, high=high)


def test_two_solvers_that_begin_differently_are_refused() -> None:
    """Their learned numbers do not correspond."""
    euler = GridSolver(Euler(), NFE, UNIFORM).to_ns(CondOT())
    later = NSSolver(euler.times + 0.01, euler.a, euler.b)
    with pytest.raises(ValueError, match="must agree in NFE and begin alike"):
        FAMILY.start_between(euler, later, CondOT())


def test_a_range_is_learned_on_three_or_five_scales() -> None:
    """Evenly spaced, with both ends; few for a narrow range."""
    assert learning_scales((1.0, 5.0)) == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert learning_scales((1.0, 3.0)) == SCALES
    assert learning_scales((0.1, 7.3))[0] == 0.1
    assert learning_scales((0.1, 7.3))[-1] == 7.3


# ---- learning -----------------------------------------------------------------------------------------------------


def local_model(parameters: Tensor, batches: list[list[int]]) -> Any:
    problem = Problem(FAMILY, CondOT(), guidance_scales=SCALES)
    sums, loss, spent = drive(lm._equations(problem, parameters, batches, "jvp"), answer)
    return sums.mean(), loss, spent


def test_the_summed_equations_are_those_of_the_whole_problem() -> None:
    """H and g of all scales, against autograd through every sample as a function of both ends' numbers."""
    batches, parameters = [[0, 3, 5], [7, 2, 4], [1, 6, 8]], between()
    model, loss, _ = local_model(parameters, batches)

    def samples(values: Tensor) -> Tensor:
        parts = []
        for scale, indices in zip(SCALES, batches, strict=True):
            solver = FAMILY.at(scale).to_ns(values, CondOT(), 1.0)
            parts.append(solver.sample(guided(scale), pairs(scale)[0][indices]))
        return torch.cat(parts)

    x1 = torch.cat([pairs(scale)[1][indices] for scale, indices in zip(SCALES, batches, strict=True)])
    jacobian = torch.autograd.functional.jacobian(samples, parameters).flatten(0, 1)
    residual = (samples(parameters) - x1).flatten()
    mse = residual.view(9, 2).square().mean(dim=1)
    weight = (2 / (2 * mse)).repeat_interleave(2)
    torch.testing.assert_close(model.h, jacobian.T @ (weight[:, None] * jacobian) / 9, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.g, jacobian.T @ (weight * residual) / 9, rtol=1e-6, atol=1e-8)
    assert loss == pytest.approx(float(mse.log().mean()), rel=1e-9)


def test_the_summed_equations_are_a_sum_of_kronecker_products() -> None:
    """H = sum_w [[(1-s)^2, s(1-s)], [s(1-s), s^2]] x H_w, with s the position of w in the range."""
    batches, parameters = [[0, 3], [7, 2], [1, 6]], between()
    model, _, _ = local_model(parameters, batches)
    inner, expected = BNS(), torch.zeros_like(model.h)
    for k, scale in enumerate(SCALES):
        at_scale = inner.start_from(FAMILY.at(scale).to_ns(parameters, CondOT(), 1.0), CondOT())
        (solver,), (chain,) = lm._linearised(Problem(inner, CondOT()), at_scale)
        part = answer(NormalQuery(solver, batches[k], "jvp", (chain != 0).any(dim=1), k))
        weights = torch.tensor([1 - k / 2, k / 2], dtype=torch.float64)
        expected += torch.kron(torch.outer(weights, weights), chain.T @ part.h @ chain) / 6
    torch.testing.assert_close(model.h, expected, rtol=1e-9, atol=1e-10)


def test_one_theta_gains_at_every_scale_also_between_those_it_was_learned_on() -> None:
    """After six iterations it is at least 8 dB better than its start."""
    state = learned(SETTINGS, 6)
    solvers = FAMILY.to_guided(torch.tensor(state.parameters, dtype=torch.float64), CondOT())
    start = GridSolver(Euler(), NFE, UNIFORM).to_ns(CondOT())
    for scale in (1.0, 1.5, 2.0, 2.5, 3.0):
        assert psnr(solvers.at(scale), scale) > psnr(start, scale) + 8


def test_a_resumed_run_equals_one_without_interruption_and_seeds_differ() -> None:
    """To the bit; another seed takes other batches."""
    small = dataclasses.replace(SETTINGS, batch_size=8)
    once = learned(small, 4)
    assert learned(small, 2, state=learned(small, 2)).parameters == once.parameters
    assert learned(dataclasses.replace(small, seed=1), 4).parameters != once.parameters


# ---- the file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact() -> ThetaArtifact:
    """A theta for scales 1 to 3, with the PSNR of two of them."""
    by_scale = {1.0: 41.5, 3.0: 37.25}
    return ThetaArtifact(
        FAMILY.to_guided(between(), CondOT()),
        family="bns_guided",
        scheduler="cond_ot",
        validation_psnr_db=39.4,
        validation_psnr_db_by_scale=by_scale,
    )


def test_the_file_keeps_every_number(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """A saved theta has the same solvers, range and PSNRs."""
    artifact.save(tmp_path / "theta.json")
    loaded = load_theta(tmp_path / "theta.json")
    assert loaded.guidance_range == (1.0, 3.0)
    assert (loaded.digest, loaded.nfe) == (artifact.digest, NFE)
    assert loaded.validation_psnr_db_by_scale == {1.0: 41.5, 3.0: 37.25}
    for scale in (1.0, 2.2, 3.0):
        assert torch.equal(
            loaded.at(guidance_scale=scale).solver.flat(), artifact.at(guidance_scale=scale).solver.flat()
        )


def test_a_chosen_scale_is_an_ordinary_theta(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """It has one solver and one scale, its own PSNR if that was measured, and a file of the usual form."""
    chosen = artifact.at(guidance_scale=3)
    assert (chosen.guidance_scale, chosen.guidance_range, chosen.validation_psnr_db) == (3.0, None, 37.25)
    assert artifact.at(guidance_scale=2).validation_psnr_db is None
    chosen.save(tmp_path / "theta.json")
    content = json.loads((tmp_path / "theta.json").read_text())
    assert content["guidance_scale"] == 3.0
    assert not content.keys() & {"guidance_range", "upper_times", "validation_psnr_db_by_scale"}
    assert chosen.at(guidance_scale=3.0) is chosen
    with pytest.raises(InvalidThetaError, match=r"was made for guidance_scale 3, not 2; use it at 3, or distil"):
        chosen.at(guidance_scale=2)


@pytest.mark.parametrize("name", ["solver", "guidance_scale"])
def test_what_belongs_to_one_scale_cannot_be_read_of_a_range(artifact: ThetaArtifact, name: str) -> None:
    """The message says how to choose a scale."""
    message = r"for every guidance scale from 1 to 3; choose one first, for example theta\.at\(guidance_scale=3\)"
    with pytest.raises(InvalidThetaError, match=message):
        getattr(artifact, name)
    assert "guidance 1 to 3, 39.40 dB" in repr(artifact)


def test_a_release_that_knows_no_ranges_refuses_the_file_by_its_fields(artifact: ThetaArtifact) -> None:
    """Such releases refuse fields they do not know, and name them; a file without the range is refused in this way."""
    content = json.loads(artifact.to_json())
    known_before = {"format", "version", "nfe", "schedule", "times", "a", "b"}
    del content["guidance_range"]
    assert "upper_times" not in known_before
    with pytest.raises(
        InvalidThetaError, match=r"fields that this release does not know \('upper_a', 'upper_b', 'upper"
    ):
        ThetaArtifact.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_range": [3.0, 1.0]}, "a range of guidance scales has a lower and a higher end, got 3 and 1"),
        ({"guidance_range": [1.0]}, "'guidance_range' must be a list of 2 numbers, got 1"),
        ({"guidance_range": "1:3"}, "'guidance_range' must be a list of 2 numbers, got str"),
        ({"guidance_scale": 2.0}, "it has both 'guidance_scale' and 'guidance_range'"),
        ({"upper_times": [0.0, 0.2, 0.5, 1.5]}, r"'upper_times' must lie in \[0, 1\], got 1.5"),
        ({"upper_a": [1.0]}, "'upper_a' must be a list of 5 numbers, got 1"),
        ({"upper_b": []}, "'upper_b' must have 5 rows"),
        ({"validation_psnr_db_by_scale": 3}, "must be a list of scales and their PSNR, got 3"),
        ({"validation_psnr_db_by_scale": [[1.0]]}, "'validation_psnr_db_by_scale' must be a list of 2 numbers, got 1"),
    ],
)
def test_a_faulty_file_is_refused(artifact: ThetaArtifact, changes: dict[str, Any], message: str) -> None:
    """One sentence names the field."""
    with pytest.raises(InvalidThetaError, match=message):
        ThetaArtifact.from_json(json.dumps(json.loads(artifact.to_json()) | changes))


def test_ends_of_different_nfe_are_refused() -> None:
    """Their numbers do not correspond."""
    lower, upper = (GridSolver(Euler(), nfe, UNIFORM).to_ns(CondOT()) for nfe in (3, 4))
    with pytest.raises(InvalidThetaError, match="take the same number of evaluations, got 3 and 4"):
        GuidedSolver(lower, upper, (1.0, 3.0))
