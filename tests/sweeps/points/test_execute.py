"""What one point takes: it becomes a result, whatever interrupts it, and never a worse one than it started from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey, pair_specs
from orchestrator.config.reading import parse_config
from orchestrator.errors import StoreError, UserError
from orchestrator.hosts import distillation
from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Pool
from orchestrator.results.scoring import evaluate
from orchestrator.results.store import Result, ResultStore
from orchestrator.storage import Storage, canonical_json
from solvers.distil.adam import DIVERGENCE_DB
from solvers.distil.levenberg_marquardt import LMSettings
from solvers.families import GridSolver
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.schedulers import CondOT
from solvers.theta import ThetaArtifact
from sweeps.points import execute as run_point_module
from sweeps.points.execute import TrialContext, _usable, parameters, run_point
from sweeps.space import Point, SolverChoice, fixed_points, learned_points
from sweeps.sweep import best_choices

EULER = SolverChoice(family="euler", options={}, label="Euler", grid=Grid())

Run = Callable[..., Result]


@pytest.fixture
def context(facts: ModelFacts, storage: Storage) -> TrialContext:
    """A trial's surroundings, without Ray and MLflow."""
    return TrialContext(
        storage=storage.root,
        tracking_uri="",
        experiment_id="",
        parent_run_id="",
        pool="",
        hosts=1,
        facts=facts,
        validation_count=32,
    )


@pytest.fixture
def run(context: TrialContext, pool: LocalPool, storage: Storage) -> Run:
    """Runs a point on the host in this process."""

    def run(point: Point, report: Callable[[dict[str, float]], None] = lambda values: None) -> Result:
        return run_point(point, context, pool, storage, report)

    return run


@pytest.fixture
def fixed(config: ExperimentConfig, specs: dict[PairKey, PairSpec]) -> dict[tuple[str, str], Point]:
    """The small experiment's fixed points, by family and kind."""
    return {(point.family, point.kind): point for point in fixed_points(config, specs)}


@pytest.fixture
def learned(config: ExperimentConfig, specs: dict[PairKey, PairSpec]) -> Point:
    """Its distillation, from Euler on the uniform grid: 20 iterations, validated every 10."""
    (point,) = learned_points(config, specs, {(4, 1.0, 1.0): [EULER]}, CondOT())
    return point


def _with(point: Point, validate_every: int = 10, **settings: Any) -> Point:
    assert point.settings is not None
    changed = dataclasses.replace(point.settings, **settings)
    return dataclasses.replace(point, settings=changed, validate_every=validate_every)


def _theta(storage: Storage, point: Point) -> ThetaArtifact:
    return ThetaArtifact.from_json(ResultStore(storage, point.key).read_theta())


def _psnr(pool: Pool, artifact: ThetaArtifact, pairs: str) -> float:
    return evaluate(pool, artifact.solver, pairs, ["psnr"])["psnr_db"]["mean"]


# ---- fixed families -------------------------------------------------------------------------------------------------


def test_a_fixed_family_on_the_common_grid_is_scored_as_it_is(
    run: Run, fixed: dict[tuple[str, str], Point], pool: LocalPool, facts: ModelFacts, storage: Storage
) -> None:
    """Nothing is searched and nothing is spent; the numbers are those of the solver itself on the test pairs."""
    point = fixed["midpoint", "common grid"]
    result = run(point)
    solver = GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler)
    assert result.metrics == evaluate(pool, solver, point.test, point.metrics)
    assert set(result.metrics) == {"psnr_db", "snr_db", "rmse"}
    assert (result.kind, result.grid, result.status, result.forwards) == ("common grid", "uniform", "finished", 0)
    torch.testing.assert_close(_theta(storage, point).solver.flat(), solver.flat(), rtol=0, atol=0)


def test_the_best_grid_is_the_one_of_highest_psnr_on_validation_pairs(
    run: Run, fixed: dict[tuple[str, str], Point], pool: LocalPool, facts: ModelFacts, storage: Storage
) -> None:
    """Of all candidates, scored one by one; test pairs have no part in the choice."""
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


