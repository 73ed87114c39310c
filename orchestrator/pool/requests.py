"""Requests to hosts, their outcomes, and the two kinds of pool that answer them. Needs no Ray.

A request names a method of a host class and holds its keyword arguments. It is built from the method itself, so that a
type checker sees the arguments and the value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from orchestrator.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
"""Types of what a request returns."""


class Request(NamedTuple, Generic[R]):
    """A host method and its arguments; :meth:`of` builds one.

    Attributes:
        method: Name of the method.
        arguments: Its keyword arguments.
        batch_key: Requests to one method with equal keys may be answered in one batched call, if the host class has a
            batched form of the method (``Host.BATCHED``) and the pool allows it. None: always answered alone.
    """

    method: str
    arguments: dict[str, Any]
    batch_key: str | None = None

    @staticmethod
    def of(method: Callable[Concatenate[Any, P], T], *arguments: P.args, **named: P.kwargs) -> Request[T]:
        """Build a request from a method of a host's protocol: ``Request.of(HostProtocol.score, theta=theta, ...)``.

        Args:
            method: The method, taken from a class.
            arguments: Must be empty: arguments are sent by name.
            named: The keyword arguments.
        """
        assert not arguments, "arguments of a request are sent by name"
        return Request(method.__name__, dict(named))

    def with_batch_key(self, batch_key: str | None) -> Request[R]:
        """The same request with this batch key."""
        return self._replace(batch_key=batch_key)


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """The result of one request.

    Attributes:
        index: Position of the request among those passed to :meth:`Pool.map`.
        value: What the host returned; None if the request failed.
        error: Why the request failed for good; None if it did not.
    """

    index: int
    value: R
    error: Exception | None


class Ask(Protocol):
    """A callback that answers requests; the values are in their order. :meth:`Pool.gather` is one."""

    def __call__(self, requests: Sequence[Request[R]], /) -> list[R]: ...


class Pool(ABC):
    """Hosts that answer requests."""

    @abstractmethod
    def map(self, requests: Iterable[Request[R]]) -> Iterator[Outcome[R]]:
        """Outcomes of these requests in order of completion. Requests are consumed lazily, as hosts have room."""

    def call(self, request: Request[R]) -> R:
        """Answer one request.

        Raises:
            UserError: No host can answer it.
        """
        (value,) = self.gather([request])
        return value

    def gather(self, requests: Sequence[Request[R]], /) -> list[R]:
        """Answer several requests; the values are in the order of the requests.

        Raises:
            UserError: One of them cannot be answered.
        """
        values: dict[int, R] = {}
        for outcome in self.map(requests):
            if outcome.error is not None:
                raise outcome.error
            values[outcome.index] = outcome.value
        return [values[index] for index in range(len(requests))]


class LocalPool(Pool):
    """One host in this process, without Ray: for notebooks and tests. Never batches requests.

    Args:
        host: The host (or scorer) itself.
    """

    def __init__(self, host: Any):
        self.host = host

    def map(self, requests: Iterable[Request[R]]) -> Iterator[Outcome[R]]:
        for index, request in enumerate(requests):
            try:
                yield Outcome(index, getattr(self.host, request.method)(**request.arguments), None)
            except UserError as error:
                yield Outcome(index, cast(R, None), error)


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
