"""Linear multistep methods with constant coefficients: exactness, order, labels, and rejected coefficients."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import fine_rk4, mixture, noise

from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import GridSolver
from solvers.families.euler import Euler
from solvers.families.linear_multistep import Formula, LinearMultistep
from solvers.field import FunctionField
from solvers.grids import UNIFORM, Grid
from solvers.schedulers import CondOT

EULER, AB2 = (1.0,), (1.5, -0.5)
AB3 = (23 / 12, -16 / 12, 5 / 12)
AB4 = (55 / 24, -59 / 24, 37 / 24, -9 / 24)


@pytest.mark.parametrize(("b", "steps_back"), [((EULER, AB2), 2), ((EULER, AB2, AB3), 3), ((EULER, AB2, AB3, AB4), 4)])
def test_classical_coefficients_on_a_uniform_grid_give_adams_bashforth(
    b: tuple[tuple[float, ...], ...], steps_back: int
) -> None:
    """Variable-step coefficients reduce to the classical ones there, including the start-up."""
    theta = GridSolver(LinearMultistep(b=b), 7, UNIFORM).to_ns(CondOT())
    expected = GridSolver(AdamsBashforth(steps_back), 7, UNIFORM).to_ns(CondOT())
    torch.testing.assert_close(theta.flat(), expected.flat(), rtol=0, atol=1e-12)


def test_one_row_gives_the_euler_method() -> None:
    theta = GridSolver(LinearMultistep(b=(EULER,)), 5, UNIFORM).to_ns(CondOT())
    torch.testing.assert_close(theta.flat(), GridSolver(Euler(), 5, UNIFORM).to_ns(CondOT()).flat(), rtol=0, atol=1e-14)


def test_past_states_are_used() -> None:
    """Nystrom's midpoint rule x_{i+1} = x_{i-1} + 2 h u_i on u = t, computed by hand."""
    nystrom = LinearMultistep(a=((1.0,), (0.0, 1.0)), b=(EULER, (2.0, 0.0)))
    field = FunctionField(lambda x, t: t.expand_as(x), CondOT())
    times = UNIFORM.times(4, CondOT())
    # x_1 = 0, x_2 = 0 + 2/4 * 1/4, x_3 = 0 + 2/4 * 2/4, x_4 = x_2 + 2/4 * 3/4.
    sample = nystrom.integrate(field, torch.zeros(1, dtype=torch.float64), times)
    assert float(sample) == pytest.approx(1 / 8 + 3 / 8, abs=1e-15)


@pytest.mark.parametrize(
    ("a", "b", "order"),
    [
        ((1.0,), EULER, 1),
        ((1.0, 0.0), AB2, 2),
        ((1.0, 0.0, 0.0), AB3, 3),
        ((1.0, 0.0, 0.0, 0.0), AB4, 4),
        ((0.0, 1.0), (2.0, 0.0), 2),
        ((1.0, 0.0), (1.0, 0.0), 1),
        ((0.5, 0.5), (1.75, -0.25), 2),
        ((1.0,), (0.5,), 0),
        ((0.5,), (1.0,), -1),
    ],
)
def test_the_order_of_a_formula_follows_from_its_coefficients(
    a: tuple[float, ...], b: tuple[float, ...], order: int
) -> None:
    """Order conditions: polynomials up to that degree are integrated exactly from exact starting values."""
    assert Formula(a, b).order == order


def test_the_start_up_limits_the_order_of_the_method() -> None:
    """Euler's first step has an error of h^2, so AB4 converges no faster than AB2."""
    assert LinearMultistep(b=(EULER, AB2, AB3, AB4)).order == 2
    assert LinearMultistep(b=(EULER,)).order == 1


def test_the_order_is_kept_on_a_smooth_grid() -> None:
    """The method steps in r: halving the steps of a warped grid quarters the error."""
    interior, x0 = CondOT(t_min=0.1, t_max=0.9), noise(8, 2)
    field, grid = mixture().field(interior), Grid("warped", p=1.0, q=1.5)
    exact = fine_rk4(field, interior.sigma(0.1) * x0, 0.1, 0.9, steps=1000)
    errors = [
        float((GridSolver(LinearMultistep(), nfe, grid).sample(field, x0) - exact).square().mean().sqrt())
        for nfe in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


def test_it_differs_from_variable_step_adams_bashforth_on_a_non_uniform_grid() -> None:
    """Coefficients that are constant in r and coefficients computed per step are different methods."""
    grid = Grid("warped", p=1.6, q=1.2)
    constant, variable = (
        GridSolver(method, 6, grid).to_ns(CondOT()) for method in (LinearMultistep(), AdamsBashforth(2))
    )
    assert not torch.allclose(constant.b, variable.b, rtol=1e-3)


def test_coefficients_given_as_lists_are_stored_as_tuples() -> None:
    """YAML has no tuples; equal methods must compare equal in either notation."""
    assert LinearMultistep(b=[[1], [1.5, -0.5]]) == LinearMultistep()  # type: ignore[arg-type]


def test_the_label_contains_the_coefficients() -> None:
    """Tables identify methods by their labels."""
    assert LinearMultistep().label == "LMM b=1.5,-0.5"
    assert LinearMultistep(a=((1.0,), (0.5, 0.5)), b=(EULER, (1.75, -0.25))).label == "LMM a=0.5,0.5 b=1.75,-0.25"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"b": ()}, "b needs rows of 1, 2, .* weights, the k-th for k known velocities, got rows of none"),
        ({"b": ((1.5, -0.5),)}, "b needs rows of 1, 2, .* got rows of 2"),
        ({"a": ((1.0,),)}, "needs as many rows of a as of b, got 1 and 2"),
        (
            {"b": ((0.9,),)},
            r"formula for 1 known velocities is inconsistent: .* b=\[0\.9\] sums to 0\.9 and must sum to 1 \+",
        ),
        ({"a": ((0.9,),), "b": ((1.0,),)}, r"is inconsistent: a=\[0\.9\] sums to 0\.9 and must sum to 1, b="),
        ({"a": ((1.0,), (0.5, 0.5)), "b": (EULER, (1.0, 0.0))}, r"must sum to 1 \+ sum j a_j = 1\.5"),
        (
            {"a": ((1.0,), (3.0, -2.0)), "b": (EULER, (0.5, -1.5))},
            r"a=\[3\.0, -2\.0\] is not zero-stable: its errors grow",
        ),
        ({"a": ((1.0,), (2.0, -1.0)), "b": (EULER, (1.0, -1.0))}, r"a=\[2\.0, -1\.0\] is not zero-stable"),
    ],
    ids=["none", "start", "rows", "slope", "constant", "states", "outside", "double"],
)
def test_invalid_coefficients_are_rejected(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        LinearMultistep(**options)  # type: ignore[arg-type]