def test_a_large_search_scores_all_grids_on_a_part_and_the_finalists_on_all(
    run: Run, fixed: dict[tuple[str, str], Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it cost is counted: every candidate on the search pairs, three finalists on all validation pairs."""
    point = fixed["euler", "best grid"]
    assert len(point.grids) == 4
    result = run(point)
    assert result.forwards == (4 * 16 + 3 * 32) * 4
    monkeypatch.setattr(run_point_module, "FINALISTS", 4)
    assert run(dataclasses.replace(point, metrics=("psnr",))).forwards == 4 * 32 * 4


def test_the_best_grid_is_never_worse_on_validation_than_the_common_one(
    run: Run, fixed: dict[tuple[str, str], Point]
) -> None:
    """The common grid is among the candidates."""
    for family in ("euler", "midpoint"):
        best, common = (run(fixed[family, f"{kind} grid"]).validation_psnr_db for kind in ("best", "common"))
        assert best >= common


def test_a_distillation_starts_from_the_best_on_validation_pairs(run: Run, fixed: dict[tuple[str, str], Point]) -> None:
    """Of all families and grids of its NFE, guidance scale and sigma0."""
    results = {point.key: run(point) for point in fixed.values()}
    ((cell, choices),) = best_choices(list(fixed.values()), results).items()
    ranked = sorted(results.values(), key=lambda result: -result.validation_psnr_db)
    assert cell == (4, 1.0, 1.0)
    assert [(c.label, c.grid) for c in choices] == [(r.label, Grid(**(r.chosen_grid or {}))) for r in ranked]
    del results[ranked[0].key]
    ((_, rest),) = best_choices(list(fixed.values()), results).items()
    assert rest == choices[1:]


# ---- learned families -----------------------------------------------------------------------------------------------


def test_distillation_improves_on_its_start(run: Run, learned: Point, pool: LocalPool, storage: Storage) -> None:
    """On fresh noise; the start, measured on the same pairs, is Euler itself."""
    result = run(learned)
    assert result.start_metrics is not None
    assert result.metrics["psnr_db"]["mean"] > result.start_metrics["psnr_db"]["mean"] + 1
    assert result.validation_psnr_db > (result.start_validation_psnr_db or math.inf) + 1
    assert (result.status, result.kind, result.grid) == ("finished", "learned", "from Euler, uniform")
    assert [entry[0] for entry in result.history] == [0, 10, 20]
    assert _psnr(pool, _theta(storage, learned), learned.test) == pytest.approx(
        result.metrics["psnr_db"]["mean"], rel=1e-9
    )


def test_what_a_distillation_cost_is_counted(run: Run, learned: Point) -> None:
    """Forwards and backwards of its steps, and three validations; every evaluation at 4 NFE, unguided."""
    result = run(learned)
    assert result.backwards == 20 * 16 * 4
    assert result.forwards == (20 * 16 + 3 * 32) * 4


def test_theta_says_where_it_comes_from(run: Run, learned: Point, facts: ModelFacts, storage: Storage) -> None:
    """Model, pairs, start, scheduler, versions: the file that a user takes home explains itself."""
    result = run(learned)
    theta = _theta(storage, learned)
    assert (theta.family, theta.start) == ("bns", "Euler on the uniform grid")
    assert (theta.model_digest, theta.pairs_digest) == (facts.digest, learned.train)
    assert (theta.prediction, theta.scheduler, theta.native_scheduler) == ("velocity", "cond_ot", "cond_ot")
    assert (theta.guidance_scale, theta.sigma0) == (1.0, 1.0)
    assert theta.validation_psnr_db == result.validation_psnr_db
    assert (
        theta.packages["torch"] == torch.__version__.partition("+")[0] or theta.packages["torch"] == torch.__version__
    )


def test_every_validated_iterate_is_kept(run: Run, learned: Point, storage: Storage) -> None:
    """Another stopping criterion can be applied later: iteration, PSNR and parameters, the start first."""
    result = run(learned)
    iterates = storage.read_json(f"points/{learned.key}/iterates.json")
    assert [[entry["iteration"], entry["psnr_db"]] for entry in iterates] == result.history
    assert len(iterates[0]["parameters"]) == 4 * (4 + 5) // 2 - 1


def test_validations_are_reported_with_the_best_so_far(run: Run, learned: Point) -> None:
    """What a search compares never falls; the curve that a user sees is the validation itself."""
    told: list[dict[str, float]] = []
    result = run(_with(learned, iterations=10, validate_every=2, learning_rate=0.05), told.append)
    assert [values["iteration"] for values in told] == [0, 2, 4, 6, 8, 10]
    assert [values["validation_psnr_db"] for values in told] == [psnr for _, psnr in result.history]
    assert [values["psnr_db"] for values in told] == list(
        np.maximum.accumulate([values["validation_psnr_db"] for values in told])
    )
    assert all("loss" in values for values in told[1:])


@pytest.mark.parametrize("reports", [1, 2, 3])
def test_a_trial_that_was_killed_goes_on_to_exactly_the_same_theta(
    run: Run,
    learned: Point,
    storage: Storage,
    tmp_path: Any,
    context: TrialContext,
    pool: LocalPool,
    reports: int,
) -> None:
    """After the start, in the middle or just before the end: equal to an undisturbed run in every bit."""
    elsewhere = Storage.at(tmp_path / "undisturbed")
    undisturbed = run_point(learned, context, pool, elsewhere, lambda values: None)
    told: list[float] = []

    def killed(values: dict[str, float]) -> None:
        told.append(values["iteration"])
        if len(told) == reports:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(learned, killed)
    assert not ResultStore(storage, learned.key).is_complete()
    again: list[float] = []
    result = run(learned, lambda values: again.append(values["iteration"]))
    assert result == undisturbed
    for name in ("theta.json", "iterates.json", "result.json"):
        key = f"points/{learned.key}/{name}"
        assert storage.read(key) == elsewhere.read(key)
    assert told + again == [0, 10, 20]


def test_a_complete_point_is_not_computed_again(
    run: Run, learned: Point, context: TrialContext, storage: Storage
) -> None:
    """Its result is read; hosts are not asked."""

    class Nobody(Pool):
        def map(self, requests: Sequence[Any]) -> Any:
            pytest.fail("a host was asked")

    first = run(learned)
    told: list[dict[str, float]] = []
    again = run_point(learned, context, Nobody(), storage, told.append)
    assert canonical_json(dataclasses.asdict(again)) == canonical_json(dataclasses.asdict(first))
    assert told[0]["psnr_db"] == first.validation_psnr_db


@pytest.mark.parametrize("learning_rate", [1.0, 1e3, 1e12])
def test_a_run_that_diverges_publishes_its_start_and_says_so(
    run: Run, learned: Point, pool: LocalPool, storage: Storage, facts: ModelFacts, learning_rate: float
) -> None:
    """Never a worse solver than it began with, and never as an improvement."""
    result = run(_with(learned, learning_rate=learning_rate))
    assert result.status == "diverged"
    assert result.metrics == result.start_metrics
    assert result.validation_psnr_db == result.start_validation_psnr_db
    solver = GridSolver(Euler(), 4, Grid()).to_ns(facts.scheduler)
    theta = _theta(storage, _with(learned, learning_rate=learning_rate)).solver
    torch.testing.assert_close(theta.flat(), solver.flat(), rtol=0, atol=1e-12)
    assert result.forwards > 0


def test_a_run_that_gets_worse_publishes_its_best_iterate(
    run: Run, learned: Point, pool: LocalPool, storage: Storage
) -> None:
    """Too large a rate that does not run away: what counts is the best validation, start included."""
    point = _with(learned, learning_rate=0.1, decay="constant", validate_every=5)
    result = run(point)
    validations = [psnr for _, psnr in result.history]
    assert result.validation_psnr_db == max(validations)
    assert min(validations) > validations[0] - DIVERGENCE_DB or result.status == "diverged"
    assert _psnr(pool, _theta(storage, point), point.validation) == pytest.approx(max(validations), rel=1e-6)


def test_a_point_that_the_search_stopped_publishes_what_it_has(run: Run, learned: Point, storage: Storage) -> None:
    """It is not trained on: the state it had becomes its result, marked as stopped."""
    point = _with(learned, iterations=40)

    def stop(values: dict[str, float]) -> None:
        if values["iteration"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(point, stop)
    ResultStore(storage, point.key).mark_stopped()
    result = run(point, lambda values: pytest.fail("went on"))
    assert result.status == "stopped"
    assert [iteration for iteration, _ in result.history] == [0, 10]
    assert result.validation_psnr_db > (result.start_validation_psnr_db or math.inf)


def test_a_start_without_finite_samples_is_told(run: Run, learned: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be distilled from it; the key that names the start is named."""
    monkeypatch.setattr(distillation, "mean_psnr", lambda solver, pairs, ask: math.nan)
    with pytest.raises(UserError, match=r"the start of BNS nfe4 .* gives no finite samples; choose another 'start'"):
        run(learned)


def test_training_pairs_that_are_not_there_are_told(run: Run, learned: Point) -> None:
    """A trial makes no pairs: the command that does is named."""
    with pytest.raises(StoreError, match=r"no complete pair store 0123 .*make it with `bespoke pairs`"):
        run(dataclasses.replace(learned, train="0123"))


def test_preconditioning_is_folded_into_theta(run: Run, learned: Point, pool: LocalPool, storage: Storage) -> None:
    """A theta distilled at sigma0 = 2 acts on the raw velocity: its own samples have the PSNR that is reported."""
    point = dataclasses.replace(learned, sigma0=2.0)
    result = run(point)
    assert _theta(storage, point).sigma0 == 2.0
    assert result.metrics["psnr_db"]["mean"] > (result.start_metrics or {})["psnr_db"]["mean"]
    assert _psnr(pool, _theta(storage, point), point.test) == pytest.approx(result.metrics["psnr_db"]["mean"], rel=1e-9)


def test_parameters_of_a_run_are_what_users_sort_by(learned: Point, fixed: dict[tuple[str, str], Point]) -> None:
    """Axes of the sweep by the field's names; options and the optimiser's settings only where there are some."""
    plain, found = parameters(fixed["euler", "common grid"]), parameters(learned)
    assert plain == {
        "family": "euler",
        "label": "Euler",
        "kind": "common grid",
        "nfe": 4,
        "guidance_scale": 1.0,
        "sigma0": 1.0,
        "seed": 0,
    }
    assert {"learning_rate", "iterations", "batch_size", "decay", "start"} <= set(found)
    assert found["start"] == "Euler, uniform"
    options = dataclasses.replace(fixed["euler", "common grid"], options={"b": 1, "a": 2})
    assert json.loads(parameters(options)["options"]) == {"a": 2, "b": 1}


def test_with_guidance_forwards_count_twice(
    config: ExperimentConfig, copied: Storage, host_settings: Callable[..., HostSettings], context: TrialContext
) -> None:
    """One evaluation of a guided model is two forwards; NFE is the same."""
    guided = ExperimentConfig.model_validate({**config.model_dump(), "guidance_scale": [3.0]})
    specs = pair_specs(guided, context.facts)
    pool = LocalPool(Host(host_settings(copied)))
    ensure_pairs(copied, list(specs.values()), pool, wait=False, note=lambda sentence: None)
    (point,) = learned_points(guided, specs, {(4, 3.0, 1.0): [EULER]}, CondOT())
    result = run_point(point, context, pool, copied, lambda values: None)
    assert result.backwards == 2 * 20 * 16 * 4
    assert result.metrics["psnr_db"]["mean"] > (result.start_metrics or {})["psnr_db"]["mean"]
    theta = to_numpy(_theta(copied, point).solver.flat())
    assert np.isfinite(theta).all()


def test_a_grid_on_which_a_family_does_not_work_is_left_out() -> None:
    """Times that rounding makes equal give AB3 no weights: it is skipped, and a point with no other is refused."""
    family, scheduler = AdamsBashforth(3), CondOT()
    crowded, usable = Grid("warped", 40.0, 1.0), Grid()
    point = Point(
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
    grids, solvers = _usable(point.grids, point, family, scheduler)
    assert grids == [usable]
    assert len(solvers) == 1
    with pytest.raises(UserError, match="works on none of its grids: the solver has no finite"):
        _usable([crowded], point, family, scheduler)


# ---- other methods, other grids -------------------------------------------------------------------------------------


def _by_lm(point: Point, **settings: Any) -> Point:
    common = {"iterations": 4, "batch_size": 48, "training_pairs": 48}
    return dataclasses.replace(
        point, method="levenberg_marquardt", settings=LMSettings(**{**common, **settings}), validate_every=2
    )


def test_levenberg_marquardt_distils_without_a_backward_pass(run: Run, learned: Point, storage: Storage) -> None:
    """Four iterations pass what twenty of Adam do, and what they cost is counted: differences, trials of steps."""
    by_adam, by_lm = run(learned), run(_by_lm(learned))
    assert by_lm.backwards == 0 < by_adam.backwards
    assert by_lm.metrics["psnr_db"]["mean"] > by_adam.metrics["psnr_db"]["mean"] + 1
    assert by_lm.start_metrics == by_adam.start_metrics
    assert [step for step, _ in by_lm.history] == [0, 2, 4]
    # Four iterations of 26 evaluations a pair at NFE 4 and at least one trial step each; three validations.
    assert by_lm.forwards >= 4 * 48 * (26 + 4) + 3 * 32 * 4
    assert _theta(storage, _by_lm(learned)).family == "bns"


def test_levenberg_marquardt_goes_on_from_where_it_was_interrupted(
    learned: Point, context: TrialContext, pool: LocalPool, storage: Storage
) -> None:
    """The same result to the last bit, as with Adam."""
    point = _by_lm(learned)
    seen: list[dict[str, float]] = []

    def interrupt(values: dict[str, float]) -> None:
        seen.append(values)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_point(point, context, pool, storage, interrupt)
    resumed = run_point(point, context, pool, storage, lambda values: None)
    other = Storage.at(f"{storage.root}-other")
    whole = run_point(point, context, pool, other, lambda values: None)
    assert resumed.metrics == whole.metrics
    assert resumed.history == whole.history


@pytest.mark.parametrize("by_lm", [False, True], ids=["adam", "levenberg_marquardt"])
def test_a_trial_that_splits_its_batches_over_the_pool_finds_the_same_theta(
    learned: Point, context: TrialContext, pool: LocalPool, storage: Storage, by_lm: bool
) -> None:
    """Data parallelism asks for sums over blocks and adds them in order: bit for bit what one host does alone."""
    point = _by_lm(learned) if by_lm else _with(learned, validate_every=2, iterations=4)
    together = dataclasses.replace(point, data_parallel=True)
    for each in (point, together):
        run_point(each, context, pool, storage, lambda values: None)
    assert _theta(storage, point).digest == _theta(storage, together).digest


def test_a_grid_found_by_dynamic_programming_is_one_of_the_candidates(
    experiment: dict[str, Any], context: TrialContext, copied: Storage, host_settings: Callable[..., HostSettings]
) -> None:
    """GITS looks at the training pairs' trajectories; on its grid Euler does better than on the uniform one."""
    experiment["fixed"] = ["euler", {"family": "euler", "grid": "gits", "search": False}]
    config = parse_config({**experiment, "learned": [], "grid_search": None}, "gits")
    config.check()
    specs = pair_specs(config, context.facts)
    assert specs[PairKey("train", 1.0, 0)].trajectory
    pool = LocalPool(Host(host_settings(copied)))
    ensure_pairs(copied, list(specs.values()), pool, wait=False, note=lambda sentence: None)
    plain, searched = fixed_points(config, specs)
    assert (plain.label, searched.label, searched.kind) == ("Euler", "Euler (GITS)", "common grid")
    assert (plain.train, searched.train) == (None, specs[PairKey("train", 1.0, 0)].digest)
    on_uniform, on_gits = (run_point(point, context, pool, copied, lambda values: None) for point in (plain, searched))
    chosen = Grid(**(on_gits.chosen_grid or {}))
    assert chosen.kind == "given"
    assert len(chosen.times(4, CondOT())) == 5
    assert on_gits.metrics["psnr_db"]["mean"] > on_uniform.metrics["psnr_db"]["mean"]
    assert (on_uniform.forwards, on_gits.forwards) == (0, 60 * 48)  # 61 knots of all 48 trajectories, but the last


def test_trajectories_that_were_not_kept_are_told(pool: LocalPool, learned: Point) -> None:
    """A pair store without them cannot give a grid."""
    with pytest.raises(StoreError, match=r"pair store \w+ holds no trajectories; make it with `bespoke pairs`"):
        pool.call("gits_grid", pairs=learned.train, steps=4, gamma=1.0, loss="error", trajectories=8, knots=21)


def test_a_least_squares_start_is_fitted_to_the_trajectories(
    experiment: dict[str, Any], context: TrialContext, copied: Storage, host_settings: Callable[..., HostSettings]
) -> None:
    """No optimisation, and already better than every solver on its grid; distillation goes on from there."""
    learned = {"family": "bns", "method": "levenberg_marquardt", "start": ["least_squares", "euler"], "iterations": 2}
    config = parse_config({**experiment, "fixed": [], "learned": [{**learned, "validate_every": 1}]}, "fitted")
    config.check()
    specs = pair_specs(config, context.facts)
    pool = LocalPool(Host(host_settings(copied)))
    ensure_pairs(copied, list(specs.values()), pool, wait=False, note=lambda sentence: None)
    points = learned_points(config, specs, {}, CondOT())
    fitted, euler = (run_point(point, context, pool, copied, lambda values: None) for point in points)
    assert fitted.grid == "from least squares, uniform"
    assert (fitted.start_metrics or {})["psnr_db"]["mean"] > (euler.start_metrics or {})["psnr_db"]["mean"] + 3
    assert fitted.metrics["psnr_db"]["mean"] > (fitted.start_metrics or {})["psnr_db"]["mean"]
    # One iteration less of nothing but validations: what is left besides is the fit, n evaluations a training pair.
    alone = dataclasses.replace(points[0], settings=dataclasses.replace(points[0].settings, iterations=1))
    from_euler = dataclasses.replace(points[1], settings=alone.settings)
    spent = [run_point(point, context, pool, copied, lambda values: None).forwards for point in (alone, from_euler)]
    assert spent[0] - spent[1] == 48 * 4
