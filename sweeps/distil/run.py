"""``bespoke distil``: runs the recipe in this process or on Ray, and leaves theta files, a report and MLflow runs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.pairs.store import PairStore
from orchestrator.progress import Note, bar, note, stage
from orchestrator.reports.distillation import Learned, write_report, write_tables
from orchestrator.reports.gallery import Panel
from orchestrator.results.bill import duration
from sweeps.distil.budget import REPORT_SAMPLES
from sweeps.distil.outcome import Distilled, DistilOutcome
from sweeps.distil.place import Place
from sweeps.distil.plan import Plan
from sweeps.distil.recipe import distil
from sweeps.distil.settings import DistilSettings
from sweeps.distil.tracking import track
from sweeps.opening import open_session
from sweeps.session import Session, keep_only

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished distillation.

    Attributes:
        outcome: The thetas, their comparison and the bill.
        learned: The same as the report shows it, in the order of NFE.
        thetas: Location of the theta file of each NFE.
        report: Location of ``report.html``; the tables are beside it.
        run_id: MLflow run of the command; those of its solvers are below it.
        log: Location of the log with the details of failures; None if nothing was logged.
    """

    outcome: DistilOutcome
    learned: list[Learned]
    thetas: dict[int, str]
    report: str
    run_id: str
    log: str | None


def run_distil(
    config: ExperimentConfig,
    settings: DistilSettings,
    *,
    address: str | None = None,
    on_ray: bool | None = None,
    wait: bool = True,
    force: bool = False,
    output: Path | None = None,
    announce: Note = note,
) -> Finished:
    """Distil, or resume distilling, one theta per NFE, up to the report.

    Args:
        config: A checked configuration; its model, conditioning, ``pairs.seed``, resources and storage are used.
        settings: What is asked.
        address: Ray cluster; None for none, or for the Ray that this process is connected to or starts.
        on_ray: Whether hosts are actors of Ray; None: if there is an address.
        wait: Whether to wait for another process that uses the same pairs or folder.
        force: Whether to go on with a teacher that its examination refuses.
        output: A folder of this machine that gets a copy of the theta files, the report and the tables.
        announce: Receives progress notes, in sentences.

    Raises:
        UserError: Something in the configuration or the environment cannot work, or the budget is too small.
    """
    options: dict[str, Any] = {"wait": wait, "force": force, "announce": announce}
    with open_session(config, address=address, on_ray=on_ray, command="distil", locked=True, **options) as session:
        with _Progress(config.name, announce) as progress:
            outcome = distil(_place(session), settings, progress.spent, progress.planned)
        return _Publication(session, settings, outcome, output).publish()


def _place(session: Session) -> Place:
    resources = session.config.resources
    return Place(
        pool=session.pool,
        storage=session.storage,
        facts=session.facts,
        conditioning=session.config.conditioning,
        pairs_seed=session.config.pairs.seed,
        hosts=session.hosts,
        memory_bytes=int(resources.host_memory_gb * 1e9),
        precision=resources.precision,
        compile=resources.compile,
        wait=session.wait,
        force=session.force,
        announce=session.announce,
        need=session.record_needs,
    )


class _Progress:
    """Announces the plan and shows a progress bar in evaluations; without a terminal, prints lines."""

    def __init__(self, name: str, announce: Note):
        self.name, self.announce = name, announce
        self.before = self.total = 0  # evaluations spent before there was a plan, and its total
        self.stack = ExitStack()
        self.bar: Any = None

    def planned(self, plan: Plan) -> None:
        self.announce(f"{self.name}: {plan.sentence()}")
        self.total = plan.total
        self.bar = self.stack.enter_context(bar(plan.total, "evaluation", self.name))
        self.bar.update(self.before)

    def spent(self, evaluations: int) -> None:
        if self.bar is None:
            self.before += evaluations
            return
        if self.bar.n + evaluations > self.total:  # a plan is an estimate
            self.bar.total = self.bar.n + evaluations
            self.bar.set_postfix_str(f" beyond the {self.total:,} planned", refresh=False)
        self.bar.update(evaluations)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self.bar is not None:
            self.bar.total = self.bar.n
        self.stack.__exit__(kind, error, traceback)


