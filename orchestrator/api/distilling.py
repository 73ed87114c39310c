"""``distil``: one theta per NFE at the least cost, in this process or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from orchestrator.api.display import html_table
from orchestrator.api.model import STORAGE, Model
from orchestrator.api.solver import Solver
from orchestrator.metrics.base import shown_db

if TYPE_CHECKING:
    from orchestrator.results.bill import Bill
    from sweeps.distil.run import Finished

Beginning = Literal["auto", "held", "time", "free"]


class Solvers(Mapping[int, Solver]):
    """The solvers of one distillation, by NFE.

    Attributes:
        bill: What everything cost.
        report: Location of the report, a page with figures.
    """

    def __init__(self, solvers: Mapping[int, Solver], bill: Bill, report: str):
        self._solvers, self.bill, self.report = dict(solvers), bill, report

    def __getitem__(self, nfe: int) -> Solver:
        return self._solvers[nfe]

    def __iter__(self) -> Iterator[int]:
        return iter(self._solvers)

    def __len__(self) -> int:
        return len(self._solvers)

    def __repr__(self) -> str:
        return "\n".join(
            [*map(repr, self._solvers.values()), f"cost: {self.bill.sentence()}", f"report: {self.report}"]
        )

    def _repr_html_(self) -> str:
        rows = []
        for nfe, solver in self._solvers.items():
            assert solver.distilled is not None
            found = solver.distilled
            fixed = f"{shown_db(found.best_fixed_psnr_db, 2)} ({found.best_fixed.label})"
            rows.append((nfe, shown_db(found.psnr_db, 2), fixed, f"{found.gain_db:+.2f}", found.status))
        headings = ("NFE", "theta (dB)", "best fixed solver (dB)", "gain (dB)", "ended")
        costs = html_table([(line.item, *line.texts[:1]) for line in self.bill.items()], ("cost", "evaluations"))
        return html_table(rows, headings, "PSNR on the validation pairs") + costs


@overload
def distil(
    model: Model,
    nfe: int,
    *,
    guidance_scale: float | tuple[float, float] | None = ...,
    budget: int | None = ...,
    beginning: Beginning = ...,
    seed: int = ...,
    storage: str | Path = ...,
    address: str | None = ...,
    tracking_uri: str | None = ...,
    force: bool = ...,
    output: str | Path | None = ...,
) -> Solver: ...


@overload
def distil(
    model: Model,
    nfe: Sequence[int],
    *,
    guidance_scale: float | tuple[float, float] | None = ...,
    budget: int | None = ...,
    beginning: Beginning = ...,
    seed: int = ...,
    storage: str | Path = ...,
    address: str | None = ...,
    tracking_uri: str | None = ...,
    force: bool = ...,
    output: str | Path | None = ...,
) -> Solvers: ...


def distil(
    model: Model,
    nfe: int | Sequence[int],
    *,
    guidance_scale: float | tuple[float, float] | None = None,
    budget: int | None = None,
    beginning: Beginning = "auto",
    seed: int = 0,
    storage: str | Path = STORAGE,
    address: str | None = None,
    tracking_uri: str | None = None,
    force: bool = False,
    output: str | Path | None = None,
) -> Solver | Solvers:
    """Distil a solver for a model: few pairs, a short race for the start, then Levenberg-Marquardt.

    The same call resumes a distillation that was interrupted, and returns at once what is done.

    Args:
        model: The model.
        nfe: Velocity evaluations per sample; several for a solver of each.
        guidance_scale: Guidance scale (1 is unguided), or both ends of a range that one theta serves. None: that of
            the file that the model was read from, or 1.
        budget: Velocity evaluations, each of one sample, that everything may take; None: until validation stops
            improving.
        beginning: What is learned of the beginning: nothing ('held'), its 'time', or also its scale ('free'); 'auto':
            all that exporters allow.
        seed: Seed of the training pairs and of the order of batches.
        storage: Storage root of pairs and results.
        address: Ray cluster, 'auto' or host:port; None: this process. In a Ray session, 'auto' is that session.
        tracking_uri: MLflow store; None: one under the storage root.
        force: Whether to go on with a model that its examination refuses.
        output: A folder that gets a copy of the theta files, the report and the tables.

    Returns:
        The solver; for several NFEs, the solvers by NFE.

    Raises:
        UserError: The budget is too small, the model is refused, or something in the environment cannot work.
    """
    from sweeps.distil.run import run_distil
    from sweeps.distil.settings import DistilSettings

    nfes = (nfe,) if isinstance(nfe, int) else tuple(nfe)
    sections = {"tracking_uri": tracking_uri} if tracking_uri is not None else {}
    asked = model.chosen_scale(guidance_scale)
    settings = DistilSettings(nfe=nfes, guidance_scale=asked, budget=budget, beginning=beginning, seed=seed)
    config = model.config(storage=storage, nfe=list(nfes), guidance_scale=list(settings.guidance_scales), **sections)
    if address is not None:
        model.check_can_be_sent()
    with model.at_rest() if address is None else nullcontext():
        finished = run_distil(
            config, settings, address=address, force=force, output=None if output is None else Path(output)
        )
    solvers = _solvers(model, finished, settings.budget, str(storage))
    return solvers[nfes[0]] if isinstance(nfe, int) else solvers


def _solvers(model: Model, finished: Finished, budget: int | None, storage: str) -> Solvers:
    outcome = finished.outcome
    limit = "" if budget is None else f" --budget {budget}"
    solvers = {}
    for nfe, one in outcome.results.items():
        ends = one.artifact.guidance_range or (one.artifact.guidance_scale,)
        guided = "" if ends == (1.0,) else f" --guidance-scale {':'.join(f'{end:g}' for end in ends)}"
        comment = f"# bespoke distil FILE --nfe {nfe}{guided}{limit} --address auto\n"
        solvers[nfe] = Solver(
            one.artifact, model, distilled=one, bill=outcome.bill, storage=storage, yaml_comment=comment
        )
    return Solvers(solvers, outcome.bill, finished.report)
