"""Time grids: ends, order, spacing, serialisation, and rejected input."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import AysSchedules

from solvers.grids import AYS_TABLES, KINDS, LOG_SNR_MARGIN, UNIFORM, Grid, warped_grids
from solvers.schedulers import EDM, VP, CondOT, DiscreteVP, Scheduler
from solvers.schedulers.discrete_vp import scaled_linear_betas

#: One of each kind that supports any number of steps, plus variants with options.
ANY_STEPS = [
    UNIFORM,
    Grid("warped", p=1.6, q=1.2),
    Grid("log_snr"),
    Grid("polynomial"),
    Grid("polynomial", rho=3.0),
    Grid("edm"),
    Grid("edm", rho=5.0, sigma_min=0.01, sigma_max=50.0),
    Grid("shifted"),
    Grid("ays"),
    Grid("ays", table="svd"),
    Grid("sd3"),
]
EVERY_KIND = [*ANY_STEPS, Grid("given", listed=(0.1, 0.4, 0.6, 0.65))]


@pytest.fixture(params=ANY_STEPS, ids=lambda grid: grid.label)
def grid(request: pytest.FixtureRequest) -> Grid:
    """Every kind of grid except 'given', which has a single number of steps."""
    return request.param


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_grid_rises_strictly_from_end_to_end(grid: Grid, scheduler: Scheduler, steps: int) -> None:
    """steps + 1 strictly increasing times that include the domain's exact ends (EDM's start is tested below)."""
    times = grid.times(steps, scheduler)
    assert (times.shape, times.dtype) == ((steps + 1,), torch.float64)
    assert float(times[-1]) == scheduler.t_max
    assert float(times[0]) == scheduler.t_min or grid.kind == "edm"
    assert bool((times.diff() > 0).all())


def test_a_grid_stays_inside_a_cut_domain(grid: Grid, scheduler: Scheduler) -> None:
    """A scheduler with a cut domain (sigma0 on VP, discrete networks) gets a grid inside the remaining domain."""
    cut = dataclasses.replace(scheduler, t_min=0.2, t_max=0.95)
    times = grid.times(5, cut)
    assert float(times[-1]) == 0.95
    assert float(times[0]) == 0.2 or (grid.kind == "edm" and float(times[0]) > 0.2)
    assert bool((times.diff() > 0).all())


def test_the_uniform_grid_has_equal_steps() -> None:
    torch.testing.assert_close(UNIFORM.times(4, CondOT()), torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))


def test_the_warped_grid_follows_its_formula() -> None:
    """t = (1 - (1-r)^p)^q at r = 1/2; p = q = 1 is the uniform grid."""
    assert float(Grid("warped", p=1.6, q=1.2).times(2, CondOT())[1]) == pytest.approx((1 - 0.5**1.6) ** 1.2)
    torch.testing.assert_close(Grid("warped").times(6, CondOT()), UNIFORM.times(6, CondOT()))


def test_p_concentrates_steps_near_the_data_and_q_near_the_noise() -> None:
    by_p = Grid("warped", p=2.0).times(8, CondOT()).diff()
    by_q = Grid("warped", q=2.0).times(8, CondOT()).diff()
    assert bool((by_p.diff() < 0).all())
    assert bool((by_q.diff() > 0).all())


def _margins(scheduler: Scheduler) -> torch.Tensor:
    """The ends of the domain, moved inside by a margin where log-SNR is infinite."""
    margin = LOG_SNR_MARGIN * (scheduler.t_max - scheduler.t_min)
    ends = torch.tensor([scheduler.t_min, scheduler.t_max], dtype=torch.float64)
    inside = ends + torch.tensor([margin, -margin], dtype=torch.float64)
    return torch.where(scheduler.lambda_(ends).isfinite(), ends, inside)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_papers_grids_are_exact_where_log_snr_is_finite(steps: int) -> None:
    """On EDM's path: equal steps in log sigma, and EDM's polynomial, from sigma_max to sigma_min; no margin."""
    edm = EDM()
    share = torch.arange(steps + 1, dtype=torch.float64) / steps
    log_snr = edm.sigma(Grid("log_snr").times(steps, edm))
    torch.testing.assert_close(log_snr, 80 ** (1 - share) * 0.002**share, rtol=1e-11, atol=0)
    polynomial = edm.sigma(Grid("polynomial").times(steps, edm))
    expected = (80 ** (1 / 7) + share * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(polynomial, expected, rtol=1e-11, atol=0)


def test_dpm_solvers_grid_on_a_vp_path_is_exact() -> None:
    """Uniform log-SNR from t = 1 to 1e-3 in the paper's time, which is the domain [0, 0.999] here."""
    vp = VP(t_max=1 - 1e-3)
    lambdas = vp.lambda_(Grid("log_snr").times(8, vp))
    torch.testing.assert_close(lambdas.diff(), ((lambdas[-1] - lambdas[0]) / 8).expand(8), rtol=1e-11, atol=0)


