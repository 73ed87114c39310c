"""Requests to hosts, their outcomes, and the two kinds of pool that answer them. Needs no Ray.

A request is a method name of a host class and its keyword arguments. A pool knows nothing of what is requested.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from orchestrator.errors import UserError


class Request(NamedTuple):
    """A host method and its arguments.

    Attributes:
        method: Name of the method.
        arguments: Its keyword arguments.
        batch_key: Requests to one method with equal keys may be answered in one batched call, if the host class has a
            batched form of the method (``Host.BATCHED``) and the pool allows it. None: always answered alone.
    """

    method: str
    arguments: dict[str, Any]
    batch_key: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of one request.

    Attributes:
        index: Position of the request among those passed to :meth:`Pool.map`.
        value: What the host returned; None if the request failed.
        error: Why the request failed for good; None if it did not.
    """

    index: int
    value: Any
    error: Exception | None


class Pool(ABC):
    """Hosts that answer requests."""

    @abstractmethod
    def map(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """Outcomes of these requests in order of completion. Requests are consumed lazily, as hosts have room."""

    def call(self, method: str, **arguments: Any) -> Any:
        """Answer one request.

        Raises:
            UserError: No host can answer it.
        """
        (outcome,) = self.map([Request(method, arguments)])
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def gather(self, requests: Sequence[Request]) -> list[Any]:
        """Answer several requests; the values are in the order of the requests.

        Raises:
            UserError: One of them cannot be answered.
        """
        values: list[Any] = [None] * len(requests)
        for outcome in self.map(requests):
            if outcome.error is not None:
                raise outcome.error
            values[outcome.index] = outcome.value
        return values


class LocalPool(Pool):
    """One host in this process, without Ray: for notebooks and tests. Never batches requests.

    Args:
        host: The host (or scorer) itself.
    """

    def __init__(self, host: Any):
        self.host = host

    def map(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        for index, request in enumerate(requests):
            try:
                yield Outcome(index, getattr(self.host, request.method)(**request.arguments), None)
            except UserError as error:
                yield Outcome(index, None, error)


class ActorSettings(Protocol):
    """What the pool needs to know of the settings from which a host is built."""

    @property
    def threads(self) -> int:
        """Torch threads of the process."""


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """How many hosts a pool starts, and which share of the cluster each takes.

    Attributes:
        hosts: Number of host actors.
        cpus, gpus: Resources of each host; fractions share a device.
        request_timeout: Seconds after which a silent host is considered hung and is restarted; None: never.
        max_batch: Largest number of requests with equal batch keys that run as one call. With 1 nothing is batched,
            and every answer is bit-identical to that of its request alone.
    """

    hosts: int = 1
    cpus: float = 0.5
    gpus: float = 0.0
    request_timeout: float | None = None
    max_batch: int = 1
