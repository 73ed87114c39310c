"""Pools of hosts, in this process and as Ray actors: equal answers, retries after host losses, and batching."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorUnavailableError, RayTaskError

from orchestrator.cluster.connect import check_fits, connect
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import CodeError, PoolError, StoreError, UserError
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.runs import LearnedRun
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pool.client import NAMESPACE, RayPool
from orchestrator.pool.requests import LocalPool, PoolSettings, Request
from orchestrator.pool.router import Router
from orchestrator.storage import Storage
from solvers.distil.methods.adam import Adam
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid

UNANSWERABLE = Request.of(HostProtocol.pictures, theta=None, pairs="0123-4", indices=[0])


def test_a_user_error_is_one_outcome_among_the_others(pool: LocalPool, scoring: list[Request]) -> None:
    """One request that cannot be answered does not stop the others."""
    outcomes = list(pool.map([scoring[0], UNANSWERABLE, scoring[1]]))
    assert [outcome.index for outcome in outcomes] == [0, 1, 2]
    assert isinstance(outcomes[1].error, StoreError)
    assert outcomes[1].value is None
    assert all(outcome.error is None and "psnr" in outcome.value for outcome in (outcomes[0], outcomes[2]))


def test_gather_returns_all_answers_in_order_or_raises_the_first_error(pool: LocalPool, scoring: list[Request]) -> None:
    """``gather`` is for callers that need every answer."""
    answers = pool.gather(scoring)
    for request, answer in zip(scoring, answers, strict=True):
        np.testing.assert_array_equal(answer["psnr"], pool.call(request)["psnr"])
    with pytest.raises(StoreError, match="no complete pair store 0123"):
        pool.gather([scoring[0], UNANSWERABLE])


def test_call_returns_the_answer_or_raises_its_error(pool: LocalPool) -> None:
    """A single request needs no ``Outcome``."""
    assert pool.call(Request.of(HostProtocol.process_id)) == os.getpid()
    with pytest.raises(StoreError, match="no complete pair store 0123"):
        pool.call(UNANSWERABLE)


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """A function that sets the resources the cluster reports."""
    return lambda totals: monkeypatch.setattr(ray, "cluster_resources", lambda: totals)


@pytest.mark.parametrize(
    ("hosts", "cpus", "gpus", "trial", "message"),
    [
        (
            4,
            0.5,
            0,
            0.25,
            r"4 hosts of 0\.5 CPU and one trial of 0\.25 CPU need 2\.25 CPUs, but the cluster has 2; lower",
        ),
        (1, 1.5, 0, 1.0, r"lower resources\.hosts or resources\.host_cpus or resources\.trial_cpus"),
        (3, 0.5, 0.5, 0.25, r"3 hosts of 0\.5 GPU need 1\.5 GPUs, but the cluster has 1; lower resources\.hosts or"),
        (2, 0.5, 1, 0.25, r"or set resources\.device to cpu"),
    ],
)
def test_resources_that_exceed_the_cluster_are_refused(
    resources: Callable[[dict[str, float]], None], hosts: int, cpus: float, gpus: float, trial: float, message: str
) -> None:
    """A sweep must never wait for its own resources: the sum is checked, and the error names the keys to lower."""
    resources({"CPU": 2.0, "GPU": 1.0})
    with pytest.raises(PoolError, match=message):
        check_fits(hosts, cpus, gpus, trial)


def test_resources_that_just_fit_are_accepted(resources: Callable[[dict[str, float]], None]) -> None:
    """Fractions that add up to a whole core count as one, despite their binary rounding."""
    resources({"CPU": 1.0, "GPU": 1.0})
    check_fits(9, 0.1, 1 / 9, 0.1)
    resources({"CPU": 4.0})
    with pytest.raises(PoolError, match="but the cluster has 0"):
        check_fits(1, 1, 1, 1)


# ---- Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts(ray_pool: Callable[..., RayPool], made: Storage, host_settings: Callable[..., HostSettings]) -> RayPool:
    """Two host actors that share a simulated GPU, both up: before that, one of them would do all the work."""
    pool = ray_pool(host_settings(made), hosts=2)
    end = time.monotonic() + 60
    while len(set(pool.gather([Request.of(HostProtocol.process_id)] * 20))) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    return pool


def _deadly() -> Any:
    """An argument that kills any process that iterates over it or adds it; the router does neither."""

    class Deadly:
        def __iter__(self) -> Iterator[int]:
            os._exit(1)

        def __radd__(self, other: int) -> int:
            os._exit(1)

    return Deadly()


@pytest.mark.cluster
def test_host_actors_return_the_same_bits_as_the_host_in_this_process(
    hosts: RayPool, pool: LocalPool, scoring: list[Request], facts: ModelFacts
) -> None:
    """The same plain class runs with and without Ray."""
    assert hosts.call(Request.of(HostProtocol.facts)) == facts
    for remote, local in zip(hosts.gather(scoring), pool.gather(scoring), strict=True):
        np.testing.assert_array_equal(remote["psnr"], local["psnr"])


@pytest.mark.cluster
def test_two_hosts_share_one_gpu_and_both_answer(hosts: RayPool, scoring: list[Request]) -> None:
    """Two hosts of half a GPU each occupy all of it, and each runs in its own process."""
    before = hosts.statistics()
    answers = hosts.gather([Request.of(HostProtocol.process_id)] * 20)
    after = hosts.statistics()
    assert len(set(answers)) == 2
    assert os.getpid() not in answers
    end = time.monotonic() + 60  # Ray releases the resources of an earlier pool with a delay
    while ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0) != 1:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.2)
    assert sum(after["per_host"]) == after["answered"] == before["answered"] + 20


@pytest.mark.cluster
def test_attaching_by_name_reaches_the_running_pool(hosts: RayPool, host_settings: Any, made: Storage) -> None:
    """Trials in other processes attach to the driver's pool, and so does a restored sweep."""
    (name,) = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if made.root in actor["name"]]
    pids = {*hosts.gather([Request.of(HostProtocol.process_id)] * 20)}
    assert {*RayPool.attach(name, hosts=2).gather([Request.of(HostProtocol.process_id)] * 20)} == pids
    assert ray.get_runtime_context().namespace == NAMESPACE