def test_the_log_snr_grid_is_uniform_in_log_snr_between_its_margins(scheduler: Scheduler) -> None:
    """Inner points divide the log-SNR between the ends evenly, or between margins where it is infinite at an end."""
    steps = 6
    times = Grid("log_snr").times(steps, scheduler)
    low, high = (float(scheduler.lambda_(t)) for t in _margins(scheduler))
    expected = torch.linspace(low, high, steps + 1, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(scheduler.lambda_(times[1:-1]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rho", [7.0, 2.0])
def test_the_polynomial_grid_is_uniform_in_the_rho_th_root_of_noise_to_signal(scheduler: Scheduler, rho: float) -> None:
    """EDM's spacing (Karras et al. 2022, eq. 5), applied to sigma/alpha."""
    steps = 6
    times = Grid("polynomial", rho=rho).times(steps, scheduler)
    first, last = torch.exp(-scheduler.lambda_(_margins(scheduler)) / rho)
    expected = torch.linspace(float(first), float(last), steps + 1, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(torch.exp(-scheduler.lambda_(times[1:-1]) / rho), expected, rtol=1e-9, atol=1e-9)


def test_warped_grids_yields_the_product_of_the_exponents() -> None:
    grids = [(grid.kind, grid.p, grid.q) for grid in warped_grids([1.0, 2.0], [1.0, 1.5, 3.0])]
    assert grids == [("warped", p, q) for p in (1.0, 2.0) for q in (1.0, 1.5, 3.0)]


def test_a_grid_label_names_its_kind_and_non_default_options() -> None:
    assert Grid("warped", p=1.6, q=1.2).label == "warped p=1.6 q=1.2"
    assert Grid("log_snr").label == "log_snr"
    assert Grid("edm").label == "edm"
    assert Grid("edm", rho=5.0).label == "edm rho=5"
    assert Grid("given", listed=(0.25, 0.5)).label == "given 0.25,0.5"
    assert Grid("ays", table="svd").label == "ays svd"


def test_an_unknown_grid_is_rejected_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown time grid 'karras'; choose one of uniform, warped, log_snr, poly"):
        Grid("karras")


@pytest.mark.parametrize(("p", "q"), [(0.0, 1.0), (1.0, -2.0), (float("nan"), 1.0)])
def test_exponents_that_are_not_positive_are_rejected(p: float, q: float) -> None:
    with pytest.raises(ValueError, match=r"grid exponents must be positive, got p=.*, q="):
        Grid("warped", p=p, q=q)


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("uniform", {"p": 2.0}, "p belongs to the 'warped' grid, not to 'uniform'; leave it out or change the kind"),
        ("log_snr", {"rho": 5.0}, "rho belongs to the 'polynomial' and 'edm' grid, not to 'log_snr'"),
        ("polynomial", {"sigma_max": 50.0}, "sigma_max belongs to the 'edm' grid, not to 'polynomial'"),
        ("uniform", {"shift": 2.0}, "shift belongs to the 'shifted' and 'sd3' grid, not to 'uniform'"),
        ("edm", {"listed": (0.5,)}, "listed belongs to the 'given' grid, not to 'edm'"),
        ("edm", {"table": "svd"}, "table belongs to the 'ays' grid, not to 'edm'"),
    ],
)
def test_an_option_of_another_kind_of_grid_is_rejected(kind: str, options: dict[str, object], error: str) -> None:
    """An option without effect is taken to be a mistake."""
    with pytest.raises(ValueError, match=error):
        Grid(kind, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("polynomial", {"rho": 0.0}, r"a grid's rho must be positive and finite, got 0\.0"),
        (
            "edm",
            {"sigma_min": 2.0, "sigma_max": 1.0},
            r"needs 0 < sigma_min < sigma_max, got sigma_min=2\.0, sigma_max=1",
        ),
        ("edm", {"sigma_min": 0.0}, r"needs 0 < sigma_min < sigma_max, got sigma_min=0\.0"),
        ("shifted", {"shift": -3.0}, r"a grid's shift must be positive and finite, got -3\.0"),
        ("ays", {"table": "sd3"}, "unknown table 'sd3' of the 'ays' grid; choose one of sd15, sdxl, deepfloyd, svd"),
        ("given", {}, "the 'given' grid needs times: set listed to the times between"),
        ("given", {"listed": (0.2, 0.7, 0.7)}, r"listed times must rise strictly, but 0\.7 is followed by 0\.7"),
        ("given", {"listed": (0.2, 1.5)}, r"listed times must lie between 0 \(noise\) and 1 \(data\), got 1\.5"),
    ],
)
def test_options_out_of_range_are_rejected(kind: str, options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Grid(kind, **options)  # type: ignore[arg-type]


def test_a_grid_without_steps_is_rejected(grid: Grid) -> None:
    with pytest.raises(ValueError, match="a time grid needs at least one step, got 0"):
        grid.times(0, CondOT())


# --- Serialisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", EVERY_KIND, ids=lambda grid: grid.label)
def test_a_grid_survives_a_json_round_trip(stored: Grid) -> None:
    """Results store the chosen grid; JSON turns tuples into lists."""
    assert Grid(**json.loads(json.dumps(dataclasses.asdict(stored)))) == stored


def test_grids_stored_with_three_fields_still_load() -> None:
    """Results of earlier releases contain only kind, p and q."""
    assert Grid(kind="warped", p=1.6, q=1.2) == Grid("warped", p=1.6, q=1.2)
    assert Grid(kind="polynomial", p=1.0, q=1.0) == Grid("polynomial", rho=7.0)


def test_every_kind_of_grid_is_covered() -> None:
    assert {grid.kind for grid in EVERY_KIND} == set(KINDS)


def test_different_grids_have_different_labels() -> None:
    """Tables and figures identify a grid by its label alone."""
    assert len({grid.label for grid in EVERY_KIND}) == len(EVERY_KIND)


# --- EDM's grid ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5, 18])
def test_the_edm_grid_matches_the_noise_levels_of_diffusers(steps: int) -> None:
    """Karras levels from 80 to 0.002 and then 0, on the path that ends at the data; those of diffusers are float32."""
    reference = EDMEulerScheduler()
    reference.set_timesteps(steps)
    scheduler = EDM(sigma_min=0.0)
    sigmas = scheduler.sigma(Grid("edm").times(steps, scheduler))
    torch.testing.assert_close(sigmas, reference.sigmas.double(), rtol=1e-5, atol=1e-7)


def test_the_edm_grid_starts_flow_matching_at_its_own_noise_level() -> None:
    """sigma/alpha = 80 on CondOT is t = 1/81, later than t = 0, with x = (80/81) x0."""
    times = Grid("edm").times(6, CondOT())
    assert float(times[0]) == pytest.approx(1 / 81, rel=1e-12)
    assert float(times[-1]) == 1.0


def test_the_edm_grid_ends_with_the_path_if_that_ends_at_more_noise() -> None:
    """EDM's own path ends at sigma_min: without the step from sigma_min to 0, one more lies between the levels."""
    levels = EDM().sigma(Grid("edm").times(4, EDM()))
    roots = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 5, dtype=torch.float64)
    torch.testing.assert_close(levels, roots**7, rtol=1e-9, atol=0)


def test_the_edm_grid_starts_with_the_path_if_that_has_less_noise() -> None:
    """Stable Diffusion's path starts at sigma/alpha = 14.6, so higher levels are not available."""
    path = DiscreteVP(betas=scaled_linear_betas())
    times = Grid("edm").times(5, path)
    assert (float(times[0]), float(times[-1])) == (path.t_min, path.t_max)


@pytest.mark.parametrize("grid", [Grid("edm", sigma_max=0.05), Grid("ays")], ids=lambda grid: grid.kind)
def test_a_path_without_the_grids_noise_levels_is_rejected(grid: Grid) -> None:
    """A path cut to sigma/alpha from 99 to 24 contains no level of AYS's table, and none below 0.05."""
    cut = CondOT(t_min=0.01, t_max=0.04)
    with pytest.raises(
        ValueError, match=r"grid has noise levels .*, but the cond_ot scheduler's path goes from 99 to 24;"
    ):
        grid.times(3, cut)


# --- Shifted grid -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_the_shifted_grid_matches_diffusers_flow_sampler(shift: float) -> None:
    """FlowMatchEuler's sigmas, equally spaced from 1 and then shifted, equal 1 - t; theirs are float32."""
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8).tolist())
    times = Grid("shifted", shift=shift).times(8, CondOT())
    torch.testing.assert_close(1 - times, reference.sigmas.double(), rtol=0, atol=1e-6)


