"""Computes one point, from start to result. Holds only theta and optimiser state; hosts do the heavy work."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.config.solvers import LEAST_SQUARES
from orchestrator.cost import Cost, Ledger, save_costs, total
from orchestrator.errors import UserError
from orchestrator.hosts.distillation import advance, to_numpy, validate
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.runs import State, sets_of
from orchestrator.importing import find_modules_in
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs.spec import split_name
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import Pool, Request
from orchestrator.progress import note
from orchestrator.results.scoring import evaluate
from orchestrator.results.store import Result, ResultStore
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import Tracker
from orchestrator.tracking.records import write_run
from solvers.families import Family, GridSolver, LearnableFamily
from solvers.families.bns import BNS
from solvers.grids import Grid
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler
from solvers.theta import ThetaArtifact
from sweeps.artifact import theta_artifact
from sweeps.point import AnyPoint, FixedPoint, LearnedPoint, SolverChoice
from sweeps.points.grid_search import full_search, raced_search
from sweeps.points.trial import Report
from sweeps.race import Candidate

SECONDS = "seconds"
"""Key of the wall time so far in a stored state."""


@dataclass(frozen=True, kw_only=True)
class TrialContext:
    """Addresses and facts that a trial needs. Paths are absolute, since a trial runs in another directory.

    Attributes:
        storage: Storage root.
        tracking_uri: MLflow store.
        experiment_id, parent_run_id: MLflow ids.
        pool: Name of the pool.
        hosts: Number of hosts in the pool.
        facts: Facts of the model.
        checkpoint: Whether hosts compute activations again in the backward pass.
    """

    storage: str = field(repr=False)
    tracking_uri: str = field(repr=False)
    experiment_id: str
    parent_run_id: str
    pool: str
    hosts: int
    facts: ModelFacts
    checkpoint: bool = False


def run_trial(point: AnyPoint, context: TrialContext, report: Report) -> None:
    """Compute a point and log it to its MLflow run."""
    find_modules_in(context.facts.code)
    storage = Storage.at(context.storage)
    log = Tracker(context.tracking_uri).trial_run(
        context.experiment_id, context.parent_run_id, point.key, point.name, mlflow_parameters(point)
    )
    pool = RayPool.attach(context.pool, context.hosts)

    def log_and_report(values: dict[str, float]) -> None:
        # The run's psnr_db is that of the test set, logged once at the end, so the curve needs a different name.
        curve = {name: value for name, value in values.items() if name in ("validation_psnr_db", "loss")}
        log.metrics(curve, step=int(values["iteration"]))
        report(values)

    result = run_point(point, context, pool, storage, log_and_report)
    write_run(log, result, ResultStore(storage, point.key))


def run_point(point: AnyPoint, context: TrialContext, pool: Pool, storage: Storage, report: Report) -> Result:
    """Compute the result of a point, resuming from the state of an earlier attempt."""
    store = ResultStore(storage, point.key)
    if store.is_complete():
        result = stored_result(store, point)
        report({"iteration": float(len(result.history)), "psnr_db": result.validation_psnr_db})
        return result
    if isinstance(point, FixedPoint):
        return _run_fixed(point, context, pool, store, report)
    return _run_learned(point, context, pool, store, report)


def stored_result(store: ResultStore, point: AnyPoint) -> Result:
    """The stored result of a point under the point's current display names, which are not part of its key."""
    result = store.load()
    shown = _shown(point)
    if isinstance(point, LearnedPoint):
        shown["grid"] = _origin(point)
    return replace(result, **shown)


def _shown(point: AnyPoint) -> dict[str, Any]:
    """The fields of a result that follow from its point."""
    return {
        "key": point.key,
        "point": point.to_dict(),
        "name": point.name,
        "kind": point.kind,
        "label": point.label,
    }


def _origin(point: LearnedPoint) -> str:
    return f"from {point.start.label}, {point.start.grid.label}"


def mlflow_parameters(point: AnyPoint) -> dict[str, Any]:
    """A point as MLflow parameters, by which users sort and filter."""
    values: dict[str, Any] = {
        "family": point.family,
        "label": point.label,
        "kind": point.kind,
        "nfe": point.nfe,
        "guidance_scale": point.guidance_scale,
        "sigma0": point.sigma0,
        "seed": point.seed,
    }
    if point.options:
        values["options"] = json.dumps(point.options, sort_keys=True)
    if isinstance(point, LearnedPoint):
        method = point.run.method
        values |= {
            "start": f"{point.start.label}, {point.start.grid.label}",
            "method": method.name,
            "objective": point.run.objective,
            "iterations": method.iterations,
            "batch_size": method.batch_size,
            **{name: getattr(method, name) for name in method.logged},
        }
    return values