@pytest.mark.cluster
def test_a_user_error_is_not_retried(hosts: RayPool, scoring: list[Request]) -> None:
    """It would be the same on every host, so it is returned as it was raised."""
    before = hosts.statistics()["retried"]
    outcomes = {outcome.index: outcome for outcome in hosts.map([scoring[0], UNANSWERABLE, scoring[1]])}
    assert isinstance(outcomes[1].error, StoreError)
    assert "make it with `bespoke pairs`" in str(outcomes[1].error)
    assert outcomes[0].error is None
    assert outcomes[2].error is None
    assert hosts.statistics()["retried"] == before


@pytest.mark.cluster
def test_requests_to_killed_hosts_are_retried_and_no_answer_is_lost(
    hosts: RayPool, pool: LocalPool, scoring: list[Request]
) -> None:
    """Every host gets SIGKILL while requests are in flight; the restarted hosts return the same answers."""
    pids = {*hosts.gather([Request.of(HostProtocol.process_id)] * 20)}
    before = hosts.statistics()
    remaining = hosts.map(scoring)
    outcomes = [next(remaining)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    outcomes += remaining
    assert [outcome.error for outcome in outcomes] == [None] * len(scoring)
    expected = pool.gather(scoring)
    for outcome in outcomes:
        np.testing.assert_array_equal(outcome.value["psnr"], expected[outcome.index]["psnr"])
    after = hosts.statistics()
    assert after["retried"] > before["retried"]
    assert after["set_aside"] == before["set_aside"]
    assert not {*hosts.gather([Request.of(HostProtocol.process_id)] * 20)} & pids


@pytest.mark.cluster
@pytest.mark.parametrize("count", [1, 2])
def test_only_the_request_that_kills_hosts_is_set_aside(
    ray_pool: Callable[..., RayPool],
    made: Storage,
    host_settings: Callable[..., HostSettings],
    scoring: list[Request],
    count: int,
) -> None:
    """It is given up after three losses; the request behind it is answered, even if there is only one host."""
    hosts = ray_pool(host_settings(made), hosts=count)
    poison = scoring[0]._replace(arguments=scoring[0].arguments | {"indices": _deadly()})
    requests = [scoring[0], poison, *scoring[1:5]]
    outcomes = {outcome.index: outcome for outcome in hosts.map(requests)}
    assert [index for index, outcome in outcomes.items() if outcome.error is not None] == [1]
    assert isinstance(outcomes[1].error, PoolError)
    assert re.match(r"score\(.*\) failed 3 times and is set aside; the last time: Actor", str(outcomes[1].error))
    assert hosts.statistics()["set_aside"] == 1
    ray.kill(hosts.router)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_hung_host_is_restarted_and_its_request_retried(
    ray_pool: Callable[..., RayPool],
    made: Storage,
    host_settings: Callable[..., HostSettings],
    scoring: list[Request],
    tmp_path: Path,
) -> None:
    """With resources.request_timeout, a process that does not answer is killed and its request goes on."""
    hosts = ray_pool(host_settings(made), hosts=1, request_timeout=30)
    pid = hosts.call(Request.of(HostProtocol.process_id))
    stuck = scoring[0]._replace(arguments=scoring[0].arguments | {"indices": _stuck_once(tmp_path / "met")})
    (outcome,) = hosts.map([stuck])
    assert outcome.error is None
    assert outcome.value["psnr"].shape == (1,)
    assert hosts.call(Request.of(HostProtocol.process_id)) != pid
    ray.kill(hosts.router)


def _stuck_once(marker: Path) -> Any:
    """An argument that makes a host hang, but only once: ``marker`` records that it has."""

    class Stuck:
        def __iter__(self) -> Iterator[int]:
            while not marker.exists():
                marker.touch()
                time.sleep(1000)
            return iter([0])

    return Stuck()


@pytest.mark.cluster
def test_a_deterministic_error_is_reported_without_retries(hosts: RayPool, scoring: list[Request]) -> None:
    """The error follows from the request alone, so it is reported at once, and the hosts stay up."""
    broken = Request.of(HostProtocol.sample, theta=np.zeros(5), pairs=scoring[0].arguments["pairs"], indices=[0])
    outcomes = {outcome.index: outcome for outcome in hosts.map([broken, scoring[0]])}
    assert outcomes[1].error is None
    assert isinstance(outcomes[0].error, CodeError)
    message = r"sample\(pairs=[\w-]+\) failed: .*ns\.py, line \d+, .*: InvalidThetaError: a theta cannot have 5 numbers"
    assert re.match(message, str(outcomes[0].error))


@pytest.mark.cluster
def test_connecting_again_keeps_the_running_ray(ray_session: None) -> None:
    """A notebook that runs two sweeps keeps its Ray session."""
    before = ray.get_runtime_context().gcs_address
    connect(None, cpus=1)
    assert ray.get_runtime_context().gcs_address == before
    assert ray.cluster_resources()["CPU"] == 2


def test_without_an_address_a_new_local_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever cluster runs on the machine, and whatever RAY_ADDRESS contains."""
    options: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **arguments: options.update(arguments))
    connect(None, cpus=2)
    assert (options["address"], options["num_cpus"], options["namespace"]) == ("local", 2, NAMESPACE)


def test_the_error_for_a_missing_cluster_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has to correct --address."""

    def nowhere(address: str, temp_dir: str | None) -> str:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("orchestrator.cluster.connect.get_ray_address_from_environment", nowhere)
    with pytest.raises(
        PoolError,
        match=r"no Ray cluster at 'auto': no Ray runs on this machine, .*; start one with .* or leave out --a",
    ):
        connect("auto", cpus=2)


def test_an_unreachable_address_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would retry for minutes. The error names the address and the remedy."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(PoolError, match=r"no Ray cluster at '127\.0\.0\.1:1': .*refused.*; start one with `ray up"):
        connect("127.0.0.1:1", cpus=1)


# ---- a lost router ------------------------------------------------------------------------------------------------


class _LostRouter(RayPool):
    """A pool whose router's node is lost: calls fail at once until Ray notices, then a new router answers."""

    def __init__(self, refusals: int):
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        super().__init__(
            SimpleNamespace(request=_Method(lambda method, arguments, key: (len(method), method))), 1, clock
        )
        self.now, self.refusals = 0.0, refusals

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _first_done(self, references: list[Any]) -> Any:
        return references[0]

    def _get(self, reference: tuple[int, str]) -> tuple[str, None]:
        if self.refusals:
            self.refusals -= 1
            raise ActorUnavailableError("Connection refused", None)
        return reference[1], None


def test_requests_to_a_lost_router_are_retried_until_it_is_back() -> None:
    """Ray notices missed heartbeats only after a minute; until then, every call fails at once."""
    pool = _LostRouter(refusals=40)
    requests = [Request(name, {}) for name in ("a", "b", "c")]
    assert sorted(outcome.value for outcome in pool.map(requests)) == ["a", "b", "c"]
    assert pool.now == 80


def test_a_router_that_stays_lost_is_an_error_after_minutes() -> None:
    pool = _LostRouter(refusals=10**6)
    with pytest.raises(PoolError, match=r"router was lost \d+ times in 18\d s; the last time: .*Connection refused"):
        list(pool.map([Request("a", {})]))


# ---- batched requests ---------------------------------------------------------------------------------------------


class _Method:
    """An actor method with Ray's interface: ``remote(**arguments)``."""

    def __init__(self, answer: Callable[..., Any]):
        self.remote = answer


class _FakeHost:
    """A fake host that answers once ``gate`` is set and logs the calls it gets."""

    def __init__(self, log: list[tuple[str, Any]], gate: asyncio.Event, poison: dict[Any, Exception]):
        self.log, self.gate, self.poison = log, gate, poison

    class process_id:  # noqa: N801 (stands for an actor method)
        """The call by which the router waits for a host; it returns at once."""

        @staticmethod
        def options(**options: Any) -> _Method:
            async def up() -> int:
                return 0

            return _Method(up)

    def __getattr__(self, method: str) -> _Method:
        async def answer(**arguments: Any) -> Any:
            requests = arguments.get("requests", [arguments])
            numbers = [call.get("number") for call in requests]
            self.log.append((method, numbers if "requests" in arguments else numbers[0]))
            await self.gate.wait()
            for number in numbers:
                if number in self.poison:
                    raise self.poison[number]
            answers = [f"{method} {number}" for number in numbers]
            return answers if "requests" in arguments else answers[0]

        return _Method(answer)


class _RouterHarness:
    """A router with fake hosts, which answer once :meth:`answers` is called."""

    def __init__(self, hosts: int, max_batch: int):
        self.log: list[tuple[str, Any]] = []
        self.gate = asyncio.Event()
        self.poison: dict[Any, Exception] = {}
        settings = HostSettings(adapter="none", options={}, storage="none")
        pool = PoolSettings(hosts=hosts, max_batch=max_batch)
        self.router = Router(Host, settings, pool, start_host=lambda: _FakeHost(self.log, self.gate, self.poison))

    def ask(self, method: str, number: int, key: str | None) -> asyncio.Task[tuple[Any, Exception | None]]:
        return asyncio.create_task(self.router.request(method, {"number": number}, key))

    async def settle(self) -> None:
        """Run the event loop until only answers of hosts are outstanding."""
        for _ in range(50):
            await asyncio.sleep(0)

    async def answers(self, tasks: Sequence[asyncio.Task[tuple[Any, Exception | None]]]) -> list[Any]:
        self.gate.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), 20)


def _run_scenario(scenario: Callable[[_RouterHarness], Any], hosts: int = 1, max_batch: int = 3) -> Any:
    """Run a scenario with a router of fake hosts."""

    async def run() -> Any:
        harness = _RouterHarness(hosts, max_batch)
        harness.router.open()
        await harness.settle()
        return await scenario(harness)

    return asyncio.run(run())


async def _request_in_turn(harness: _RouterHarness, keys: str) -> list[Any]:
    """Answers to one request per key, sent one after the other."""
    tasks = []
    for number, key in enumerate(keys):
        tasks.append(harness.ask("advance", number, key))
        await harness.settle()
    return await harness.answers(tasks)


def test_queued_requests_with_equal_keys_run_as_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes the idle host. While it runs, the others accumulate and run in order, at most max_batch each."""

    async def scenario(harness: _RouterHarness) -> None:
        answers = await _request_in_turn(harness, "aaaaaa")
        assert harness.log == [("advance", 0), ("advance_batched", [1, 2, 3]), ("advance_batched", [4, 5])]
        assert answers[:2] == [("advance 0", None), ("advance_batched 1", None)]
        assert [value.split()[1] for value, _ in answers] == list("012345")
        statistics = await harness.router.stats()
        assert (statistics["answered"], statistics["batches"], statistics["batched_requests"]) == (3, 2, 5)

    _run_scenario(scenario)


def test_requests_with_different_keys_run_as_different_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router only compares keys for equality."""

    async def scenario(harness: _RouterHarness) -> None:
        await _request_in_turn(harness, "aababb")
        assert harness.log == [("advance", 0), ("advance_batched", [1, 3]), ("advance_batched", [2, 4, 5])]

    _run_scenario(scenario)


@pytest.mark.parametrize(("method", "key", "max_batch"), [("advance", "a", 1), ("score", "a", 3), ("advance", None, 3)])
def test_requests_that_cannot_be_batched_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch, method: str, key: str | None, max_batch: int
) -> None:
    """With max_batch 1, for a method without a batched form, or without a key: two at a host at once, one per slot."""

    async def scenario(harness: _RouterHarness) -> None:
        tasks = [harness.ask(method, number, key) for number in range(4)]
        await harness.settle()
        assert harness.log == [(method, 0), (method, 1)]
        await harness.answers(tasks)
        assert harness.log == [(method, number) for number in range(4)]

    _run_scenario(scenario, max_batch=max_batch)


@pytest.mark.parametrize(
    "error",
    [
        ActorUnavailableError("the host died", None),
        RayTaskError("advance_batched", "", ValueError("a bad theta")),
        RayTaskError("advance_batched", "", StoreError("no such pairs")),
        RayTaskError("advance_batched", "", RuntimeError("out of luck")),
    ],
    ids=["lost host", "hopeless", "user error", "failure"],
)
def test_only_the_request_that_fails_its_batch_is_set_aside(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The error cannot be traced to one request of the batch, so each is retried alone and the others are answered."""

    async def scenario(harness: _RouterHarness) -> None:
        harness.poison[2] = error
        answers = await _request_in_turn(harness, "aaaa")
        assert [value for value, _ in answers] == ["advance 0", "advance 1", None, "advance 3"]
        assert isinstance(answers[2][1], UserError)
        assert harness.log[1] == ("advance_batched", [1, 2, 3])
        assert {call for call in harness.log[2:] if call[0] != "process_id"} == {("advance", i) for i in (1, 2, 3)}

    _run_scenario(scenario)


def test_an_unexpected_error_reaches_every_request_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails in the router, no caller may wait forever."""

    async def scenario(harness: _RouterHarness) -> None:
        harness.poison[2] = KeyError("unforeseen")
        tasks = [harness.ask("advance", number, "a") for number in range(4)]
        await harness.settle()
        harness.gate.set()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert [type(answer) for answer in answers[1:]] == [KeyError] * 3

    _run_scenario(scenario)


def test_a_short_request_does_not_wait_behind_a_batchable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request with a key takes both slots of its host; the next ones go to the other host or wait for a free slot."""

    async def scenario(harness: _RouterHarness) -> None:
        tasks = [harness.ask("advance", 0, "a"), *(harness.ask("score", number, None) for number in range(1, 4))]
        await harness.settle()
        assert harness.log == [("advance", 0), ("score", 1), ("score", 2)]
        await harness.answers(tasks)

    _run_scenario(scenario, hosts=2)


def test_a_stream_of_other_requests_does_not_starve_a_batchable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is never idle, so after PATIENCE other requests the batchable one takes any free slot."""
    monkeypatch.setattr("orchestrator.pool.queue.PATIENCE", 5)

    async def scenario(harness: _RouterHarness) -> None:
        stream = [harness.ask("score", number, None) for number in range(2)]
        await harness.settle()
        waiting = harness.ask("advance", 99, "a")
        await harness.settle()
        stream += [harness.ask("score", number, None) for number in range(2, 20)]
        await harness.answers([*stream, waiting])
        assert harness.log.index(("advance", 99)) < len(harness.log) - 1

    _run_scenario(scenario)


def _advance_request(arguments: dict[str, Any]) -> Request[Any]:
    return Request.of(HostProtocol.advance, **arguments).with_batch_key("a key")


@pytest.mark.cluster
def test_runs_batched_on_actors_learn_the_same_and_a_deadly_one_fails_alone(
    ray_session: None, made: Storage, host_settings: Callable[..., HostSettings], facts: ModelFacts, specs: Any
) -> None:
    """On Ray, one of the runs kills its host; the others end where they end when advanced alone."""
    train_digest = specs[PairKey("train", 1.0, 0)].name
    settings = Adam(learning_rate=5e-3, iterations=20, batch_size=16, training_pairs=48)
    run = LearnedRun(family="bns", options={}, sigma0=1.0, train=train_digest, method=settings)
    state = run.method.begin(run.build().start(GridSolver(Midpoint(), 4, Grid()), facts.scheduler))
    arguments = [{"run": run, "state": state, "steps": 3} for _ in range(6)]
    expected = LocalPool(Host(host_settings(made))).call(Request.of(HostProtocol.advance, **arguments[0])).parameters
    pool = RayPool.start(
        f"merging-{os.getpid()}", Host, host_settings(made), PoolSettings(hosts=1, cpus=0.5, max_batch=4)
    )
    try:
        pool.window = len(arguments)
        # The first takes the host that is still starting. Whatever the order of the others, four of them form a batch.
        for state in pool.gather([_advance_request(each) for each in arguments]):
            np.testing.assert_allclose(state.parameters, expected, rtol=1e-4, atol=1e-5)
        assert pool.statistics()["batches"] >= 1
        # Any of the others may be batched with the deadly one: the answers must not depend on it.
        arguments[5]["steps"] = _deadly()
        outcomes = {outcome.index: outcome for outcome in pool.map([_advance_request(each) for each in arguments])}
        assert [i for i, outcome in outcomes.items() if outcome.error is not None] == [5]
        for i in range(5):
            np.testing.assert_allclose(outcomes[i].value.parameters, expected, rtol=1e-4, atol=1e-5)
    finally:
        ray.kill(pool.router)
