"""Keys of stored results do not change: a store made by an earlier release is reused, not computed again.

``tests/support/stored_keys.json`` holds the keys of the shipped configurations as the release of 2026-11 computed them.
It changes only together with ``RESULT_FORMAT``, the ``FORMAT`` of pairs or the ``FORMAT`` of measurements.

"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.pair_plan import pair_specs
from orchestrator.config.reading import load_config
from orchestrator.evaluation.check import metric_specs
from orchestrator.evaluation.real import RealSamples
from orchestrator.evaluation.solvers import EvaluatedSolver
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.metrics.measurements import Measured, MetricSpec
from orchestrator.storage import Storage
from solvers.grids import Grid
from sweeps.point import SolverChoice
from sweeps.space import fixed_points, learned_points

STORED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "support" / "stored_keys.json").read_text(encoding="utf-8")
)
AB2 = SolverChoice(family="adams_bashforth", options={"steps_back": 2}, label="AB2", grid=Grid("warped", p=1.4, q=1.2))
EULER = SolverChoice(family="euler", options={}, label="Euler", grid=Grid())


@pytest.mark.parametrize("name", [name for name in STORED if name != "real"])
def test_keys_of_a_shipped_configuration_do_not_change(name: str, repository: Path, storage: Storage) -> None:
    """Digests of the model, the pair sets, the points and the measurements."""
    stored = STORED[name]
    config = load_config(repository / "sweeps" / "configs" / f"{name}.yaml")
    settings = HostSettings(adapter=config.model.name, options=dict(config.model.options), storage=storage.root)
    facts = Host(settings).facts()
    assert facts.digest == stored["model"]

    specs = pair_specs(config, facts)
    assert {f"{k.split}/{k.guidance_scale:g}/{k.seed}": spec.digest for k, spec in specs.items()} == stored["pairs"]

    best = {(n, g, s): [AB2, EULER] for n in config.nfe for g in config.guidance_scale for s in config.fixed_sigma0}
    points = [*fixed_points(config, specs), *learned_points(config, specs, best, facts.scheduler)]
    keys = {f"{point.name}/{point.kind}/{point.seed}/{i}": point.key for i, point in enumerate(points)}
    assert len(keys) == stored["points_count"]
    assert stored["points"].items() <= keys.items()
    assert hashlib.sha256(json.dumps(sorted(keys.values())).encode()).hexdigest()[:16] == stored["all_points"]

    euler = EvaluatedSolver(
        kind="baseline", name="Euler", guidance_scale=1.0, ns=EULER.solver(4, 1.0).to_ns(facts.scheduler)
    )
    test_pairs = next(spec for key, spec in specs.items() if key.split == "test")
    measured = {
        f"{metric.name}/{i}": Measured(storage, euler.digest, test_pairs.digest, metric.identity, 1).key(0)
        for i, metric in enumerate(metric_specs(config))
    }
    assert measured == stored["measurements"]


def test_keys_of_real_samples_do_not_change(storage: Storage) -> None:
    """The reference of distances between distributions is measured once for all experiments."""
    real = RealSamples(storage, MetricSpec("fid", {"features": "digits_cnn"}), {"name": "digits", "options": {}}, 100)
    assert real.measured.key(0) == STORED["real"]