def test_a_shift_above_one_concentrates_steps_near_the_noise() -> None:
    steps = Grid("shifted", shift=3.0).times(8, CondOT()).diff()
    assert bool((steps.diff() > 0).all())


# --- Align Your Steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "published"), [("sd15", "StableDiffusionTimesteps"), ("sdxl", "StableDiffusionXLTimesteps")]
)
def test_align_your_steps_reproduces_the_published_timesteps(table: str, published: str) -> None:
    """Ten steps on Stable Diffusion's path: the published integer timesteps, from noise levels of three digits."""
    path = DiscreteVP(betas=scaled_linear_betas())
    timesteps = path.timestep(Grid("ays", table=table).times(10, path))[:-1]
    assert timesteps.tolist() == pytest.approx(AysSchedules[published], abs=0.7)


@pytest.mark.parametrize(
    ("table", "published"),
    [
        ("sd15", "StableDiffusionSigmas"),
        ("sdxl", "StableDiffusionXLSigmas"),
        ("svd", "StableDiffusionVideoSigmas"),
    ],
)
def test_the_align_your_steps_tables_match_the_published_ones(table: str, published: str) -> None:
    """Compared with diffusers' copies, whose last level is 0 for the end of the path."""
    assert list(AYS_TABLES[table][:-1]) == AysSchedules[published][:-1]