# ---- fixed families ---------------------------------------------------------------------------------------------


def _run_fixed(point: FixedPoint, context: TrialContext, pool: Pool, store: ResultStore, report: Report) -> Result:
    """Choose the best candidate grid on the validation pairs and measure it on the test pairs."""
    family = plugins.build("families", point.family, point.options)
    scheduler = context.facts.scheduler
    ledger = Ledger(context.facts.forwards_per_evaluation(point.guidance_scale))
    gits = [_gits_grid(settings, point, family.steps(point.nfe), pool) for settings in point.gits]
    ledger.lap("grid search", sum(spent for _, spent in gits))
    candidates = _usable([*point.grids, *(grid for grid, _ in gits)], point, family, scheduler)
    search = raced_search if point.race else full_search
    winner, psnr, evaluations = search(candidates, point.validation, point.search_pairs, pool)
    if math.isinf(psnr):
        raise UserError(
            f"{point.name} gives validation samples that are not finite on each of its grids; leave it out or change "
            f"grid_search"
        )
    grid, solver = winner.choice.grid, winner.solver
    ledger.lap("grid search" if len(candidates) > 1 else "validation", evaluations)
    report({"iteration": 1.0, "psnr_db": psnr, "validation_psnr_db": psnr})
    metrics = evaluate(pool, solver, point.test, point.metrics)
    ledger.lap("scoring", split_name(point.test)[1] * point.nfe)
    result = Result(
        **_shown(point),
        grid=grid.label,
        status="finished",
        validation_psnr_db=psnr,
        metrics=metrics,
        forwards=ledger.costs["grid search"].forwards,
        chosen_grid=asdict(grid),
    )
    _record_costs(store, ledger)
    store.save(result, _artifact(point, context, solver, psnr, pool, start=None).to_json(), iterates=[])
    return result


def _gits_grid(settings: dict[str, Any], point: FixedPoint, steps: int, pool: Pool) -> tuple[Grid, int]:
    """The grid that GITS computes from the training pairs, and the velocity evaluations it used."""
    assert point.train is not None
    times, evaluations = pool.call(Request.of(HostProtocol.gits_grid, pairs=point.train, steps=steps, **settings))
    return Grid("given", listed=tuple(times.tolist())), evaluations


def _usable(grids: Sequence[Grid], point: FixedPoint, family: Family, scheduler: Scheduler) -> list[Candidate]:
    """The family's solvers on those of these grids on which it has a finite one."""
    candidates, refusals = [], []
    for grid in grids:
        choice = SolverChoice(family=point.family, options=point.options, label=point.label, grid=grid)
        try:
            solver = GridSolver(family, point.nfe, grid, point.sigma0).to_ns(scheduler)
        except ValueError as error:  # steps indistinguishably close, or a query at an infinite velocity
            refusals.append(str(error))
        else:
            candidates.append(Candidate(choice=choice, solver=solver))
    if not candidates:
        raise UserError(f"{point.name} works on none of its grids: {refusals[0]}")
    return candidates


# ---- learned families -------------------------------------------------------------------------------------------


