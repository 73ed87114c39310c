"""Time grids: ends, order, spacing, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from solvers.grids import LOG_SNR_MARGIN, UNIFORM, Grid, warped_grids
from solvers.schedulers import CondOT, Scheduler


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_grid_runs_from_end_to_end_and_never_turns_back(grid: Grid, scheduler: Scheduler, steps: int) -> None:
    """steps + 1 strictly increasing times, the domain's ends exactly among them."""
    times = grid.times(steps, scheduler)
    assert (times.shape, times.dtype) == ((steps + 1,), torch.float64)
    assert (float(times[0]), float(times[-1])) == (scheduler.t_min, scheduler.t_max)
    assert bool((times.diff() > 0).all())


def test_a_grid_keeps_to_a_cut_domain(grid: Grid, scheduler: Scheduler) -> None:
    """A scheduler whose domain was cut (sigma0 on VP, discrete networks) gets its grid inside what is left."""
    cut = dataclasses.replace(scheduler, t_min=0.2, t_max=0.7)
    times = grid.times(5, cut)
    assert (float(times[0]), float(times[-1])) == (0.2, 0.7)
    assert bool((times.diff() > 0).all())


def test_the_uniform_grid_has_equal_steps() -> None:
    torch.testing.assert_close(UNIFORM.times(4, CondOT()), torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))


def test_the_warped_grid_follows_its_formula() -> None:
    """t = (1 - (1-r)^p)^q at r = 1/2, and p = q = 1 is uniform."""
    assert float(Grid("warped", p=1.6, q=1.2).times(2, CondOT())[1]) == pytest.approx((1 - 0.5**1.6) ** 1.2)
    torch.testing.assert_close(Grid("warped").times(6, CondOT()), UNIFORM.times(6, CondOT()))


def test_p_crowds_steps_towards_the_data_and_q_towards_the_noise() -> None:
    by_p = Grid("warped", p=2.0).times(8, CondOT()).diff()
    by_q = Grid("warped", q=2.0).times(8, CondOT()).diff()
    assert bool((by_p.diff() < 0).all())
    assert bool((by_q.diff() > 0).all())


def test_the_log_snr_grid_is_uniform_in_log_snr_between_its_margins(scheduler: Scheduler) -> None:
    """Inner points divide [lambda(t_min + margin), lambda(t_max - margin)] evenly; the outermost are moved out."""
    steps = 6
    times = Grid("log_snr").times(steps, scheduler)
    low, high = (float(scheduler.lambda_(t)) for t in (LOG_SNR_MARGIN, 1 - LOG_SNR_MARGIN))
    expected = torch.linspace(low, high, steps + 1, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(scheduler.lambda_(times[1:-1]), expected, rtol=1e-9, atol=1e-9)


def test_the_polynomial_grid_is_uniform_in_the_seventh_root_of_noise_to_signal(scheduler: Scheduler) -> None:
    """EDM's spacing (Karras et al. 2022, eq. 5, rho = 7) in sigma/alpha."""
    steps = 6
    times = Grid("polynomial").times(steps, scheduler)
    margins = torch.tensor([LOG_SNR_MARGIN, 1 - LOG_SNR_MARGIN], dtype=torch.float64)
    first, last = torch.exp(-scheduler.lambda_(margins) / 7)
    expected = torch.linspace(float(first), float(last), steps + 1, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(torch.exp(-scheduler.lambda_(times[1:-1]) / 7), expected, rtol=1e-9, atol=1e-9)


def test_the_search_of_warped_grids_is_the_product_of_its_exponents() -> None:
    found = [(grid.kind, grid.p, grid.q) for grid in warped_grids([1.0, 2.0], [1.0, 1.5, 3.0])]
    assert found == [("warped", p, q) for p in (1.0, 2.0) for q in (1.0, 1.5, 3.0)]


def test_a_grid_is_labelled_by_what_tells_it_apart() -> None:
    assert Grid("warped", p=1.6, q=1.2).label == "warped p=1.6 q=1.2"
    assert Grid("log_snr").label == "log_snr"


def test_an_unknown_grid_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown time grid 'karras'; choose one of uniform, warped, log_snr, poly"):
        Grid("karras")


@pytest.mark.parametrize(("p", "q"), [(0.0, 1.0), (1.0, -2.0), (float("nan"), 1.0)])
def test_exponents_that_are_not_positive_are_refused(p: float, q: float) -> None:
    with pytest.raises(ValueError, match=r"grid exponents must be positive, got p=.*, q="):
        Grid("warped", p=p, q=q)


def test_exponents_on_a_grid_without_them_are_refused() -> None:
    """An option without effect is a mistake, not a wish."""
    with pytest.raises(ValueError, match=r"p and q belong to the 'warped' grid, not to 'uniform'"):
        Grid("uniform", p=2.0)


def test_a_grid_without_steps_is_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match="a time grid needs at least one step, got 0"):
        grid.times(0, CondOT())
