"""The pool asks hosts, in this process or as actors: the answers are the same, and a host may die at any moment."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorUnavailableError, RayTaskError

from orchestrator.cluster.connect import check_fits, connect
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import PoolError, StoreError, UserError
from orchestrator.hosts.distillation import LearnedRun
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pool.client import NAMESPACE, RayPool
from orchestrator.pool.requests import LocalPool, PoolSettings, Request
from orchestrator.pool.router import Router
from orchestrator.storage import Storage
from solvers.distil.adam import AdamSettings
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid

UNANSWERABLE = Request("pictures", {"theta": None, "pairs": "0123", "indices": [0]})


def test_an_error_that_a_user_can_mend_is_an_outcome_beside_the_others(pool: LocalPool, scoring: list[Request]) -> None:
    """One request that cannot be answered does not keep the others from their answers."""
    outcomes = list(pool.map([scoring[0], UNANSWERABLE, scoring[1]]))
    assert [outcome.index for outcome in outcomes] == [0, 1, 2]
    assert isinstance(outcomes[1].error, StoreError)
    assert outcomes[1].value is None
    assert all(outcome.error is None and "psnr" in outcome.value for outcome in (outcomes[0], outcomes[2]))


def test_gather_gives_all_answers_in_order_or_the_first_error(pool: LocalPool, scoring: list[Request]) -> None:
    """For those who can do nothing with a part of the answers."""
    answers = pool.gather(scoring)
    for request, answer in zip(scoring, answers, strict=True):
        np.testing.assert_array_equal(answer["psnr"], pool.call(request.method, **request.arguments)["psnr"])
    with pytest.raises(StoreError, match="no complete pair store 0123"):
        pool.gather([scoring[0], UNANSWERABLE])


def test_call_raises_the_error_itself(pool: LocalPool) -> None:
    """A single question has an answer or an error."""
    assert pool.call("process_id") == os.getpid()
    with pytest.raises(StoreError, match="no complete pair store 0123"):
        pool.call(UNANSWERABLE.method, **UNANSWERABLE.arguments)


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """Sets what the cluster says it has."""
    return lambda there: monkeypatch.setattr(ray, "cluster_resources", lambda: there)


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
def test_resources_that_cannot_fit_are_refused(
    resources: Callable[[dict[str, float]], None], hosts: int, cpus: float, gpus: float, trial: float, message: str
) -> None:
    """A sweep never waits for itself: the sum is checked, and the keys to lower are named."""
    resources({"CPU": 2.0, "GPU": 1.0})
    with pytest.raises(PoolError, match=message):
        check_fits(hosts, cpus, gpus, trial)


def test_resources_that_just_fit_are_taken(resources: Callable[[dict[str, float]], None]) -> None:
    """Fractions that add up to a whole core are a whole core, whatever their binary rounding."""
    resources({"CPU": 1.0, "GPU": 1.0})
    check_fits(9, 0.1, 1 / 9, 0.1)
    resources({"CPU": 4.0})
    with pytest.raises(PoolError, match="but the cluster has 0"):
        check_fits(1, 1, 1, 1)


# ---- Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts(ray_pool: Callable[..., RayPool], made: Storage, host_settings: Callable[..., HostSettings]) -> RayPool:
    """Two host actors that share a GPU that is not there, both up: until then one of them does all the work."""
    pool = ray_pool(host_settings(made), hosts=2)
    end = time.monotonic() + 60
    while len(set(pool.gather([Request("process_id", {})] * 20))) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    return pool


def _deadly() -> Any:
    """An argument that takes the process with it which looks at it; the router does not."""

    class Deadly:
        def __len__(self) -> int:
            os._exit(1)

        def __radd__(self, other: int) -> int:
            os._exit(1)

    return Deadly()


@pytest.mark.cluster
def test_host_actors_answer_as_the_host_in_this_process_bit_for_bit(
    hosts: RayPool, pool: LocalPool, scoring: list[Request], facts: ModelFacts
) -> None:
    """The same plain class: what runs without Ray is what runs on the cluster."""
    assert hosts.call("facts") == facts
    for there, here in zip(hosts.gather(scoring), pool.gather(scoring), strict=True):
        np.testing.assert_array_equal(there["psnr"], here["psnr"])


@pytest.mark.cluster
def test_hosts_are_scheduled_on_fractions_of_a_gpu_and_both_work(hosts: RayPool, scoring: list[Request]) -> None:
    """Two hosts of half a GPU fill it, each in a process of its own with its own limit of threads."""
    before = hosts.statistics()
    answers = hosts.gather([Request("process_id", {})] * 20)
    after = hosts.statistics()
    assert len(set(answers)) == 2
    assert os.getpid() not in answers
    end = time.monotonic() + 60  # what an earlier pool held is given back in its own time
    while ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0) != 1:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.2)
    assert sum(after["per_host"]) == after["answered"] == before["answered"] + 20


@pytest.mark.cluster
def test_a_pool_is_found_by_its_name_and_not_started_twice(hosts: RayPool, host_settings: Any, made: Storage) -> None:
    """Trials in other processes attach to the driver's pool; so does a restored sweep."""
    (name,) = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if made.root in actor["name"]]
    pids = {*hosts.gather([Request("process_id", {})] * 20)}
    assert {*RayPool.attach(name, hosts=2).gather([Request("process_id", {})] * 20)} == pids
    assert ray.get_runtime_context().namespace == NAMESPACE