def _run_learned(point: LearnedPoint, context: TrialContext, pool: Pool, store: ResultStore, report: Report) -> Result:
    """Distil from the point's start. The result is the best validated iterate, so it is never worse than the start."""
    run = point.run
    family, scheduler = run.build(), context.facts.scheduler
    ledger = Ledger(context.facts.forwards_per_evaluation(point.guidance_scale))
    saved = store.load_state()
    if saved:
        ledger.add("distillation", 0, saved.pop(SECONDS, None))
    parameters, start = _start(point, family, scheduler, pool)

    def keep(state: State) -> None:
        ledger.lap("distillation")
        store.save_state(asdict(state) | {SECONDS: ledger.costs["distillation"].seconds})
        last = state.validated[-1]
        values = {
            "iteration": float(state.iteration),
            "psnr_db": state.best["psnr_db"],
            # A PSNR that is not finite is not in state.validated.
            "validation_psnr_db": last["psnr_db"] if last["iteration"] == state.iteration else math.nan,
        }
        report(values if state.loss is None else values | {"loss": state.loss})

    if saved:
        state = run.method.state_type(**saved)
    else:
        state = validate(run, run.method.begin(parameters), point.validation, scheduler, pool.gather)
        if not state.validated:
            raise UserError(f"{point.name} starts with validation samples that are not finite; choose another 'start'")
        keep(state)
    while state.status == "running":
        if store.is_stopped():
            state = replace(state, status="stopped")
            break
        if point.data_parallel:
            state = advance(run, state, point.validate_every, scheduler, pool.gather, point.validation)
        else:
            step = Request.of(
                HostProtocol.advance, run=run, state=state, steps=point.validate_every, validation=point.validation
            )
            state = pool.call(step.with_batch_key(run.batch_key(point.nfe, point.guidance_scale)))
        keep(state)

    best = state.best
    solver = run.solver(best["parameters"], scheduler)
    _add_passes(ledger, point, state)
    spent = total(ledger.costs.values())
    if context.checkpoint:  # the evaluations of a gradient are computed again in its backward pass
        ledger.add_cost("distillation", Cost(forwards=spent.backwards))
    tested = [evaluate(pool, tested, point.test, point.metrics) for tested in (solver, start)]
    ledger.lap("scoring", 2 * split_name(point.test)[1] * point.nfe)
    result = Result(
        **_shown(point),
        grid=_origin(point),
        status=state.status,
        reason=getattr(state, "reason", None),
        validation_psnr_db=best["psnr_db"],
        metrics=tested[0],
        start_metrics=tested[1],
        start_validation_psnr_db=state.validated[0]["psnr_db"],
        forwards=spent.forwards,
        backwards=spent.backwards,
        history=[[entry["iteration"], entry["psnr_db"]] for entry in state.validated],
    )
    origin = f"{point.start.label} on the {point.start.grid.label} grid"
    _record_costs(store, ledger)
    store.save(result, _artifact(point, context, solver, best["psnr_db"], pool, origin).to_json(), state.validated)
    return result


def _record_costs(store: ResultStore, ledger: Ledger) -> None:
    """Write the costs before the result, since a complete point is not touched again; a result does not need them."""
    try:
        save_costs(store.storage, store.folder, ledger.costs)
    except UserError as error:
        note(f"the cost of {store.folder} is not recorded: {error}")


def _add_passes(ledger: Ledger, point: LearnedPoint, state: State) -> None:
    """Add the passes of a distillation up to ``state``, and of its start and validations; the time is that of laps."""
    run, per_evaluation = point.run, ledger.forwards_per_evaluation
    evaluations, _ = run.method.evaluations(state, point.nfe)
    forwards, backwards = run.passes(state, point.nfe, per_evaluation)
    ledger.add_cost("distillation", Cost(evaluations=evaluations, forwards=forwards, backwards=backwards))
    if point.start.family == LEAST_SQUARES:
        ledger.add("distillation", run.method.training_pairs * point.nfe)
    ledger.add("validation", len(state.validated) * split_name(point.validation)[1] * point.nfe)


def _start(point: LearnedPoint, family: LearnableFamily, scheduler: Scheduler, pool: Pool) -> tuple[Tensor, NSSolver]:
    """Parameters of the family at the start, and the solver that they define."""
    if point.start.family != LEAST_SQUARES:
        solver = point.start.solver(point.nfe, point.sigma0)
        return family.start(solver, scheduler), solver.to_ns(scheduler)
    assert isinstance(family, BNS)
    times = to_numpy(point.start.grid.times(point.nfe, scheduler))
    (train,) = sets_of(point.run.train)
    theta = pool.call(Request.of(HostProtocol.least_squares, pairs=train, times=times))
    fitted = NSSolver.from_flat(torch.from_numpy(theta))
    return family.start_from(fitted, scheduler), fitted


def _artifact(
    point: AnyPoint, context: TrialContext, solver: NSSolver, psnr: float, pool: Pool, start: str | None
) -> ThetaArtifact:
    return theta_artifact(
        context.facts,
        pool,
        solver,
        family=point.family,
        start=start,
        guidance_scale=point.guidance_scale,
        sigma0=point.sigma0,
        pairs=", ".join(sets_of(point.run.train)) if isinstance(point, LearnedPoint) else point.train,
        validation_psnr_db=psnr,
    )
