"""Executing a point gives a result whatever interrupts it, and never a worse one than its start."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from trial_example import trial_context

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey, pair_specs
from orchestrator.config.reading import parse_config
from orchestrator.errors import StoreError, UserError
from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Pool, Request
from orchestrator.results.scoring import evaluate
from orchestrator.results.store import Result, ResultStore
from orchestrator.storage import Storage, canonical_json
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.distil.state import DIVERGENCE_DB
from solvers.families import GridSolver
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.schedulers import CondOT
from solvers.theta import ThetaArtifact
from sweeps.point import AnyPoint, FixedPoint, LearnedPoint, SolverChoice
from sweeps.points import grid_search
from sweeps.points.execute import TrialContext, _usable, mlflow_parameters, run_point
from sweeps.space import fixed_points, learned_points
from sweeps.sweep import best_choices

EULER = SolverChoice(family="euler", options={}, label="Euler", grid=Grid())

Run = Callable[..., Result]


@pytest.fixture
def context(facts: ModelFacts, storage: Storage) -> TrialContext:
    """The context of a trial, without Ray and MLflow."""
    return trial_context(storage, facts)


@pytest.fixture
def run(context: TrialContext, pool: LocalPool, storage: Storage) -> Run:
    """Runs a point on the host in this process."""

    def run(point: AnyPoint, report: Callable[[dict[str, float]], None] = lambda values: None) -> Result:
        return run_point(point, context, pool, storage, report)

    return run


@pytest.fixture
def fixed(config: ExperimentConfig, specs: dict[PairKey, PairSpec]) -> dict[tuple[str, str], FixedPoint]:
    """The small experiment's fixed points, by family and kind."""
    return {(point.family, point.kind): point for point in fixed_points(config, specs)}


@pytest.fixture
def learned(config: ExperimentConfig, specs: dict[PairKey, PairSpec]) -> LearnedPoint:
    """The small experiment's distillation, from Euler on the uniform grid: 20 iterations, validated every 10."""
    (point,) = learned_points(config, specs, {(4, 1.0, 1.0): [EULER]}, CondOT())
    return point


def _with(point: LearnedPoint, validate_every: int = 10, **settings: Any) -> LearnedPoint:
    run = dataclasses.replace(point.run, method=dataclasses.replace(point.run.method, **settings))
    return dataclasses.replace(point, run=run, validate_every=validate_every)


def _theta(storage: Storage, point: AnyPoint) -> ThetaArtifact:
    return ThetaArtifact.from_json(ResultStore(storage, point.key).read_theta())


def _psnr(pool: Pool, artifact: ThetaArtifact, pairs: str) -> float:
    return evaluate(pool, artifact.solver, pairs, ["psnr"])["psnr_db"]["mean"]


# ---- fixed families -------------------------------------------------------------------------------------------------


def test_a_fixed_family_on_the_common_grid_is_scored_unchanged(
    run: Run, fixed: dict[tuple[str, str], FixedPoint], pool: LocalPool, facts: ModelFacts, storage: Storage
) -> None:
    """No search and no forwards; the scores are those of the solver itself on the test pairs."""
    point = fixed["midpoint", "common grid"]
    result = run(point)
    solver = GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler)
    assert result.metrics == evaluate(pool, solver, point.test, point.metrics)
    assert set(result.metrics) == {"psnr_db", "snr_db", "rmse"}
    assert (result.kind, result.grid, result.status, result.forwards) == ("common grid", "uniform", "finished", 0)
    theta = _theta(storage, point)
    torch.testing.assert_close(theta.solver.flat(), solver.flat(), rtol=0, atol=0)
    assert theta.pairs_digest is None, "it was not distilled on any pairs"


def test_the_best_grid_is_the_one_of_highest_psnr_on_validation_pairs(
    run: Run, fixed: dict[tuple[str, str], FixedPoint], pool: LocalPool, facts: ModelFacts, storage: Storage
) -> None:
    """It equals the best of all candidates scored one by one; test pairs do not affect the choice."""
    point = fixed["euler", "best grid"]
    result = run(point)
    scores = {
        grid: evaluate(pool, GridSolver(Euler(), 4, grid).to_ns(facts.scheduler), point.validation, ["psnr"])
        for grid in point.grids
    }
    best = max(scores, key=lambda grid: scores[grid]["psnr_db"]["mean"])
    assert Grid(**(result.chosen_grid or {})) == best
    assert best != Grid()
    assert result.validation_psnr_db == pytest.approx(scores[best]["psnr_db"]["mean"], rel=1e-6)
    assert _psnr(pool, _theta(storage, point), point.test) == pytest.approx(result.metrics["psnr_db"]["mean"], rel=1e-9)


