"""GITS: the optimal time grid for ground-truth trajectories, compared with brute force over all grids."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import fine_rk4, mixture, noise
from torch import Tensor

from solvers.families.base import GridSolver
from solvers.families.euler import Euler
from solvers.gits import Loss, cheapest_path, gits_grid, step_costs
from solvers.grids import UNIFORM, Grid
from solvers.schedulers import CondOT

KNOTS = 25


def trajectories(times: Tensor, batch: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Exact states and velocities of the mixture at ``times``, each of shape (K, B, 2)."""
    field = mixture().field(CondOT())
    states = [noise(batch, 2, seed=seed)]
    for t, t_next in itertools.pairwise(times.tolist()):
        states.append(fine_rk4(field, states[-1], t, t_next, steps=4))
    return torch.stack(states), torch.stack([field(x, t) for x, t in zip(states, times, strict=True)])


def uniform(knots: int = KNOTS) -> Tensor:
    return torch.linspace(0, 1, knots, dtype=torch.float64)


def path_cost(costs: Tensor, path: tuple[int, ...] | list[int], gamma: float) -> float:
    """sum_k gamma^k cost(i_k, i_{k+1}), as documented."""
    return sum(gamma**k * float(costs[i, j]) for k, (i, j) in enumerate(itertools.pairwise(path)))


# --- Dynamic programming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_path_is_the_cheapest_of_all_sub_grids(steps: int, gamma: float, seed: int) -> None:
    """Random costs of both signs, compared with every sub-grid of 8 knots."""
    knots = 8
    costs = noise(knots, knots, seed=seed)
    every = [(0, *inner, knots - 1) for inner in itertools.combinations(range(1, knots - 1), steps - 1)]
    best = min(every, key=lambda path: path_cost(costs, path, gamma))
    assert tuple(cheapest_path(costs, steps, gamma)) == best


def test_ties_are_resolved_in_favour_of_the_first_path() -> None:
    """A fixed rule keeps the grid independent of the machine."""
    assert cheapest_path(torch.ones(6, 6), 3) == [0, 1, 2, 5]


def test_the_largest_number_of_steps_uses_every_knot() -> None:
    """Only one such path exists, and its cost is finite."""
    assert cheapest_path(noise(5, 5), 4) == [0, 1, 2, 3, 4]


def test_a_larger_gamma_concentrates_steps_near_the_data() -> None:
    """With quadratic step costs the steps are equal at gamma = 1 and shrink towards the data for gamma > 1."""
    times = uniform(41)
    costs = (times[None, :] - times[:, None]) ** 2
    assert cheapest_path(costs, 4, gamma=1.0) == [0, 10, 20, 30, 40]
    steps = torch.tensor(cheapest_path(costs, 4, gamma=1.5)).diff()
    assert bool((steps.diff() < 0).all())