@pytest.mark.cluster
def test_an_error_that_a_user_can_mend_is_not_tried_again(hosts: RayPool, scoring: list[Request]) -> None:
    """It would be the same on every host; it comes back as the error it is."""
    before = hosts.statistics()["retried"]
    outcomes = {outcome.index: outcome for outcome in hosts.map([scoring[0], UNANSWERABLE, scoring[1]])}
    assert isinstance(outcomes[1].error, StoreError)
    assert "make it with `bespoke pairs`" in str(outcomes[1].error)
    assert outcomes[0].error is None
    assert outcomes[2].error is None
    assert hosts.statistics()["retried"] == before


@pytest.mark.cluster
def test_hosts_that_die_are_asked_again_and_no_answer_is_lost(
    hosts: RayPool, pool: LocalPool, scoring: list[Request]
) -> None:
    """SIGKILL for every host while requests are in flight: they come back and answer all, as if nothing had been."""
    pids = {*hosts.gather([Request("process_id", {})] * 20)}
    before = hosts.statistics()
    outcomes = hosts.map(scoring)
    found = [next(outcomes)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    found += outcomes
    assert [outcome.error for outcome in found] == [None] * len(scoring)
    here = pool.gather(scoring)
    for outcome in found:
        np.testing.assert_array_equal(outcome.value["psnr"], here[outcome.index]["psnr"])
    after = hosts.statistics()
    assert after["retried"] > before["retried"]
    assert after["set_aside"] == before["set_aside"]
    assert not {*hosts.gather([Request("process_id", {})] * 20)} & pids


@pytest.mark.cluster
@pytest.mark.parametrize("count", [1, 2])
def test_a_request_that_kills_hosts_is_set_aside_alone(
    ray_pool: Callable[..., RayPool],
    made: Storage,
    host_settings: Callable[..., HostSettings],
    scoring: list[Request],
    count: int,
) -> None:
    """After three deaths it is given up by name; the one that waited behind it is answered, even by a single host."""
    hosts = ray_pool(host_settings(made), hosts=count)
    poison = Request("sample", {"theta": np.zeros(4), "pairs": "0123", "indices": _deadly()})
    requests = [scoring[0], poison, *scoring[1:5]]
    outcomes = {outcome.index: outcome for outcome in hosts.map(requests)}
    assert [index for index, outcome in outcomes.items() if outcome.error is not None] == [1]
    assert isinstance(outcomes[1].error, PoolError)
    assert str(outcomes[1].error).startswith("sample(pairs=0123) failed 3 times and is set aside; the last time: Actor")
    assert hosts.statistics()["set_aside"] == 1
    ray.kill(hosts.router)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_host_that_hangs_is_started_again_and_asked_again(
    ray_pool: Callable[..., RayPool], made: Storage, host_settings: Callable[..., HostSettings], tmp_path: Path
) -> None:
    """With resources.request_timeout: a process that gives no answer ends, and its request does not."""
    hosts = ray_pool(host_settings(made), hosts=1, request_timeout=30)
    pid = hosts.call("process_id")
    stuck = Request("sample", {"theta": np.zeros(4), "pairs": "0123", "indices": _stuck_once(tmp_path / "met")})
    (outcome,) = hosts.map([stuck])
    assert isinstance(outcome.error, StoreError), "it was answered the second time: those pairs are not there"
    assert hosts.call("process_id") != pid
    ray.kill(hosts.router)


def _stuck_once(marker: Path) -> Any:
    """An argument in which the first host that looks at it stays for ever."""

    class Stuck:
        def __len__(self) -> int:
            while not marker.exists():
                marker.touch()
                time.sleep(1000)
            return 1

        def __getitem__(self, chosen: slice) -> list[int]:
            return [0]

    return Stuck()


@pytest.mark.cluster
def test_a_request_that_cannot_be_answered_is_told_at_once(hosts: RayPool, scoring: list[Request]) -> None:
    """A mistake in the request follows from it alone: told as it is and not tried again, and the hosts live on."""
    broken = Request("sample", {"theta": np.zeros(5), "pairs": scoring[0].arguments["pairs"], "indices": [0]})
    outcomes = {outcome.index: outcome for outcome in hosts.map([broken, scoring[0]])}
    assert outcomes[1].error is None
    assert isinstance(outcomes[0].error, PoolError)
    assert re.search(r"sample\(pairs=\w+\) failed: InvalidThetaError: 5 numbers are no theta", str(outcomes[0].error))


@pytest.mark.cluster
def test_connecting_twice_is_connecting_once(ray_session: None) -> None:
    """A notebook that runs two sweeps keeps its Ray."""
    before = ray.get_runtime_context().gcs_address
    connect(None, cpus=1)
    assert ray.get_runtime_context().gcs_address == before
    assert ray.cluster_resources()["CPU"] == 2


def test_a_local_ray_never_joins_the_cluster_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --address a Ray of one's own is started, whatever runs on the machine or stands in RAY_ADDRESS."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **arguments: asked.update(arguments))
    connect(None, cpus=2)
    assert (asked["address"], asked["num_cpus"], asked["namespace"]) == ("local", 2, NAMESPACE)


def test_a_cluster_that_is_not_there_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong --address is the user's to mend."""

    def nowhere(**arguments: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nowhere)
    with pytest.raises(
        PoolError, match=r"no Ray cluster at 'auto': Could not find .*; start one with .* or leave out --a"
    ):
        connect("auto", cpus=2)


def test_a_cluster_that_is_not_there_is_said_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray alone would try for minutes; the address and the remedy are named."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(PoolError, match=r"no Ray cluster at '127\.0\.0\.1:1': .*refused.*; start one with `ray up"):
        connect("127.0.0.1:1", cpus=1)


# ---- a router that is away ----------------------------------------------------------------------------------------


class _LostRouter(RayPool):
    """A pool whose router's node is lost: calls are refused at once until Ray notices, then a new router answers."""

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
    """Ray notices missed heartbeats only after a minute, in which every call is refused at once."""
    pool = _LostRouter(refusals=40)
    requests = [Request(name, {}) for name in ("a", "b", "c")]
    assert sorted(outcome.value for outcome in pool.map(requests)) == ["a", "b", "c"]
    assert pool.now == 80


def test_a_router_that_does_not_come_back_is_an_error_after_minutes() -> None:
    pool = _LostRouter(refusals=10**6)
    with pytest.raises(PoolError, match=r"router was lost \d+ times in 18\d s; the last time: .*Connection refused"):
        list(pool.map([Request("a", {})]))


# ---- requests that are answered together --------------------------------------------------------------------------


class _Method:
    """A host's method as Ray offers it: ``remote(**arguments)``."""

    def __init__(self, answer: Callable[..., Any]):
        self.remote = answer


class _Actor:
    """A host that answers when it is told to, and remembers what it was asked."""

    def __init__(self, log: list[tuple[str, Any]], gate: asyncio.Event, poison: dict[Any, Exception]):
        self.log, self.gate, self.poison = log, gate, poison

    class process_id:  # noqa: N801 (a method, as Ray offers it)
        """It is up."""

        @staticmethod
        def options(**options: Any) -> _Method:
            async def up() -> int:
                return 0

            return _Method(up)

    def __getattr__(self, method: str) -> _Method:
        async def answer(**arguments: Any) -> Any:
            calls = arguments.get("requests", [arguments])
            numbers = [call.get("number") for call in calls]
            self.log.append((method, numbers if "requests" in arguments else numbers[0]))
            await self.gate.wait()
            for number in numbers:
                if number in self.poison:
                    raise self.poison[number]
            answers = [f"{method} {number}" for number in numbers]
            return answers if "requests" in arguments else answers[0]

        return _Method(answer)


class _Hosts:
    """A router of hosts that are none, whose work begins with :meth:`open`."""

    def __init__(self, hosts: int, max_batch: int):
        self.log: list[tuple[str, Any]] = []
        self.gate = asyncio.Event()
        self.poison: dict[Any, Exception] = {}
        settings = HostSettings(adapter="none", options={}, storage="none")
        pool = PoolSettings(hosts=hosts, max_batch=max_batch)
        self.router = Router(Host, settings, pool, start_host=lambda: _Actor(self.log, self.gate, self.poison))

    def ask(self, method: str, number: int, key: str | None) -> asyncio.Task[tuple[Any, Exception | None]]:
        return asyncio.create_task(self.router.request(method, {"number": number}, key))

    async def settle(self) -> None:
        """Let everything happen that can without an answer."""
        for _ in range(50):
            await asyncio.sleep(0)

    async def answers(self, tasks: Sequence[asyncio.Task[tuple[Any, Exception | None]]]) -> list[Any]:
        self.gate.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), 20)


def _routed(scenario: Callable[[_Hosts], Any], hosts: int = 1, max_batch: int = 3) -> Any:
    """Run a scenario with a router of such hosts."""

    async def run() -> Any:
        there = _Hosts(hosts, max_batch)
        there.router.open()
        await there.settle()
        return await scenario(there)

    return asyncio.run(run())


async def _six(there: _Hosts, keys: str) -> list[Any]:
    """Six requests that come one after the other, each with its key."""
    tasks = []
    for number, key in enumerate(keys):
        tasks.append(there.ask("advance", number, key))
        await there.settle()
    return await there.answers(tasks)


def test_requests_that_wait_with_equal_keys_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes the idle host; while it works, those of one key gather, up to the limit, in order."""

    async def scenario(there: _Hosts) -> None:
        answers = await _six(there, "aaaaaa")
        assert there.log == [("advance", 0), ("advance_batched", [1, 2, 3]), ("advance_batched", [4, 5])]
        assert answers[:2] == [("advance 0", None), ("advance_batched 1", None)]
        assert [value.split()[1] for value, _ in answers] == list("012345")
        statistics = await there.router.stats()
        assert (statistics["answered"], statistics["batches"], statistics["batched_requests"]) == (3, 2, 5)

    _routed(scenario)


def test_requests_of_other_keys_are_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router knows nothing of what keys mean, only whether they are equal."""

    async def scenario(there: _Hosts) -> None:
        await _six(there, "aababb")
        assert there.log == [("advance", 0), ("advance_batched", [1, 3]), ("advance_batched", [2, 4, 5])]

    _routed(scenario)


@pytest.mark.parametrize(("method", "key", "max_batch"), [("advance", "a", 1), ("score", "a", 3), ("advance", None, 3)])
def test_what_may_not_be_merged_is_asked_one_by_one(
    monkeypatch: pytest.MonkeyPatch, method: str, key: str | None, max_batch: int
) -> None:
    """With max_batch 1, of a method that has no shared form, or without a key: two at the host, as ever."""

    async def scenario(there: _Hosts) -> None:
        tasks = [there.ask(method, number, key) for number in range(4)]
        await there.settle()
        assert there.log == [(method, 0), (method, 1)]
        await there.answers(tasks)
        assert there.log == [(method, number) for number in range(4)]

    _routed(scenario, max_batch=max_batch)


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
def test_a_request_that_spoils_a_shared_call_is_set_aside_alone(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The call tells nothing of any one request in it: each is asked again alone, and the others have answers."""

    async def scenario(there: _Hosts) -> None:
        there.poison[2] = error
        answers = await _six(there, "aaaa")
        assert [value for value, _ in answers] == ["advance 0", "advance 1", None, "advance 3"]
        assert isinstance(answers[2][1], UserError)
        assert there.log[1] == ("advance_batched", [1, 2, 3])
        assert {call for call in there.log[2:] if call[0] != "process_id"} == {("advance", i) for i in (1, 2, 3)}

    _routed(scenario)


def test_an_unforeseen_error_reaches_all_who_share_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks in the router, nobody waits for an answer that will not come."""

    async def scenario(there: _Hosts) -> None:
        there.poison[2] = KeyError("unforeseen")
        tasks = [there.ask("advance", number, "a") for number in range(4)]
        await there.settle()
        there.gate.set()
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert [type(answer) for answer in found[1:]] == [KeyError] * 3

    _routed(scenario)


def test_a_short_request_does_not_wait_behind_a_shared_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared call takes all places of its host: what comes next goes elsewhere, or to who is free first."""

    async def scenario(there: _Hosts) -> None:
        tasks = [there.ask("advance", 0, "a"), *(there.ask("score", number, None) for number in range(1, 4))]
        await there.settle()
        assert there.log == [("advance", 0), ("score", 1), ("score", 2)]
        await there.answers(tasks)

    _routed(scenario, hosts=2)


def test_a_stream_of_others_starves_no_request_that_can_be_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is never idle: after PATIENCE others it takes any place."""
    monkeypatch.setattr("orchestrator.pool.queue.PATIENCE", 5)

    async def scenario(there: _Hosts) -> None:
        stream = [there.ask("score", number, None) for number in range(2)]
        await there.settle()
        waiting = there.ask("advance", 99, "a")
        await there.settle()
        stream += [there.ask("score", number, None) for number in range(2, 20)]
        await there.answers([*stream, waiting])
        assert there.log.index(("advance", 99)) < len(there.log) - 1

    _routed(scenario)


@pytest.mark.cluster
def test_runs_are_advanced_together_by_actors_and_a_deadly_one_alone(
    ray_session: None, made: Storage, host_settings: Callable[..., HostSettings], facts: ModelFacts, specs: Any
) -> None:
    """On Ray, with a run that takes its host with it: the others learn what they learn alone."""
    train = specs[PairKey("train", 1.0, 0)].digest
    settings = AdamSettings(learning_rate=5e-3, iterations=20, batch_size=16, training_pairs=48)
    run = LearnedRun(family="bns", options={}, sigma0=1.0, train=train, settings=settings)
    state = run.begin(run.build().start(GridSolver(Midpoint(), 4, Grid()), facts.scheduler))
    calls = [{"run": run, "state": state, "steps": 3} for _ in range(6)]
    expected = LocalPool(Host(host_settings(made))).call("advance", **calls[0]).parameters
    pool = RayPool.start(
        f"merging-{os.getpid()}", Host, host_settings(made), PoolSettings(hosts=1, cpus=0.5, max_batch=4)
    )
    try:
        pool.window = len(calls)
        # The first takes the host that is still starting; whatever the order of the rest, four of them then share.
        for state in pool.gather([Request("advance", call, "a key") for call in calls]):
            np.testing.assert_allclose(state.parameters, expected, rtol=1e-4, atol=1e-5)
        assert pool.statistics()["batches"] >= 1
        # Who shares a call with the deadly one is not known: the answers must not depend on it.
        calls[5]["steps"] = _deadly()
        outcomes = {found.index: found for found in pool.map([Request("advance", call, "a key") for call in calls])}
        assert [i for i, outcome in outcomes.items() if outcome.error is not None] == [5]
        for i in range(5):
            np.testing.assert_allclose(outcomes[i].value.parameters, expected, rtol=1e-4, atol=1e-5)
    finally:
        ray.kill(pool.router)
