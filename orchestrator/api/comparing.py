"""Solvers beside each other on the same noise: PSNR against ground truth, and their samples."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from orchestrator.api.display import Picture, html_table
from orchestrator.api.model import Model
from orchestrator.config.pair_plan import PairKey, pair_spec
from orchestrator.config.solvers import SolverConfig
from orchestrator.errors import UserError
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.metrics.base import shown_db, summarise
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import Request
from orchestrator.reports.drawing.kinds import DRAWINGS
from orchestrator.reports.gallery import GROUND_TRUTH, Panel
from solvers.families import GridSolver
from solvers.grids import Grid
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler
from solvers.theta import ThetaArtifact


@dataclass(frozen=True)
class Compared:
    """PSNR of one solver.

    Attributes:
        name: Name of the solver.
        nfe: Velocity evaluations per sample.
        psnr_db: Mean over the pairs, dB.
        stderr_db: Standard error of the mean, dB; None if it is not known.
    """

    name: str
    nfe: int
    psnr_db: float
    stderr_db: float | None = None

    @property
    def cells(self) -> tuple[str, str, str]:
        """Name, NFE and PSNR as text."""
        error = "" if self.stderr_db is None else f" ± {self.stderr_db:.2f}"
        return self.name, str(self.nfe), f"{shown_db(self.psnr_db, 2)}{error}"


@dataclass(frozen=True)
class Comparison:
    """PSNR of several solvers on the same pairs, best first.

    Attributes:
        title: What is compared on what.
        rows: The solvers.
        panel: Their samples; None for a comparison of numbers only.
        facts: Facts of the model; None without samples.
    """

    title: str
    rows: Sequence[Compared]
    panel: Panel | None = None
    facts: ModelFacts | None = None

    @property
    def psnr_db(self) -> dict[str, float]:
        """PSNR by name."""
        return {row.name: row.psnr_db for row in self.rows}

    def plot(self) -> Picture:
        """Samples of all solvers from the same noise, with their differences from ground truth.

        Raises:
            ValueError: The comparison has no samples that can be shown; the message gives the reason.
        """
        if self.panel is None or self.facts is None:
            raise ValueError("this comparison has numbers only; solver.compare() draws samples as well")
        if self.panel.missing is not None:
            raise ValueError(f"the samples cannot be shown: {self.panel.missing}")
        return drawn(DRAWINGS[self.facts.kind].draw(self.panel, self.facts))

    def __repr__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"  {name:<{width}}  NFE {nfe:>3}  {value} dB" for name, nfe, value in (r.cells for r in self.rows)]
        return "\n".join([self.title, *lines])

    def _repr_html_(self) -> str:
        styles = ["best", *[""] * (len(self.rows) - 1)]
        table = html_table([row.cells for row in self.rows], ("solver", "NFE", "PSNR (dB)"), self.title, styles)
        return table if self.panel is None or self.panel.missing is not None else table + self.plot().html()


def drawn(figure: Figure) -> Picture:
    """A figure as a picture; the figure is closed."""
    import matplotlib.pyplot as plt

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return Picture(data.getvalue())


def fixed_solvers(families: Sequence[str], nfe: int, *, skip: bool = False) -> dict[str, GridSolver]:
    """Fixed solvers on even steps, by their names in tables.

    Args:
        families: Names of their families.
        nfe: Velocity evaluations per sample.
        skip: Whether to leave out those that do not exist at this NFE.

    Raises:
        UserError: The family is unknown, or has no solver at this NFE.
    """
    named = {}
    for name in families:
        config = SolverConfig(family=name)
        family = config.build()
        try:
            family.steps(nfe)
        except ValueError as error:
            if skip:
                continue
            raise UserError(f"{name} does not exist at NFE {nfe}: {error}") from error
        named[config.label] = GridSolver(family, nfe, Grid())
    return named


def compared(
    model: Model,
    theta: ThetaArtifact,
    rivals: Mapping[str, NSSolver | GridSolver],
    *,
    n: int,
    pictures: int,
    storage: str,
    allow_transfer: bool,
) -> Comparison:
    """PSNR of theta and its rivals, by name, on unseen pairs; see :meth:`orchestrator.Solver.compare`."""
    from sweeps.opening import open_session

    scale = theta.guidance_scale
    config = model.config(storage=storage, guidance_scale=[scale], nfe=[theta.nfe])
    with model.at_rest(), open_session(config, address=None, wait=True, tracked=False, command="compare") as session:
        facts, pool = session.facts, session.pool
        theta.check_model(facts.digest, allow_transfer=allow_transfer)
        ours = {"theta": theta.solver} | {name: _as_ns(rival, facts.scheduler) for name, rival in rivals.items()}
        spec = pair_spec(config, facts, PairKey("test", scale, 0), count=n)
        session.record_needs([f"pairs/{spec.digest}"])
        ensure_pairs(session.storage, [spec], pool, wait=True, announce=session.announce)
        rows = []
        for name, solver in ours.items():
            flat = solver.flat().numpy()
            asked = Request.of(HostProtocol.score, theta=flat, pairs=spec.name, metrics=["psnr"])
            summary = summarise(pool.call(asked)["psnr"].tolist())
            rows.append(Compared(name, solver.nfe, summary.mean, summary.stderr))
        rows.sort(key=lambda row: -row.psnr_db)
        entries = [(row.name, ours[row.name].flat().numpy(), row.psnr_db) for row in rows]
        panel = Panel.sampled(pool, facts, spec, theta.nfe, [(GROUND_TRUTH, None, None), *entries], pictures)
    guided = "" if scale == 1 else f", guidance {scale:g}"
    return Comparison(f"{model.name}, PSNR on {n} unseen pairs{guided}", rows, panel, facts)


def _as_ns(solver: NSSolver | GridSolver, scheduler: Scheduler) -> NSSolver:
    return solver if isinstance(solver, NSSolver) else solver.to_ns(scheduler)