@pytest.mark.parametrize("steps", [0, 5])
def test_a_number_of_steps_that_the_knots_do_not_allow_is_rejected(steps: int) -> None:
    with pytest.raises(ValueError, match=f"5 knots allow 1 to 4 steps, got {steps}; give trajectories on a finer grid"):
        cheapest_path(torch.ones(5, 5), steps)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_a_gamma_that_is_not_positive_and_finite_is_rejected(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be positive and finite, got "):
        cheapest_path(torch.ones(5, 5), 2, gamma)


# --- Step costs ----------------------------------------------------------------------------------------------------


def test_the_error_cost_is_the_distance_of_the_euler_step_from_the_trajectory() -> None:
    """Entry (i, j) by hand for samples with more than one axis, averaged over the batch."""
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    states, velocities = noise(3, 2, 2, 2), noise(3, 2, 2, 2, seed=1)
    residual = states[1] + 0.7 * velocities[1] - states[2]
    expected = sum(float(sample.square().sum().sqrt()) for sample in residual) / 2
    assert float(step_costs(states, velocities, times)[1, 2]) == pytest.approx(expected)


def test_only_forward_steps_have_a_finite_cost() -> None:
    """A grid cannot repeat a knot or go backwards."""
    costs = step_costs(*trajectories(uniform(4)), uniform(4))
    assert bool(torch.isinf(costs.tril()).eq(torch.ones(4, 4).tril().bool()).all())


def test_a_straight_trajectory_has_zero_cost() -> None:
    """With a constant velocity Euler is exact for every step size."""
    times = uniform(6)
    velocities = noise(1, 3, 2).expand(6, 3, 2)
    states = noise(1, 3, 2, seed=1) + times[:, None, None] * velocities
    assert float(step_costs(states, velocities, times).triu(diagonal=1).nan_to_num(posinf=0.0).max()) < 1e-14


def test_the_deviation_cost_is_measured_from_the_line_between_the_ends() -> None:
    """Ends on the first axis, curvature along the second: the Euler point's distance minus the true point's."""
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    states = torch.tensor([[[0.0, 0.0]], [[0.9, 0.2]], [[2.0, 0.0]]], dtype=torch.float64)
    velocities = torch.tensor([[[7.0, 1.0]], [[1.0, 0.6]], [[0.0, 0.0]]], dtype=torch.float64)
    costs = step_costs(states, velocities, times, loss="deviation")
    assert [float(costs[0, 1]), float(costs[1, 2]), float(costs[0, 2])] == pytest.approx([0.3, 0.5, 1.0])


# --- Grid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["error", "deviation"])
def test_the_grid_is_the_cheapest_of_all_sub_grids_of_the_knots(loss: Loss) -> None:
    """From trajectories to times, compared with all 126 grids of 5 steps on 11 knots."""
    times = uniform(11)
    states, velocities = trajectories(times)
    costs = step_costs(states, velocities, times, loss)
    every = [(0, *inner, 10) for inner in itertools.combinations(range(1, 10), 4)]
    best = min(every, key=lambda path: path_cost(costs, path, 1.15))
    assert torch.equal(gits_grid(states, velocities, times, 5, 1.15, loss), times[list(best)])


def test_the_grid_rises_strictly_across_the_domain() -> None:
    """steps + 1 float64 times that include both ends of the knots, as a 'given' grid requires."""
    times = uniform()
    grid = gits_grid(*trajectories(times), times, 6)
    assert (grid.shape, grid.dtype, float(grid[0]), float(grid[-1])) == ((7,), torch.float64, 0.0, 1.0)
    assert bool((grid.diff() > 0).all())


@pytest.mark.parametrize("steps", [4, 6, 8])
def test_euler_is_more_accurate_on_the_gits_grid_than_on_the_uniform_one(steps: int) -> None:
    """The grid is optimised on 32 trajectories and scored by mean distance on 256 others."""
    times = uniform()
    grid = gits_grid(*trajectories(times), times, steps)
    field, x0 = mixture().field(CondOT()), noise(256, 2, seed=5)
    exact = fine_rk4(field, x0, 0.0, 1.0, steps=100)
    optimised, uniform_error = (
        float((Euler().integrate(field, x0, t) - exact).norm(dim=-1).mean())
        for t in (grid, UNIFORM.times(steps, CondOT()))
    )
    assert optimised < uniform_error


def test_the_grid_can_be_used_by_any_solver() -> None:
    """As a 'given' grid its times survive bit for bit, and a solver runs on them."""
    times = uniform()
    grid = gits_grid(*trajectories(times), times, 5)
    given_grid = Grid("given", listed=tuple(grid.tolist()))
    assert torch.equal(given_grid.times(5, CondOT()), grid)
    assert torch.equal(GridSolver(Euler(), 5, given_grid).to_ns(CondOT()).times, grid[:-1])


def test_single_precision_trajectories_give_the_same_grid() -> None:
    """A network's states are float32; the costs are computed in float64."""
    times = uniform()
    states, velocities = trajectories(times)
    assert torch.equal(gits_grid(states.float(), velocities.float(), times, 5), gits_grid(states, velocities, times, 5))


def test_states_that_do_not_match_the_knots_are_rejected() -> None:
    states = noise(4, 2, 2)
    with pytest.raises(ValueError, match=r"states and velocities \(K, B, \.\.\.\) and times \(K,\); got \(4, 2, 2\)"):
        gits_grid(states, states, uniform(5), 2)


def test_velocities_of_another_shape_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 2, 2\) with velocities of shape \(4, 3, 2\); pass both at"):
        gits_grid(noise(4, 2, 2), noise(4, 3, 2), uniform(4), 2)


def test_knots_that_do_not_rise_are_rejected() -> None:
    """Trajectories stored from data to noise, as diffusion code does, would otherwise get meaningless costs."""
    states = noise(4, 2, 2)
    with pytest.raises(ValueError, match="must rise strictly from the noise to the data; sort them"):
        gits_grid(states, states, uniform(4).flip(0), 2)


def test_non_finite_velocities_are_rejected() -> None:
    """For example, a variance-preserving velocity at t = 1."""
    velocities = noise(4, 2, 2)
    velocities[-1] = math.inf
    with pytest.raises(ValueError, match="must be finite; leave out the times at which the velocity is infinite"):
        gits_grid(noise(4, 2, 2), velocities, uniform(4), 2)


def test_an_unknown_loss_is_rejected() -> None:
    with pytest.raises(ValueError, match="unknown loss 'l1' of a step; choose 'error' or 'deviation'"):
        step_costs(noise(4, 2, 2), noise(4, 2, 2), uniform(4), "l1")  # type: ignore[arg-type]
