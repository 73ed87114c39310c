"""Whole commands under faults: they end as if undisturbed, or say what is missing and resume when rerun."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from command_place import EVALUATE, EXPERIMENT, PATIENCE, Place, check_complete, scores

from orchestrator.config.pair_plan import STREAMS
from orchestrator.randomness import noise

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

TIMEOUT = 12
"""Seconds after which a host that does not answer counts as hung."""

HARDENED = {**EXPERIMENT, "resources": {**EXPERIMENT["resources"], "request_timeout": TIMEOUT}}


def _processes(command: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Return the processes of a command whose Ray name starts with ``name``, the oldest first."""
    matching = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(command.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                title = "".join(process.cmdline()[:1])  # empty if the process is just ending
                if title.startswith(name):
                    matching.append(process)
    return sorted(matching, key=lambda process: process.pid)


class Fault:
    """A disturbance of a command, injected once.

    Args:
        when: Whether it is time for it.
        do: Injects it; returns False if that was not possible yet.

    """

    def __init__(self, when: Callable[[], bool], do: Callable[[subprocess.Popen[str]], bool]):
        self.when, self.do = when, do


def signal_youngest(name: str, number: signal.Signals) -> Callable[[subprocess.Popen[str]], bool]:
    """Return an action that signals the youngest process of this name. Two in a row need not hit the same process."""

    def do(command: subprocess.Popen[str]) -> bool:
        candidates = _processes(command, name)
        with suppress(IndexError, psutil.NoSuchProcess):
            candidates[-1].send_signal(number)
            return True
        return False

    return do


def run_with(place: Place, faults: list[Fault], *command: str) -> str:
    """Run a command that must succeed despite these faults, injected in order, and return its output."""
    process = place.start(*command)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.append(process.communicate()[0]))
    reader.start()
    end = time.monotonic() + PATIENCE
    for number, fault in enumerate(faults):
        while not (fault.when() and fault.do(process)):
            assert process.poll() is None, (number, output)
            assert time.monotonic() < end, number
            time.sleep(0.005)
    reader.join(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output[0]


def test_a_sweep_whose_hosts_and_trials_are_killed_or_hang_ends_as_if_undisturbed(
    undisturbed: Place, tmp_path: Path
) -> None:
    """One host is killed and one suspended while pairs are made.

    While theta is distilled, a host, a trial, a point runner and the router are killed, and a host is suspended.

    """
    place = Place(tmp_path / "broken", HARDENED)

    def shards(count: int) -> Callable[[], bool]:
        return lambda: len(place.files("pairs/*/*.parquet")) >= count

    def distilling() -> bool:
        return any(place.root.glob("points/*/state.json"))

    faults = [
        Fault(shards(2), signal_youngest("ray::Host", signal.SIGKILL)),
        Fault(shards(4), signal_youngest("ray::Host", signal.SIGSTOP)),
        Fault(distilling, signal_youngest("ray::Host", signal.SIGKILL)),
        Fault(distilling, signal_youngest("ray::ImplicitFunc", signal.SIGKILL)),
        Fault(distilling, signal_youngest("ray::PointRunner", signal.SIGKILL)),
        Fault(distilling, signal_youngest("ray::Host", signal.SIGSTOP)),
        Fault(distilling, signal_youngest("ray::Router", signal.SIGKILL)),
    ]
    run_with(place, faults, "sweep", "tiny.yaml")
    check_complete(place)
    for pattern in ("pairs/*/*.parquet", "pairs/*/manifest.json", "points/*/theta.json", "points/*/result.json"):
        assert place.files(pattern) == undisturbed.files(pattern)


CGROUPS = Path("/sys/fs/cgroup/memory")


@contextmanager
def memory_limit(limit: int) -> Iterator[Path]:
    """A control group with a limit in bytes; the kernel kills (SIGKILL) processes in it that exceed the limit."""
    group = CGROUPS / f"bespoke-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        end = time.monotonic() + 30
        while (group / "cgroup.procs").read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        group.rmdir()


@pytest.mark.skipif(not os.access(CGROUPS, os.W_OK), reason="needs the right to make a control group (version 1)")
def test_a_host_that_the_kernel_kills_for_its_memory_is_restarted(undisturbed: Place, tmp_path: Path) -> None:
    """It is killed while it loads its model; the pairs are those of an undisturbed run, byte for byte."""
    place = Place(tmp_path / "broken")
    with memory_limit(2**25) as group:

        def starve(command: subprocess.Popen[str]) -> bool:
            loading = _processes(command, "ray::Host")
            if loading:
                (group / "cgroup.procs").write_text(str(loading[0].pid))
            return bool(loading)

        run_with(place, [Fault(lambda: True, starve)], "pairs", "tiny.yaml")
        (kills,) = [line for line in (group / "memory.oom_control").read_text().splitlines() if "oom_kill " in line]
        assert int(kills.split()[1]) >= 1
    for pattern in ("pairs/*/*.parquet", "pairs/*/manifest.json"):
        assert place.files(pattern) == undisturbed.files(pattern)


POISONED = """
import os
from pathlib import Path

import torch


class Poisoned(torch.nn.Module):
    \"\"\"Ends its process when a batch contains the poisoned pair, as long as the file "armed" exists.\"\"\"

    def __init__(self, poison: float):
        super().__init__()
        self.poison = poison
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if (x[:, 0, 0, 0] == self.poison).any() and Path(__file__).with_name("armed").exists():
            os._exit(1)
        return torch.tanh(x) - x
"""


def test_a_pair_that_kills_its_host_is_set_aside_and_the_others_are_made(tmp_path: Path) -> None:
    """The error names its shard; once the cause is fixed, only that shard is made."""
    (tmp_path / "poisoned.py").write_text(POISONED, encoding="utf-8")
    (tmp_path / "armed").touch()
    poison = float(noise(STREAMS["validation"], [17], (1, 4, 4))[0, 0, 0, 0])
    model = {
        "factory": "poisoned:Poisoned",
        "kwargs": {"poison": poison},
        "path": str(tmp_path),
        "shape": [1, 4, 4],
        "prediction": "velocity",
        "native_scheduler": "cond_ot",
    }
    experiment = {**EXPERIMENT, "model": {"name": "torch_module", "options": model}}
    place = Place(tmp_path / "place", experiment)
    process = place.start("pairs", "tiny.yaml", "--force")
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2, output
    assert re.search(
        r"error: 1 of 4 shards of \S+ could not be made \(shards 2\): make_shard\(first=\d+, stop=\d+\) failed 3 times "
        r"and is set aside; the last time: Actor\w+Error.*; the other shards are kept; run the same command again",
        output,
        re.DOTALL,
    ), output
    shards = place.files("pairs/*/*.parquet")
    assert len(shards) == 8 + 4 + 4 - 1, "the shards of the other stores are made, too"
    assert len(place.files("pairs/*/manifest.json")) == 2
    (tmp_path / "armed").unlink()
    times = {name: (place.root / name).stat().st_mtime_ns for name in shards}
    place.run("pairs", "tiny.yaml", "--force")
    assert {name: (place.root / name).stat().st_mtime_ns for name in shards} == times
    assert len(place.files("pairs/*/*.parquet")) == len(shards) + 1


def test_an_evaluation_whose_hosts_and_scorers_are_killed_or_hang_ends_with_the_same_scores(
    undisturbed: Place, evaluated: Place, tmp_path: Path
) -> None:
    """A host is killed and another suspended while samples are measured; a scorer is killed while it has samples."""
    place = Place(tmp_path / "broken", HARDENED)
    shutil.copytree(undisturbed.root, place.root)

    def measured(pattern: str, count: int) -> Callable[[], bool]:
        return lambda: len(list(place.root.glob(pattern))) >= count

    faults = [
        Fault(measured("measurements/*/*/*/shard-*", 4), signal_youngest("ray::Host", signal.SIGKILL)),
        Fault(measured("measurements/media/*/*", 1), signal_youngest("ray::Scorer", signal.SIGKILL)),
        Fault(measured("measurements/*/*/*/shard-*", 20), signal_youngest("ray::Host", signal.SIGSTOP)),
    ]
    run_with(place, faults, *EVALUATE)
    assert scores(place) == scores(evaluated)
    assert place.files("measurements/*/*/*/shard-*") == evaluated.files("measurements/*/*/*/shard-*")


def test_ctrl_c_ends_a_sweep_and_the_same_command_resumes(undisturbed: Place, tmp_path: Path) -> None:
    """As from a terminal, every process gets the signal: once while pairs are made, twice during the sweep."""
    place = Place(tmp_path / "interrupted")
    for times, pattern in ((1, "pairs/*/*.parquet"), (2, "points/*/state.json")):
        process = place.start("sweep", "tiny.yaml")
        end = time.monotonic() + PATIENCE
        while not any(place.root.glob(pattern)):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.5)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 130, output
        assert "interrupted; run the same command again to resume" in output.splitlines(), output
        assert "Traceback" not in output, output
        psutil.wait_procs(children, timeout=30)
        assert not [child for child in children if child.is_running()], "processes are left in the background"
    place.run("sweep", "tiny.yaml")
    check_complete(place)
    assert place.files("points/*/theta.json") == undisturbed.files("points/*/theta.json")
