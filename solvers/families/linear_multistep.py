"""Explicit linear multistep methods with constant coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.families.base import Family, as_dtype
from solvers.field import VelocityField
from solvers.schedulers._monotone import limited_slopes

TOLERANCE = 1e-8
"""Tolerance for coefficients that were rounded to decimals."""


class Formula(NamedTuple):
    """x_{i+1} = sum_j a_j x_{i-j} + h sum_j b_j u_{i-j}, newest first: one row of the method."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def order(self) -> int:
        """Largest p such that polynomials of degree p are integrated exactly; -1 if constants are not."""
        degree = 0
        while abs(self._defect(degree)) <= TOLERANCE and degree <= 2 * len(self.a):
            degree += 1
        return degree - 1

    def _defect(self, degree: int) -> float:
        """The formula's value of x = r^degree at r = 1 minus the exact value 1, with the newest point at r = 0."""
        states = sum(a * (-j) ** degree for j, a in enumerate(self.a))
        slopes = sum(b * degree * (-j) ** (degree - 1) for j, b in enumerate(self.b)) if degree else 0.0
        return states + slopes - 1

    def is_zero_stable(self) -> bool:
        """Whether the roots of z^k - sum_j a_j z^(k-1-j) lie inside the unit circle or are simple roots on it.

        This is Dahlquist's root condition.
        """
        companion = torch.diag(torch.ones(len(self.a) - 1, dtype=torch.float64), -1)
        companion[0] = torch.tensor(self.a, dtype=torch.float64)
        roots = torch.linalg.eigvals(companion)
        # A double root is accurate only to the square root of rounding, so detect it by its distance to the others.
        on_circle = roots[(roots.abs() - 1).abs() < 1e-6]
        distances = (on_circle[:, None] - on_circle[None]).abs() + 2 * torch.eye(len(on_circle))
        return bool((roots.abs() < 1 + 1e-6).all()) and not bool((distances < 1e-6).any())


@dataclass(frozen=True)
class LinearMultistep(Family):
    """x_{i+1} = sum_j a_j x_{i-j} + h sum_j b_j t'(r_{i-j}) u_{i-j}: constant coefficients in r_i = i/n.

    On a non-uniform grid t(r) the method steps in r, h = 1/n, instead of t, by the chain rule dx/dr = t'(r) u. t'(r) is
    the slope of the grid, from differences limited so that it stays positive. The order is kept on grids that are
    smooth functions of r; ``adams_bashforth`` computes its coefficients for each grid instead.

    The k-th rows of ``a`` and ``b`` have k entries, newest first, and are used when k velocities are known. The last
    rows are the method, the others its start-up.

    Attributes:
        a: Weights of past states; by default only the last state.
        b: Weights of past velocities; by default Adams-Bashforth 2, started by Euler.

    Raises:
        ValueError: Rows have the wrong lengths, a row does not integrate constants and straight lines exactly
            (sum a_j = 1 and sum b_j = 1 + sum j a_j), or the method is not zero-stable.
    """

    a: tuple[tuple[float, ...], ...] = ()
    b: tuple[tuple[float, ...], ...] = ((1.0,), (1.5, -0.5))
    source = "Hairer, Norsett & Wanner 1993, section III.2-3"

    def __post_init__(self) -> None:
        b = _rows("b", self.b)
        a = _rows("a", self.a) if self.a else tuple((1.0, *(0.0 for _ in row[1:])) for row in b)
        if len(a) != len(b):
            raise ValueError(f"linear_multistep needs as many rows of a as of b, got {len(a)} and {len(b)}")
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", b)
        for known, formula in enumerate(self._formulas, start=1):
            if formula.order < 1:
                slopes = 1 + sum(j * weight for j, weight in enumerate(formula.a))
                raise ValueError(
                    f"linear_multistep's formula for {known} known velocities is inconsistent: a={list(formula.a)} "
                    f"sums to {sum(formula.a):g} and must sum to 1, b={list(formula.b)} sums to {sum(formula.b):g} "
                    f"and must sum to 1 + sum j a_j = {slopes:g}"
                )
        if not self._formulas[-1].is_zero_stable():
            raise ValueError(
                f"linear_multistep with a={list(a[-1])} is not zero-stable: its errors grow without bound as steps "
                f"shrink; choose weights whose polynomial z^k - sum a_j z^(k-1-j) has no root outside the unit circle "
                f"and no double root on it"
            )

    @property
    def label(self) -> str:
        def text(weights: tuple[float, ...]) -> str:
            return ",".join(f"{weight:g}" for weight in weights)

        method = self._formulas[-1]
        states = f" a={text(method.a)}" if any(method.a[1:]) else ""
        return f"LMM{states} b={text(method.b)}"

    @property
    def order(self) -> int:
        # A start-up step of order p has an error of h^(p+1), once; the slope of the grid has second-order accuracy.
        *startup, method = (formula.order for formula in self._formulas)
        return min(2, method, *(order + 1 for order in startup))

    @property
    def _formulas(self) -> tuple[Formula, ...]:
        return tuple(Formula(a, b) for a, b in zip(self.a, self.b, strict=True))

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        # h t'(r), the local step length at each grid point.
        lengths = limited_slopes(times)
        states, velocities = [x], []
        for i, t in enumerate(times[:-1]):
            velocities.append(velocity(states[-1], t))
            formula = self._formulas[min(len(self.b), i + 1) - 1]
            terms = [a * state for a, state in zip(formula.a, reversed(states), strict=False) if a]
            terms += [
                as_dtype(b * length, x) * past
                for b, length, past in zip(formula.b, lengths[: i + 1].flip(0), reversed(velocities), strict=False)
                if b
            ]
            states.append(sum(terms[1:], start=terms[0]))
        return states[-1]


def _rows(name: str, rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    weights = tuple(tuple(float(weight) for weight in row) for row in rows)
    if [len(row) for row in weights] != list(range(1, len(weights) + 1)) or not weights:
        raise ValueError(
            f"linear_multistep's {name} needs rows of 1, 2, ... weights, the k-th for k known velocities, "
            f"got rows of {', '.join(str(len(row)) for row in weights) or 'none'}"
        )
    return weights


FAMILY = LinearMultistep
