"""Distillation methods are generators: driven alone or map_queries, they take the same steps."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from solvers.distil.drive import drive, map_queries


def _sum_of_squares(count: int) -> Generator[int, int, int]:
    """Asks for the square of each number below ``count`` and returns their sum."""
    total = 0
    for number in range(count):
        total += yield number
    return total


def test_a_driven_generator_receives_the_answer_to_each_query() -> None:
    assert drive(_sum_of_squares(4), lambda number: number**2) == 0 + 1 + 4 + 9


def test_a_generator_without_queries_returns_at_once() -> None:
    assert drive(_sum_of_squares(0), lambda number: pytest.fail("nothing was asked")) == 0


def test_a_translated_generator_gives_the_same_result() -> None:
    """Queries are map_queries on the way out, answers on the way back, with the query at hand."""
    spoken = map_queries(_sum_of_squares(4), str, lambda number, text: int(text) * number)
    assert drive(spoken, lambda text: text) == 0 + 1 + 4 + 9


def test_an_error_of_an_answer_ends_the_generator() -> None:
    def refuse(number: int) -> int:
        raise ArithmeticError("no answer")

    with pytest.raises(ArithmeticError, match="no answer"):
        drive(_sum_of_squares(3), refuse)
