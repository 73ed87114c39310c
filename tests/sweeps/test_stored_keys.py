"""Keys of stored results do not change: a store made by an earlier release is reused, not computed again.

``tests/support/stored_keys.json`` holds the keys of the shipped configurations with ``grid_search.search=full``, under
``raced`` those of one whose grids race, and under ``real`` that of real samples. It changes only together with
``RESULT_FORMAT``, ``RACE_FORMAT``, the ``FORMAT`` of pairs or the ``FORMAT`` of measurements; run this file to write it
anew.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from orchestrator import plugins
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

STORED_FILE = Path(__file__).parents[1] / "support" / "stored_keys.json"
STORED: dict[str, Any] = json.loads(STORED_FILE.read_text(encoding="utf-8"))
CONFIGS = Path(__file__).parents[2] / "sweeps" / "configs"
AB2 = SolverChoice(family="adams_bashforth", options={"steps_back": 2}, label="AB2", grid=Grid("warped", p=1.4, q=1.2))
EULER = SolverChoice(family="euler", options={}, label="Euler", grid=Grid())


def keys_of(name: str, storage: Storage, search: str = "full") -> dict[str, Any]:
    """Digests of the model, the pair sets, the points and the measurements of a shipped configuration.

    Batches of Levenberg-Marquardt are spelled out: earlier releases had 64 pairs in each by default.
    """
    config = load_config(CONFIGS / f"{name}.yaml", [f"grid_search.search={search}"])
    learned = tuple(
        each.model_copy(update={"batch_size": each.batch_size or 64})
        if each.method.name == "levenberg_marquardt"
        else each
        for each in config.learned
    )
    config = config.model_copy(update={"learned": learned})
    settings = HostSettings(adapter=config.model.name, options=dict(config.model.options), storage=storage.root)
    facts = Host(settings).facts()
    specs = pair_specs(config, facts)
    best = {(n, g, s): [AB2, EULER] for n in config.nfe for g in config.guidance_scale for s in config.fixed_sigma0}
    points = [*fixed_points(config, specs), *learned_points(config, specs, best, facts.scheduler)]
    keys = {f"{point.name}/{point.kind}/{point.seed}/{i}": point.key for i, point in enumerate(points)}
    euler = EvaluatedSolver(
        kind="baseline", name="Euler", guidance_scale=1.0, ns=EULER.solver(4, 1.0).to_ns(facts.scheduler)
    )
    test_pairs = next(spec for key, spec in specs.items() if key.split == "test")
    return {
        "model": facts.digest,
        "pairs": {f"{k.split}/{k.guidance_scale:g}/{k.seed}": spec.name for k, spec in specs.items()},
        "points": {name: keys[name] for name in sorted(keys)[:: max(1, len(keys) // 6)]},
        "points_count": len(keys),
        "all_points": hashlib.sha256(json.dumps(sorted(keys.values())).encode()).hexdigest()[:16],
        "measurements": {
            f"{metric.name}/{i}": Measured(storage, euler.digest, test_pairs.digest, metric.identity, 1).key(0)
            for i, metric in enumerate(metric_specs(config))
        },
    }


def real_key(storage: Storage) -> str:
    """Key of the reference of distances between distributions, which is measured once for all experiments."""
    content = plugins.build("datasets", "digits").real_content
    dataset = {"name": "digits", "options": {}}
    real = RealSamples(storage, MetricSpec("fid", {"features": "digits_cnn"}), dataset, content, 100)
    return real.measured.key(0)


def raced_keys(storage: Storage) -> dict[str, Any]:
    """Keys of the points of a configuration whose grids race."""
    keys = keys_of("cifar10", storage, "race")
    return {name: keys[name] for name in ("points", "points_count", "all_points")}


@pytest.mark.parametrize("name", [name for name in STORED if name not in ("real", "raced")])
def test_keys_of_a_shipped_configuration_do_not_change(name: str, storage: Storage) -> None:
    """A store of an earlier release of the same formats is reused."""
    assert keys_of(name, storage) == STORED[name]


def test_keys_of_a_race_do_not_change(storage: Storage) -> None:
    """They are those of a full search for everything that is not raced."""
    raced = raced_keys(storage)
    assert raced == STORED["raced"]
    common = [name for name, key in raced["points"].items() if key == STORED["cifar10"]["points"].get(name)]
    assert [name for name in raced["points"] if "best grid" not in name] == common


def test_keys_of_real_samples_do_not_change(storage: Storage) -> None:
    """They are measured once for all experiments."""
    assert real_key(storage) == STORED["real"]


if __name__ == "__main__":  # writes the file anew, after a change of a format
    with tempfile.TemporaryDirectory() as folder:
        place = Storage.at(folder)
        special = {"real": real_key, "raced": raced_keys}
        keys = {name: special[name](place) if name in special else keys_of(name, place) for name in STORED}
    STORED_FILE.write_text(json.dumps(keys, indent=1, sort_keys=True) + "\n", encoding="utf-8")
