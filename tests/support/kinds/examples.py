"""The examples: trained checkpoints and configurations, and an experiment run in this process as a sweep runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kinds import training
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey, pair_specs
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.lock import exclusive
from orchestrator.pairs import PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.reports.gallery import make_gallery
from orchestrator.reports.sweep import write_report
from orchestrator.results.store import Result, ResultStore, Row, rows
from orchestrator.storage import Storage
from solvers.theta import ThetaArtifact
from sweeps.points.execute import TrialContext, run_point
from sweeps.space import fixed_points, learned_points
from sweeps.sweep import best_choices

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Example:
    """A small network of one kind.

    Attributes:
        name: Name of its configuration, ``configs/NAME.yaml``, and of the script that samples it without this package,
            ``outside/NAME.py``.
        kind: Kind of its samples.
        train: Trains it, and writes its files to a folder.
    """

    name: str
    kind: str
    train: Callable[[Path], None]

    @property
    def config(self) -> Path:
        return HERE / "configs" / f"{self.name}.yaml"

    @property
    def outside(self) -> Path:
        return HERE / "outside" / f"{self.name}.py"

    def prepare(self, folder: Path) -> Path:
        """The folder of its files inside ``folder``, trained by the first process that asks."""
        own = Storage.at(folder / self.train.__name__)
        with exclusive(own, ".lock", wait=True, announce=lambda sentence: None):
            if not own.exists("trained"):
                Path(own.root, "code").symlink_to(training.CODE)
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    self.train(Path(own.root))
                own.write("trained", b"")
        return Path(own.root)


EXAMPLES = {
    example.name: example
    for example in (
        Example("digit_flow", "image", training.train_digit_flow),
        Example("digit_flow_torchscript", "image", training.train_digit_flow),
        Example("digit_flow_onnx", "image", training.train_digit_flow),
        Example("edm_digits", "image", training.train_edm_digits),
        Example("latent_digits", "image", training.train_latent_digits),
        Example("drops", "video", training.train_drops),
        Example("waves", "series", training.train_waves),
        Example("rings", "points", training.train_rings),
        Example("moons", "vectors", training.train_moons),
        Example("wine", "vectors", training.train_wine),
        Example("reach", "trajectory", training.train_reach),
        Example("imputer", "series", training.train_imputer),
    )
}


@dataclass(frozen=True)
class Outcome:
    """What a sweep in this process left.

    Attributes:
        config: The experiment.
        pool: The host.
        tests: The test pairs.
        rows: Rows of the comparison.
        theta: The best learned solver.
        report: Text of its report.
    """

    config: ExperimentConfig
    pool: LocalPool
    tests: PairStore
    rows: list[Row]
    theta: ThetaArtifact
    report: str

    def best(self, kind: str) -> float:
        """The best PSNR on test pairs of the rows of one kind."""
        return max(row.metrics["psnr_db"] for row in self.rows if row.kind == kind)

    def given(self, count: int) -> dict[str, npt.NDArray[Any]]:
        """Noise ``x0`` of the first test pairs, and their conditions by name; labels are ``y``."""
        pairs, dataset = self.tests.load().select(slice(count)), self.config.conditioning.build("datasets")
        rows = pairs.condition
        named = dataset.tensors(rows.numpy(), dataset.layout).tensors if dataset.named else {"y": rows}
        return {"x0": pairs.x0.numpy()} | {name: values.numpy() for name, values in named.items()}


def run_in_process(config: ExperimentConfig, storage: Storage, folder: Path) -> Outcome:
    """Run an experiment as ``bespoke sweep`` does, without Ray and MLflow; the report goes to ``folder``."""
    host = HostSettings(adapter=config.model.name, options=dict(config.model.options), storage=storage.root)
    pool = LocalPool(Host(host))
    facts = pool.call(Request.of(HostProtocol.facts))
    specs = pair_specs(config, facts)
    ensure_pairs(storage, list(specs.values()), pool, wait=True, announce=lambda sentence: None)
    context = TrialContext(
        storage=storage.root, tracking_uri="", experiment_id="", parent_run_id="", pool="", hosts=1, facts=facts
    )
    results: dict[str, Result] = {}

    def finish(points: Any) -> None:
        for point in points:
            results[point.key] = run_point(point, context, pool, storage, lambda values: None)

    fixed = fixed_points(config, specs)
    finish(fixed)
    finish(learned_points(config, specs, best_choices(fixed, results), facts.scheduler))
    table = rows(list(results.values()))
    tests = {scale: spec for (split, scale, _), spec in specs.items() if split == "test"}
    panels = make_gallery(pool, storage, tests, table, facts)
    *_, report = write_report(folder, config, facts, specs.values(), table, list(results.values()), panels)
    (learned,) = [row for row in table if row.kind == "learned"]
    theta = ThetaArtifact.from_json(ResultStore(storage, learned.keys[0]).read_theta(), origin=config.name)
    spec = specs[PairKey("test", theta.guidance_scale, 0)]
    return Outcome(config, pool, PairStore.open(storage, spec.name), table, theta, report.read_text(encoding="utf-8"))


def sample_outside(example: Example, files: Path, sampler: Path, given: dict[str, npt.NDArray[Any]]) -> torch.Tensor:
    """Samples of the example's own script, in a process that sees its files and the exported file only.

    Args:
        example: The example.
        files: Folder of its files.
        sampler: The exported file.
        given: Noise and conditions by name.
    """
    np.savez(sampler.with_name("given.npz"), **given)
    for file in files.iterdir():
        sampler.with_name(file.name).symlink_to(file)
    script = f"import sys; sys.path[:0] = ['.', 'code']\n{example.outside.read_text(encoding='utf-8')}"
    script += "\nassert not {'orchestrator', 'solvers', 'ray'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=sampler.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(sampler.with_name("samples.npy")))
