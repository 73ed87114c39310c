"""The benchmarks compare equal work, and each runs from the command line to its result file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.pool.requests import Request

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# The scripts import each other by name. The folder is last on the path, so that they hide no other module.
sys.path.append(str(BENCHMARKS))

import bench_memory  # noqa: E402
import bench_pairs  # noqa: E402
import bench_sharing  # noqa: E402
import sharing_job  # noqa: E402
from memory_case import Case, LiveTensors, measure  # noqa: E402
from processes import MemoryWatch, RolePeak, memory, processes  # noqa: E402
from timing import interleaved_rounds, paired_ratio  # noqa: E402

from orchestrator import plugins  # noqa: E402
from orchestrator.config.pair_plan import pair_specs  # noqa: E402
from orchestrator.config.reading import parse_config  # noqa: E402
from orchestrator.errors import ConfigError  # noqa: E402
from orchestrator.models.facts import ModelFacts  # noqa: E402
from orchestrator.pairs import PairStore  # noqa: E402
from orchestrator.pool.requests import LocalPool  # noqa: E402
from orchestrator.storage import Storage  # noqa: E402
from sweeps.space import learned_points  # noqa: E402

SMALL = (16, 16, 16)


@pytest.fixture
def large_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the adapters of the benchmarks to the product's for one test."""
    import orchestrator.models

    monkeypatch.setattr(orchestrator.models, "__path__", [*orchestrator.models.__path__, sharing_job.ADAPTERS])


def run_of(psnr_db: list[float]) -> bench_sharing.Run:
    return bench_sharing.Run(seconds=1.0, psnr_db=psnr_db, total_pss=0, roles={"trial": RolePeak()})


def test_alternatives_take_turns() -> None:
    """After one warm-up each, all alternatives run once per round, so drift of the machine affects them equally."""
    order: list[str] = []
    interleaved_rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3


def test_a_slow_round_cancels_in_a_paired_ratio() -> None:
    """Ratios are taken within each round: a round in which the whole machine was slow changes nothing."""
    assert paired_ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == 0.5


def test_the_bare_loop_does_the_work_of_a_host(storage: Storage, host_settings: Any) -> None:
    """With the same noise, labels, batches, tolerances and norm, it reproduces the stored samples of the product."""
    local = LocalPool(Host(host_settings(storage)))
    spec = bench_pairs.pair_spec(local.call(Request.of(HostProtocol.facts)), pairs=16, batch=4, tolerance=1e-3)
    bench_pairs.making(local, storage, spec)()
    samples = torch.cat(bench_pairs.BareLoop(spec, list(range(spec.shards))).run())
    torch.testing.assert_close(samples.float(), PairStore(storage, spec).load().x1, rtol=0, atol=1e-5)


def test_unequal_samples_are_not_compared(storage: Storage, host_settings: Any) -> None:
    """A throughput means nothing if the samples differ."""
    local = LocalPool(Host(host_settings(storage)))
    spec = bench_pairs.pair_spec(local.call(Request.of(HostProtocol.facts)), pairs=16, batch=4, tolerance=1e-2)
    bench_pairs.making(local, storage, spec)()
    store = PairStore(storage, spec)
    with pytest.raises(Exception, match="not the same work"):
        bench_pairs.check_same([store.load().x1.double() + 1], store)


def test_sweeps_with_unequal_psnrs_are_not_compared() -> None:
    """Both ways must end at the same PSNRs, trial by trial."""
    with pytest.raises(Exception, match="did not end at the same PSNRs"):
        bench_sharing.check_same([run_of([40.0, 41.0]), run_of([40.0, 41.5])])


def test_the_sweep_has_the_requested_number_of_trials(large_zoo: None, facts: ModelFacts, tmp_path: Path) -> None:
    """All of them distil BNS, so that one process per trial does exactly the work of the pool."""
    model = bench_sharing.Model("small", 0.0, 0)
    content = bench_sharing.experiment(model, tmp_path, trials=6, iterations=10, pairs=SMALL)
    config = parse_config(content, "the benchmark's configuration")
    config.check()
    points = learned_points(config, pair_specs(config, facts), {}, facts.scheduler)
    assert len({point.key for point in points}) == 6


