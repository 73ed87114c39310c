"""Generators that ask for evaluations, and the loop that answers them.

A distillation method is a generator: it yields what it needs evaluated, receives the value, and returns the new state.
It needs no access to the model. The same generator therefore runs alone (:func:`drive`) and in lockstep with others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Query = TypeVar("Query")
Answer = TypeVar("Answer")
OtherQuery = TypeVar("OtherQuery")
OtherAnswer = TypeVar("OtherAnswer")
Result = TypeVar("Result")


def drive(generator: Generator[Query, Answer, Result], answer: Callable[[Query], Answer]) -> Result:
    """Run a generator to its end, answering each query by ``answer``; returns the generator's result."""
    try:
        query = next(generator)
        while True:
            query = generator.send(answer(query))
    except StopIteration as stop:
        result: Result = stop.value
        return result


def map_queries(
    generator: Generator[Query, Answer, Result],
    to_query: Callable[[Query], OtherQuery],
    to_answer: Callable[[Query, OtherAnswer], Answer],
) -> Generator[OtherQuery, OtherAnswer, Result]:
    """The same generator with other types of queries and answers, converted by these functions."""
    try:
        query = next(generator)
        while True:
            other = yield to_query(query)
            query = generator.send(to_answer(query, other))
    except StopIteration as stop:
        result: Result = stop.value
        return result