class _Publication:
    """Files and runs of a finished distillation: thetas and tables first, then what could fail to be drawn."""

    def __init__(self, session: Session, settings: DistilSettings, outcome: DistilOutcome, output: Path | None):
        self.session, self.settings, self.outcome, self.output = session, settings, outcome, output
        self.storage, self.folder = session.storage, f"{session.folder}/distil"
        self.learned = [_shown(session, one, self._theta_name(one)) for _, one in sorted(outcome.results.items())]

    def publish(self) -> Finished:
        thetas = {}
        for one in self.learned:
            self._write(one.file, one.theta.to_json().encode())
            thetas[one.nfe] = self.storage.location(f"{self.folder}/{one.file}")
        with tempfile.TemporaryDirectory() as name, stage("writing the report"):
            folder = Path(name)
            tables = write_tables(folder, self.learned, self.outcome.bill)
            self._write_all(tables)
            session = self.session
            files = write_report(
                folder,
                session.config,
                session.facts,
                self.learned,
                self._panels(),
                truths=self.outcome.truths,
                bill=self.outcome.bill,
                configuration=self._configuration(),
                announce=session.announce,
            )
            self._write_all(files)
            earlier = [file for file in self.storage.names(self.folder) if not file.endswith(".png")]
            keep_only(self.storage, self.folder, {*earlier, *(file.name for file in files)})
            run_id = track(session, self.learned, self.outcome, [*tables, *files], seed=self.settings.seed)
        return Finished(
            outcome=self.outcome,
            learned=self.learned,
            thetas=thetas,
            report=self.storage.location(f"{self.folder}/{REPORT}"),
            run_id=run_id,
            log=session.log.location,
        )

    def _theta_name(self, one: Distilled) -> str:
        ends = one.artifact.guidance_range or (one.artifact.guidance_scale,)
        scales = "" if ends == (1.0,) else "-guidance" + "-".join(f"{end:g}" for end in ends)
        return f"{self.session.config.name}-nfe{one.nfe}{scales}.json"

    def _write_all(self, files: Sequence[Path]) -> None:
        for file in files:
            self._write(file.name, file.read_bytes(), copied=not file.name.endswith(".png"))

    def _write(self, name: str, content: bytes, *, copied: bool = True) -> None:
        """Write a file to the experiment's folder and, if there is one, to the user's."""
        self.storage.write(f"{self.folder}/{name}", content)
        if copied and self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / name).write_bytes(content)

    def _panels(self) -> list[Panel]:
        """Samples of theta and the best fixed solver from the noise of the first validation pairs, as paid for."""
        session = self.session
        panels = []
        for one in self.learned:
            passes = len(one.pairs) * (1 if session.facts.rate is None else 2)  # of sound, pictures and waves
            most = max(1, REPORT_SAMPLES // passes)
            for scale, name in sorted(one.pairs.items()):
                spec = PairStore.open(self.storage, name).spec
                entries = one.entries(scale)
                panels.append(Panel.sampled(session.pool, session.facts, spec, one.nfe, entries, most, most=most))
        return panels

    def _configuration(self) -> dict[str, Any]:
        """What decided the result."""
        config = self.session.config.model_dump(mode="json")
        used = ("name", "model", "conditioning", "resources", "storage")
        settings = self.settings
        return {name: config[name] for name in used} | {
            "pairs": {"seed": config["pairs"]["seed"]},
            "nfe": list(settings.nfe),
            "guidance_scale": list(settings.guidance_scales),
            "budget": settings.budget,
            "beginning": settings.beginning,
            "seed": settings.seed,
            "expected duration": duration(self.outcome.plan.seconds),
        }


def _shown(session: Session, one: Distilled, file: str) -> Learned:
    scheduler = session.facts.scheduler
    return Learned(
        nfe=one.nfe,
        theta=one.artifact,
        file=file,
        psnr_db=one.psnr_db,
        fixed_name=f"{one.best_fixed.label}, {one.best_fixed.grid.label}",
        fixed=one.best_fixed.solver(one.nfe, 1.0).to_ns(scheduler),
        fixed_psnr_db=one.best_fixed_psnr_db,
        start_name=f"{one.start.label}, {one.start.grid.label}",
        start_psnr_db=one.start_psnr_db,
        history=one.history,
        pairs=one.validation,
        status=one.status,
        notes=one.notes,
    )