@pytest.mark.parametrize("table", AYS_TABLES)
def test_ten_steps_have_the_published_noise_levels_on_any_path(table: str) -> None:
    """This holds for the inner levels; the outer points are the path's own ends."""
    times = Grid("ays", table=table).times(10, CondOT())[1:-1]
    expected = torch.tensor(AYS_TABLES[table][1:-1], dtype=torch.float64)
    torch.testing.assert_close(CondOT().sigma(times) / CondOT()(times).alpha, expected, rtol=1e-9, atol=0)


def test_other_numbers_of_steps_interpolate_the_table_in_log_noise_level() -> None:
    """Twenty steps: every second level is from the table, the others are geometric means of their neighbours."""
    times = Grid("ays").times(20, VP())
    levels = torch.exp(-VP().lambda_(times[1:-1]))
    torch.testing.assert_close(
        levels[1::2], torch.tensor(AYS_TABLES["sd15"][1:-1], dtype=torch.float64), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(levels[2:-1:2], (levels[1:-2:2] * levels[3::2]).sqrt(), rtol=1e-8, atol=0)


# --- Listed times -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [(0.3, 0.8), (0.0, 0.3, 0.8), (0.3, 0.8, 1.0), (0.0, 0.3, 0.8, 1.0)])
def test_listed_times_may_omit_the_ends(listed: tuple[float, ...]) -> None:
    assert Grid("given", listed=listed).times(3, CondOT()).tolist() == [0.0, 0.3, 0.8, 1.0]


def test_listed_times_must_match_the_number_of_steps() -> None:
    error = r"2 listed times inside the domain make 3 steps, but the solver takes 5; list 4 times besides the ends"
    with pytest.raises(ValueError, match=error):
        Grid("given", listed=(0.3, 0.8)).times(5, CondOT())


def test_listed_times_outside_the_domain_are_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"listed time 0\.1 is outside the domain \[0\.2, 0\.9\] of the cond_ot scheduler; its"
    ):
        Grid("given", listed=(0.1, 0.8)).times(2, CondOT(t_min=0.2, t_max=0.9))
