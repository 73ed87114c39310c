"""Objectives on a real model: their gradients, their effect on samples, and their use in a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import plugins
from orchestrator.config.pair_plan import PairKey, pair_specs
from orchestrator.config.reading import parse_config
from orchestrator.errors import ConfigError
from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.host import Host
from orchestrator.hosts.runs import LearnedRun
from orchestrator.hosts.settings import HostSettings
from orchestrator.objectives.base import FamilyObjective, SolverObjective
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool
from solvers.distil.methods.adam import Adam
from solvers.families import GridSolver
from solvers.families.bespoke_rk2 import BespokeRK2
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.losses import per_sample_mse
from solvers.ns import NSSolver
from solvers.schedulers import CondOT
from sweeps.space import learned_points

#: Options to test, for the objectives that have any.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "trajectory": [{}, {"path_weight": 0.9}],
    "rmse_bound": [{}, {"lipschitz": 2.0}],
}
CASES = [(name, options) for name in plugins.names("objectives") for options in OPTIONS.get(name, [{}])]
INDICES = [3, 0, 17, 40, 21]
START = GridSolver(Midpoint(), 4, Grid())


@pytest.fixture(scope="module")
def train(
    tmp_path_factory: pytest.TempPathFactory,
    specs: dict[PairKey, PairSpec],
    host_settings: Callable[..., HostSettings],
) -> tuple[Host, str]:
    """A host, and the digest of training pairs with trajectories."""
    from orchestrator.storage import Storage

    storage = Storage.at(tmp_path_factory.mktemp("objectives"))
    spec = dataclasses.replace(specs[PairKey("train", 1.0, 0)], trajectory=True)
    pool = LocalPool(Host(host_settings(storage)))
    ensure_pairs(storage, [spec], pool, wait=True, announce=lambda sentence: None)
    return pool.host, spec.name


def _run(train: str, name: str, options: dict[str, Any], iterations: int = 30) -> LearnedRun:
    settings = Adam(learning_rate=5e-3, iterations=iterations, batch_size=16, training_pairs=48)
    return LearnedRun(
        family="bespoke_rk2",
        options={},
        sigma0=1.0,
        train=train,
        method=settings,
        objective=name,
        objective_options=options,
    )


def _loss(host: Host, run: LearnedRun, parameters: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss and gradient over a few pairs, in the family's parameters or in theta, depending on the objective."""
    if isinstance(run.build_objective(), FamilyObjective):
        return host.loss_and_gradient_of_parameters(run, parameters, INDICES)
    return host.loss_and_gradient(parameters, run.train, INDICES, run.objective, run.objective_options)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_gradient_is_the_slope_of_the_loss(train: tuple[Host, str], name: str, options: dict[str, Any]) -> None:
    """Checked by finite differences along random directions, through the network, the solver and the path."""
    host, pairs = train
    run = _run(pairs, name, options)
    scheduler = host.model.scheduler
    if isinstance(run.build_objective(), SolverObjective):
        point = to_numpy(START.to_ns(scheduler).flat())
    else:
        point = to_numpy(BespokeRK2().start(START, scheduler))
    point = point + 0.01 * np.linspace(0.2, 1, len(point))
    _, gradient = _loss(host, run, point)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = rng.standard_normal(len(point))
        step = 2e-3 / np.linalg.norm(direction)
        slope = (_loss(host, run, point + step * direction)[0] - _loss(host, run, point - step * direction)[0]) / (
            2 * step
        )
        # The digits' features clip samples to [-1, 1], and most pixels are near the ends: the loss has kinks.
        tolerance = 0.1 if name == "perceptual" else 0.02
        assert slope == pytest.approx(direction @ gradient, rel=3e-2, abs=tolerance * np.linalg.norm(gradient))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_few_steps_reduce_the_error_of_the_samples(
    train: tuple[Host, str], name: str, options: dict[str, Any]
) -> None:
    """Every objective lowers the error of the samples; they differ only in how far."""
    host, pairs = train
    scheduler = host.model.scheduler
    run = _run(pairs, name, options)
    start = run.method.begin(run.build().start(START, scheduler))
    state = host.advance(run, start, 30)
    assert state.status == "finished"

    def error(values: list[float]) -> float:
        solver = run.build().to_ns(torch.tensor(values, dtype=torch.float64), scheduler, 1.0)
        samples = host.sample(to_numpy(solver.flat()), pairs, range(48))
        return float(per_sample_mse(torch.from_numpy(samples), host._load(pairs)[1].x1).mean())

    assert error(state.parameters) < 0.9 * error(start.parameters)