def test_a_large_search_scores_all_grids_on_some_pairs_and_the_finalists_on_all(
    run: Run, fixed: dict[tuple[str, str], FixedPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cost counts every candidate on the search pairs and three finalists on all validation pairs."""
    raced = fixed["euler", "best grid"]
    assert (len(raced.grids), raced.race) == (4, True)
    point = dataclasses.replace(raced, race=False)
    result = run(point)
    assert result.forwards == (4 * 16 + 3 * 32) * 4
    monkeypatch.setattr(grid_search, "FINALISTS", 4)
    assert run(dataclasses.replace(point, metrics=("psnr",))).forwards == 4 * 32 * 4
    assert run(raced).forwards < result.forwards


def test_the_best_grid_is_never_worse_on_validation_than_the_common_one(
    run: Run, fixed: dict[tuple[str, str], FixedPoint]
) -> None:
    """The common grid is one of the candidates."""
    for family in ("euler", "midpoint"):
        best, common = (run(fixed[family, f"{kind} grid"]).validation_psnr_db for kind in ("best", "common"))
        assert best >= common


def test_a_distillation_starts_from_the_best_solver_on_validation_pairs(
    run: Run, fixed: dict[tuple[str, str], FixedPoint]
) -> None:
    """The best of all families and grids at its NFE, guidance scale and sigma0."""
    results = {point.key: run(point) for point in fixed.values()}
    ((cell, choices),) = best_choices(list(fixed.values()), results).items()
    ranked = sorted(results.values(), key=lambda result: -result.validation_psnr_db)
    assert cell == (4, 1.0, 1.0)
    assert [(c.label, c.grid) for c in choices] == [(r.label, Grid(**(r.chosen_grid or {}))) for r in ranked]
    del results[ranked[0].key]
    ((_, rest),) = best_choices(list(fixed.values()), results).items()
    assert rest == choices[1:]


# ---- learned families -----------------------------------------------------------------------------------------------


def test_distillation_improves_on_its_start(run: Run, learned: LearnedPoint, pool: LocalPool, storage: Storage) -> None:
    """The test pairs have fresh noise; the start, measured on the same pairs, is Euler itself."""
    result = run(learned)
    assert result.start_metrics is not None
    assert result.metrics["psnr_db"]["mean"] > result.start_metrics["psnr_db"]["mean"] + 1
    assert result.validation_psnr_db > (result.start_validation_psnr_db or math.inf) + 1
    assert (result.status, result.kind, result.grid) == ("finished", "learned", "from Euler, uniform")
    assert [entry[0] for entry in result.history] == [0, 10, 20]
    assert _psnr(pool, _theta(storage, learned), learned.test) == pytest.approx(
        result.metrics["psnr_db"]["mean"], rel=1e-9
    )


def test_the_cost_of_a_distillation_is_counted(run: Run, learned: LearnedPoint) -> None:
    """Forwards and backwards of its steps plus three validations, all at NFE 4 and unguided."""
    result = run(learned)
    assert result.backwards == 20 * 16 * 4
    assert result.forwards == (20 * 16 + 3 * 32) * 4


def test_a_theta_records_its_provenance(run: Run, learned: LearnedPoint, facts: ModelFacts, storage: Storage) -> None:
    """Model, pairs, start, scheduler and versions: the file is self-explanatory when it is copied elsewhere."""
    result = run(learned)
    theta = _theta(storage, learned)
    assert (theta.family, theta.start) == ("bns", "Euler on the uniform grid")
    assert (theta.model_digest, theta.pairs_digest) == (facts.digest, learned.run.train)
    assert (theta.prediction, theta.scheduler, theta.native_scheduler) == ("velocity", "cond_ot", "cond_ot")
    assert (theta.guidance_scale, theta.sigma0) == (1.0, 1.0)
    assert theta.validation_psnr_db == result.validation_psnr_db
    assert (
        theta.packages["torch"] == torch.__version__.partition("+")[0] or theta.packages["torch"] == torch.__version__
    )


def test_every_validated_iterate_is_kept(run: Run, learned: LearnedPoint, storage: Storage) -> None:
    """Iteration, PSNR and parameters, with the start first, so that another stopping criterion can be applied later."""
    result = run(learned)
    iterates = storage.read_json(f"points/{learned.key}/iterates.json")
    assert [[entry["iteration"], entry["psnr_db"]] for entry in iterates] == result.history
    assert len(iterates[0]["parameters"]) == 4 * (4 + 5) // 2 - 1


def test_validations_are_reported_with_the_best_so_far(run: Run, learned: LearnedPoint) -> None:
    """The search compares the running maximum; users see the curve of the validations themselves."""
    reported: list[dict[str, float]] = []
    result = run(_with(learned, iterations=10, validate_every=2, learning_rate=0.05), reported.append)
    assert [values["iteration"] for values in reported] == [0, 2, 4, 6, 8, 10]
    assert [values["validation_psnr_db"] for values in reported] == [psnr for _, psnr in result.history]
    assert [values["psnr_db"] for values in reported] == list(
        np.maximum.accumulate([values["validation_psnr_db"] for values in reported])
    )
    assert all("loss" in values for values in reported[1:])


@pytest.mark.parametrize("reports", [1, 2, 3])
def test_a_killed_trial_resumes_to_exactly_the_same_theta(
    run: Run,
    learned: LearnedPoint,
    storage: Storage,
    tmp_path: Any,
    context: TrialContext,
    pool: LocalPool,
    reports: int,
) -> None:
    """Killed after the start, in the middle or just before the end, it equals an undisturbed run bit for bit."""
    elsewhere = Storage.at(tmp_path / "undisturbed")
    undisturbed = run_point(learned, context, pool, elsewhere, lambda values: None)
    before: list[float] = []

    def kill(values: dict[str, float]) -> None:
        before.append(values["iteration"])
        if len(before) == reports:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(learned, kill)
    assert not ResultStore(storage, learned.key).is_complete()
    after: list[float] = []
    result = run(learned, lambda values: after.append(values["iteration"]))
    assert result == undisturbed
    for name in ("theta.json", "iterates.json", "result.json"):
        key = f"points/{learned.key}/{name}"
        assert storage.read(key) == elsewhere.read(key)
    assert before + after == [0, 10, 20]


def test_a_complete_point_is_not_executed_again(
    run: Run, learned: LearnedPoint, context: TrialContext, storage: Storage
) -> None:
    """Its result is read from the store; no request goes to a host."""

    class UnusedPool(Pool):
        def map(self, requests: Sequence[Any]) -> Any:
            pytest.fail("a request went to a host")

    first = run(learned)
    reported: list[dict[str, float]] = []
    again = run_point(learned, context, UnusedPool(), storage, reported.append)
    assert canonical_json(dataclasses.asdict(again)) == canonical_json(dataclasses.asdict(first))
    assert reported[0]["psnr_db"] == first.validation_psnr_db


@pytest.mark.parametrize("learning_rate", [1.0, 1e3, 1e12])
def test_a_diverged_run_publishes_its_start_and_is_marked_as_diverged(
    run: Run, learned: LearnedPoint, pool: LocalPool, storage: Storage, facts: ModelFacts, learning_rate: float
) -> None:
    """It never publishes a worse solver than its start, and never claims an improvement."""
    result = run(_with(learned, learning_rate=learning_rate))
    assert result.status == "diverged"
    assert result.metrics == result.start_metrics
    assert result.validation_psnr_db == result.start_validation_psnr_db
    solver = GridSolver(Euler(), 4, Grid()).to_ns(facts.scheduler)
    theta = _theta(storage, _with(learned, learning_rate=learning_rate)).solver
    torch.testing.assert_close(theta.flat(), solver.flat(), rtol=0, atol=1e-12)
    assert result.forwards > 0


def test_a_run_that_gets_worse_publishes_its_best_iterate(
    run: Run, learned: LearnedPoint, pool: LocalPool, storage: Storage
) -> None:
    """With a learning rate that is too large but does not diverge, the best validation counts, the start included."""
    point = _with(learned, learning_rate=0.1, decay="constant", validate_every=5)
    result = run(point)
    validations = [psnr for _, psnr in result.history]
    assert result.validation_psnr_db == max(validations)
    assert min(validations) > validations[0] - DIVERGENCE_DB or result.status == "diverged"
    assert _psnr(pool, _theta(storage, point), point.validation) == pytest.approx(max(validations), rel=1e-6)


def test_a_stopped_point_publishes_its_last_state(run: Run, learned: LearnedPoint, storage: Storage) -> None:
    """It is not trained further: its saved state becomes its result, marked as stopped."""
    point = _with(learned, iterations=40)

    def stop(values: dict[str, float]) -> None:
        if values["iteration"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(point, stop)
    ResultStore(storage, point.key).mark_stopped()
    result = run(point, lambda values: pytest.fail("training continued"))
    assert result.status == "stopped"
    assert [iteration for iteration, _ in result.history] == [0, 10]
    assert result.validation_psnr_db > (result.start_validation_psnr_db or math.inf)


def test_a_start_without_finite_samples_is_refused(
    run: Run, learned: LearnedPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be distilled from it; the error names the configuration key of the start."""
    monkeypatch.setattr(Host, "score", lambda host, **arguments: {"psnr": np.full(4, np.nan)})
    with pytest.raises(UserError, match=r"BNS nfe4 .* starts with validation samples that are not finite; choose"):
        run(learned)


def test_missing_training_pairs_are_an_error(run: Run, learned: LearnedPoint) -> None:
    """A trial makes no pairs; the error names the command that does."""
    with pytest.raises(StoreError, match=r"no complete pair store 0123 .*make it with `bespoke pairs`"):
        run(dataclasses.replace(learned, run=dataclasses.replace(learned.run, train="0123-4")))


def test_preconditioning_is_folded_into_theta(
    run: Run, learned: LearnedPoint, pool: LocalPool, storage: Storage
) -> None:
    """A theta distilled at sigma0 = 2 acts on the raw velocity: its samples reproduce the reported PSNR."""
    point = dataclasses.replace(learned, run=dataclasses.replace(learned.run, sigma0=2.0))
    result = run(point)
    assert _theta(storage, point).sigma0 == 2.0
    assert result.metrics["psnr_db"]["mean"] > (result.start_metrics or {})["psnr_db"]["mean"]
    assert _psnr(pool, _theta(storage, point), point.test) == pytest.approx(result.metrics["psnr_db"]["mean"], rel=1e-9)


def test_run_parameters_are_the_axes_of_the_sweep(
    learned: LearnedPoint, fixed: dict[tuple[str, str], FixedPoint]
) -> None:
    """They have the names of the fields; options and the optimiser's settings are included only if there are any."""
    fixed_parameters, learned_parameters = mlflow_parameters(fixed["euler", "common grid"]), mlflow_parameters(learned)
    assert fixed_parameters == {
        "family": "euler",
        "label": "Euler",
        "kind": "common grid",
        "nfe": 4,
        "guidance_scale": 1.0,
        "sigma0": 1.0,
        "seed": 0,
    }
    assert {"learning_rate", "iterations", "batch_size", "decay", "start"} <= set(learned_parameters)
    assert learned_parameters["start"] == "Euler, uniform"
    options = dataclasses.replace(fixed["euler", "common grid"], options={"b": 1, "a": 2})
    assert json.loads(mlflow_parameters(options)["options"]) == {"a": 2, "b": 1}


@pytest.mark.parametrize("forwards", [2, 1])
def test_forwards_with_guidance_are_counted_as_the_model_counts_them(
    forwards: int,
    config: ExperimentConfig,
    copied: Storage,
    host_settings: Callable[..., HostSettings],
    context: TrialContext,
) -> None:
    """Classifier-free guidance takes two per evaluation; a network conditioned on the scale, such as FLUX's, one."""
    guided = ExperimentConfig.model_validate({**config.model_dump(), "guidance_scale": [3.0]})
    context = dataclasses.replace(context, facts=dataclasses.replace(context.facts, forwards_with_guidance=forwards))
    specs = pair_specs(guided, context.facts)
    pool = LocalPool(Host(host_settings(copied)))
    ensure_pairs(copied, list(specs.values()), pool, wait=False, announce=lambda sentence: None)
    (point,) = learned_points(guided, specs, {(4, 3.0, 1.0): [EULER]}, CondOT())
    result = run_point(point, context, pool, copied, lambda values: None)
    assert result.backwards == forwards * 20 * 16 * 4
    assert result.metrics["psnr_db"]["mean"] > (result.start_metrics or {})["psnr_db"]["mean"]
    theta = to_numpy(_theta(copied, point).solver.flat())
    assert np.isfinite(theta).all()


def test_a_grid_on_which_a_family_does_not_work_is_skipped() -> None:
    """Times made equal by rounding give AB3 no finite weights. A point with no usable grid is refused."""
    family, scheduler = AdamsBashforth(3), CondOT()
    crowded, usable = Grid("warped", 40.0, 1.0), Grid()
    point = FixedPoint(
        family="adams_bashforth",
        options={"steps_back": 3},
        label="AB3",
        nfe=10,
        guidance_scale=1.0,
        sigma0=1.0,
        seed=0,
        validation="v",
        test="t",
        metrics=("psnr",),
        grids=(crowded, usable),
    )
    (candidate,) = _usable(point.grids, point, family, scheduler)
    assert candidate.choice == SolverChoice(
        family="adams_bashforth", options={"steps_back": 3}, label="AB3", grid=usable
    )
    with pytest.raises(UserError, match="works on none of its grids: the solver has no finite"):
        _usable([crowded], point, family, scheduler)


# ---- other methods, other grids -------------------------------------------------------------------------------------


def _by_lm(point: LearnedPoint, **settings: Any) -> LearnedPoint:
    common = {"iterations": 4, "batch_size": 48, "training_pairs": 48}
    run = dataclasses.replace(point.run, method=LevenbergMarquardt(**{**common, **settings}))
    return dataclasses.replace(point, run=run, validate_every=2)


def test_levenberg_marquardt_distils_without_a_backward_pass(run: Run, learned: LearnedPoint, storage: Storage) -> None:
    """Four iterations surpass twenty of Adam; their cost counts finite differences and trial steps."""
    by_adam, by_lm = run(learned), run(_by_lm(learned))
    assert by_lm.backwards == 0 < by_adam.backwards
    assert by_lm.metrics["psnr_db"]["mean"] > by_adam.metrics["psnr_db"]["mean"] + 1
    assert by_lm.start_metrics == by_adam.start_metrics
    assert [step for step, _ in by_lm.history] == [0, 2, 4]
    # Four iterations, each of 26 evaluations per pair at NFE 4 plus at least one trial step; three validations.
    assert by_lm.forwards >= 4 * 48 * (26 + 4) + 3 * 32 * 4
    assert _theta(storage, _by_lm(learned)).family == "bns"


def test_levenberg_marquardt_resumes_after_an_interruption(
    learned: LearnedPoint, context: TrialContext, pool: LocalPool, storage: Storage
) -> None:
    """As with Adam, the result is the same bit for bit."""
    point = _by_lm(learned)
    reported: list[dict[str, float]] = []

    def interrupt(values: dict[str, float]) -> None:
        reported.append(values)
        if len(reported) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_point(point, context, pool, storage, interrupt)
    resumed = run_point(point, context, pool, storage, lambda values: None)
    other = Storage.at(f"{storage.root}-other")
    undisturbed = run_point(point, context, pool, other, lambda values: None)
    assert resumed.metrics == undisturbed.metrics
    assert resumed.history == undisturbed.history


@pytest.mark.parametrize("by_lm", [False, True], ids=["adam", "levenberg_marquardt"])
def test_a_data_parallel_trial_gives_the_same_theta(
    learned: LearnedPoint, context: TrialContext, pool: LocalPool, storage: Storage, by_lm: bool
) -> None:
    """Hosts return sums over blocks, which are added in order: bit for bit the result of a single host."""
    point = _by_lm(learned) if by_lm else _with(learned, validate_every=2, iterations=4)
    parallel = dataclasses.replace(point, data_parallel=True)
    for each in (point, parallel):
        run_point(each, context, pool, storage, lambda values: None)
    assert _theta(storage, point).digest == _theta(storage, parallel).digest


def test_a_gits_grid_is_a_candidate(
    experiment: dict[str, Any], context: TrialContext, copied: Storage, host_settings: Callable[..., HostSettings]
) -> None:
    """GITS uses the training trajectories (dynamic programming); Euler is better on its grid than on a uniform one."""
    experiment["fixed"] = ["euler", {"family": "euler", "grid": "gits", "search": False}]
    config = parse_config({**experiment, "learned": [], "grid_search": None}, "gits")
    config.check()
    specs = pair_specs(config, context.facts)
    assert specs[PairKey("train", 1.0, 0)].trajectory
    pool = LocalPool(Host(host_settings(copied)))
    ensure_pairs(copied, list(specs.values()), pool, wait=False, announce=lambda sentence: None)
    plain, searched = fixed_points(config, specs)
    assert (plain.label, searched.label, searched.kind) == ("Euler", "Euler (GITS)", "common grid")
    assert (plain.train, searched.train) == (None, specs[PairKey("train", 1.0, 0)].name)
    on_uniform, on_gits = (run_point(point, context, pool, copied, lambda values: None) for point in (plain, searched))
    chosen = Grid(**(on_gits.chosen_grid or {}))
    assert chosen.kind == "given"
    assert len(chosen.times(4, CondOT())) == 5
    assert on_gits.metrics["psnr_db"]["mean"] > on_uniform.metrics["psnr_db"]["mean"]
    # GITS evaluates the model at 61 knots of all 48 trajectories, without the last knot.
    assert (on_uniform.forwards, on_gits.forwards) == (0, 60 * 48)


def test_a_pair_set_without_trajectories_is_refused_for_gits(pool: LocalPool, learned: LearnedPoint) -> None:
    """A grid is computed from trajectories only."""
    settings = {"gamma": 1.0, "loss": "error", "trajectories": 8, "knots": 21}
    with pytest.raises(StoreError, match=r"pair store \S+ holds no trajectories; make it with `bespoke pairs`"):
        pool.call(Request.of(HostProtocol.gits_grid, pairs=learned.run.train, steps=4, **settings))


def test_a_least_squares_start_is_fitted_to_the_trajectories(
    experiment: dict[str, Any], context: TrialContext, copied: Storage, host_settings: Callable[..., HostSettings]
) -> None:
    """Without optimisation it is already much better than Euler; distillation improves on it further."""
    learned = {"family": "bns", "method": "levenberg_marquardt", "start": ["least_squares", "euler"]}
    length = {"iterations": 2, "batch_size": 48, "validate_every": 1}
    config = parse_config({**experiment, "fixed": [], "learned": [learned | length]}, "fitted")
    config.check()
    specs = pair_specs(config, context.facts)
    pool = LocalPool(Host(host_settings(copied)))
    ensure_pairs(copied, list(specs.values()), pool, wait=False, announce=lambda sentence: None)
    points = learned_points(config, specs, {}, CondOT())
    fitted, euler = (run_point(point, context, pool, copied, lambda values: None) for point in points)
    assert fitted.grid == "from least squares, uniform"
    assert (fitted.start_metrics or {})["psnr_db"]["mean"] > (euler.start_metrics or {})["psnr_db"]["mean"] + 3
    assert fitted.metrics["psnr_db"]["mean"] > (fitted.start_metrics or {})["psnr_db"]["mean"]
    # Everything but the start is the same, so the difference is the cost of the fit: n evaluations per training pair.
    alone = _with(points[0], points[0].validate_every, iterations=1)
    from_euler = _with(points[1], points[1].validate_every, iterations=1)
    spent = [run_point(point, context, pool, copied, lambda values: None).forwards for point in (alone, from_euler)]
    assert spent[0] - spent[1] == 48 * 4


def test_a_cost_that_cannot_be_written_loses_no_result(
    run: Run,
    fixed: dict[tuple[str, str], FixedPoint],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It costs a sentence."""

    def fail(*arguments: Any) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr("sweeps.points.execute.save_costs", fail)
    result = run(fixed["euler", "common grid"])
    assert result.status == "finished"
    assert "is not recorded: no space left" in capsys.readouterr().err