def test_the_large_model_is_the_zoo_model_with_more_weights(large_zoo: None, facts: ModelFacts) -> None:
    """It has the digest of the small model, so that both share their pairs, and the additional weights."""
    model = plugins.build("models", "large_zoo", {"weights": "digits_fm_ot", "weights_mb": 2})
    assert (model.digest, model.further_weights.nbytes) == (facts.digest, 2 * 2**20)


def test_the_large_model_refuses_a_negative_load(large_zoo: None) -> None:
    """The error is raised before any process starts."""
    with pytest.raises(ConfigError, match=r"load_seconds must be 0 or more, got -1"):
        plugins.load("models", "large_zoo").check({"weights": "digits_fm_ot", "load_seconds": -1})


def test_processes_of_a_tree_have_their_roles() -> None:
    """This process is the driver of its tree, and a child that Ray did not start is 'other'."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert {"driver": os.getpid(), "other": child.pid}.items() <= {
            process.role: process.pid for process in processes(os.getpid()) if process.pid in (os.getpid(), child.pid)
        }.items()
    finally:
        child.communicate(b"\n")


def test_private_memory_is_within_pss_and_pss_within_rss() -> None:
    """PSS adds a share of the shared memory, RSS all of it."""
    held = memory(os.getpid())
    assert held is not None
    assert 0 < held.private <= held.pss <= held.rss


def test_the_memory_watch_measures_the_peak() -> None:
    """The peak includes a tensor that was alive during the watch."""
    block = torch.ones(16 * 2**18)
    with MemoryWatch(os.getpid(), interval=0.01) as watch:
        while not watch.roles:
            pass
    assert watch.roles["driver"].private > block.nbytes


def test_live_tensors_counts_storages_once_and_drops_freed_ones() -> None:
    """A view adds no memory; a freed tensor counts only in the peak."""
    with LiveTensors() as live:
        kept = torch.ones(1000)
        view = kept.view(10, 100)
        freed = torch.ones(500)
        del freed
        assert live.alive() == kept.nbytes
    assert (live.peak, view.nbytes) == (1500 * 4, 4000)


def test_checkpointing_holds_less_for_the_backward_pass() -> None:
    """It keeps states and velocities instead of the network's activations (Chen et al. 2016), as the table shows."""
    plain, checkpointed = (measure(Case("digits", method, nfe=4, batch=4)).held for method in bench_memory.ADAM)
    assert plain is not None
    assert checkpointed is not None
    assert checkpointed < plain / 4


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (bench_pairs, ["--pairs", "100"], "--pairs 100 is not a multiple of 4 x --batch 64"),
        (bench_sharing, ["--trials", "3"], "--trials must be a multiple of 2, got 3"),
        (bench_memory, ["--nfe", "4,x"], "'4,x' is not a list of positive whole numbers; use e.g. 4,8,16"),
        (bench_memory, ["--models", "cat"], "unknown model 'cat' in --models; choose from digits, conv"),
    ],
)
def test_invalid_options_are_refused(script: Any, options: list[str], message: str) -> None:
    """The message has the name, the value and the remedy, and comes before the long work."""
    done = CliRunner().invoke(script.main, options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("bench_pairs", {"pairs": 16, "batch": 4, "tolerance": 1e-3, "rounds": 1}),
        ("bench_memory", {"models": "digits", "nfe": 2, "batch": 4}),
        ("bench_distil", {"cases": "digits_fm_ot:4"}),
        (
            "bench_sharing",
            {"trials": 2, "iterations": 10, "train": 16, "validation": 16, "load-seconds": 1, "weights-mb": 8},
        ),
    ],
)
def test_a_quick_run_writes_its_table(script: str, options: dict[str, object], tmp_path: Path) -> None:
    """From the command line to a dated file that names the command, as `make bench` runs it."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    call = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--results", str(tmp_path), *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert f"python benchmarks/{script}.py --quick" in path.read_text(encoding="utf-8")