def test_the_trajectory_objective_with_path_weight_0_is_the_psnr_loss(train: tuple[Host, str]) -> None:
    """At path weight 0, only the final sample counts."""
    host, pairs = train
    theta = to_numpy(START.to_ns(host.model.scheduler).flat())
    matching = host.loss_and_gradient(theta, pairs, INDICES, "trajectory", {"path_weight": 0.0})
    plain = host.loss_and_gradient(theta, pairs, INDICES, "psnr")
    assert matching[0] == plain[0]
    np.testing.assert_array_equal(matching[1], plain[1])


def test_states_are_compared_at_the_times_of_the_evaluations(train: tuple[Host, str]) -> None:
    """Each x_k is compared with x(t_k), and the sample with x(1)."""
    host, pairs = train
    theta = to_numpy(START.to_ns(host.model.scheduler).flat())
    loss, _ = host.loss_and_gradient(theta, pairs, INDICES, "trajectory", {"path_weight": 0.25})
    chosen = host._load(pairs)[1].select(INDICES)
    assert chosen.path is not None
    solver = NSSolver.from_flat(torch.from_numpy(theta))
    with torch.no_grad():
        states = list(solver.states(host.model.field(chosen.condition, 1.0), chosen.x0))
    times = [*solver.times.tolist()[1:], 1.0]
    errors = [per_sample_mse(x, chosen.path.state(t)).double() for x, t in zip(states[1:], times, strict=True)]
    expected = (0.75 * errors[-1] + 0.25 * (errors[0] + errors[1] + errors[2]) / 3).log().sum()
    assert loss == pytest.approx(float(expected), rel=1e-4)


# --- In a configuration ------------------------------------------------------------------------------------------


def _learned(experiment: dict[str, Any], **entry: Any) -> dict[str, Any]:
    return {**experiment, "learned": [{"iterations": 20, "validate_every": 10, **entry}]}


def test_local_errors_are_refused_for_a_family_without_steps(experiment: dict[str, Any]) -> None:
    """BNS has no step that could start on the path. The error comes before any work and names a remedy."""
    config = parse_config(_learned(experiment, family="bns", objective="rmse_bound"), "test")
    with pytest.raises(ConfigError, match=r"'RMSE bound' scores single scale-time steps, and BNS has none; use it"):
        config.check()


def test_trajectories_are_kept_only_if_an_objective_needs_them(experiment: dict[str, Any], facts: Any) -> None:
    """They make a training set many times larger; validation and test sets never contain them."""
    plain = parse_config(_learned(experiment, family="bespoke_rk2"), "test")
    stepwise = parse_config(_learned(experiment, family="bespoke_rk2", objective="lte"), "test")
    assert not any(spec.trajectory for spec in pair_specs(plain, facts).values())
    kept = {key.split for key, spec in pair_specs(stepwise, facts).items() if spec.trajectory}
    assert kept == {"train"}


def test_one_family_under_two_objectives_is_two_solvers(experiment: dict[str, Any], facts: Any) -> None:
    """Each has its own row, and its label contains the objective."""
    both = _learned(experiment, family="bespoke_rk2", start="midpoint")
    both["learned"].append({"family": "bespoke_rk2", "start": "midpoint", "objective": {"name": "rmse_bound"}})
    config = parse_config(both, "test")
    config.check()
    points = learned_points(config, pair_specs(config, facts), {}, CondOT())
    assert [point.label for point in points] == ["BST-RK2", "BST-RK2 (RMSE bound)"]
    assert len({point.key for point in points}) == 2


def test_a_start_that_the_family_cannot_equal_is_refused(experiment: dict[str, Any]) -> None:
    """The error lists the families it can start from."""
    config = parse_config(_learned(experiment, family="bespoke_rk2", start="euler"), "test")
    with pytest.raises(ConfigError, match=r"'bespoke_rk2' cannot start from 'euler' \(it can only start from midpoint"):
        config.check()
