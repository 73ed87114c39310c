"""The whole of ``bespoke distil`` on the shipped models: PSNR on unseen pairs against everything that was spent.

A case is MODEL:NFE[:GUIDANCE]. Each runs once per budget, beginning and seed, from nothing; PSNR is that of theta on
unseen pairs. Finished runs are kept in the storage, so that the same command resumes.

python benchmarks/bench_distil.py --cases digits_fm_ot:8 --budgets 40000,75000,0 --seeds 0,1,2 --storage DIR
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from publishing import command, load, publish, quick_option, results_option, table

from orchestrator import plugins
from orchestrator.config.base import PluginConfig
from orchestrator.config.pair_plan import PairKey, split_spec
from orchestrator.config.sections import PairsConfig
from orchestrator.config.solvers import GridSearch
from orchestrator.hosts.distillation import mean_psnr
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool
from orchestrator.progress import note
from orchestrator.storage import Storage, digest_of
from solvers.grids import Grid
from sweeps.distil.place import Place
from sweeps.distil.recipe import distil
from sweeps.distil.settings import DistilSettings
from sweeps.point import SolverChoice
from sweeps.points.grid_search import full_search
from sweeps.race import Candidate

FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in ("euler", "midpoint", "heun", "rk4", "ddim", "dpmpp_2m")),
    *(("adams_bashforth", {"steps_back": back}) for back in (2, 3, 4)),
)
"""Fixed families of the default experiment, each on all grids of its search."""

SEARCH_PAIRS = 64
"""Unseen pairs on which every fixed solver is scored; the best three are scored on all."""

FULL_SEARCH_PAIRS = 256
"""Pairs of a full search in an experiment, at whose cost it is charged."""

ITEMS = ("examination", "pairs", "grid search", "distillation", "validation", "report")


class Case(NamedTuple):
    """A model at an NFE and a guidance scale."""

    model: str
    nfe: int
    guidance_scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Case:
        model, nfe, *scale = text.split(":")
        return cls(model, int(nfe), float(scale[0]) if scale else 1.0)


@dataclass(frozen=True)
class Run:
    """A finished distillation.

    Attributes:
        case, budget, beginning, seed: What was asked; a budget of 0 is none.
        psnr_db: PSNR of theta on unseen pairs.
        spent: Velocity evaluations of the whole command, by item of its bill.
        seconds: Wall time.
        status: Why it ended.
        training_pairs: Training pairs in the end.
    """

    case: Case
    budget: int
    beginning: str
    seed: int
    psnr_db: float
    spent: dict[str, int]
    seconds: float
    status: str
    training_pairs: int

    @property
    def total(self) -> int:
        return sum(self.spent.values())


class Bench:
    """One model: its host, unseen pairs, and finished runs.

    Args:
        model: Name of a zoo model.
        storage: Storage of pairs and results.
        test_pairs, tolerance: Number of unseen pairs, and tolerance of their ground truth.
    """

    def __init__(self, model: str, storage: Storage, test_pairs: int, tolerance: float):
        self.model, self.storage = model, storage
        self.test_pairs, self.tolerance = test_pairs, tolerance
        host = Host(HostSettings(adapter="zoo", options={"weights": model}, storage=storage.root))
        spoken = model.startswith("spoken_digits")
        self.place = Place(
            pool=LocalPool(host),
            storage=storage,
            facts=host.facts(),
            conditioning=PluginConfig(name="spoken_digits")
            if spoken
            else PluginConfig(name="labels", options={"classes": 10}),
        )

    def unseen(self, scale: float) -> str:
        """Name of the unseen pairs, which are made if they are missing."""
        pairs = PairsConfig(rtol=self.tolerance, atol=self.tolerance, batch_size=32, shard_size=32)
        key = PairKey("test", scale, 0)
        spec = split_spec(
            pairs, self.place.conditioning, self.place.facts, key, count=self.test_pairs, trajectory=False
        )
        ensure_pairs(self.storage, [spec], self.place.pool, wait=True, announce=note)
        return spec.name

    def run(self, case: Case, budget: int, beginning: str, seed: int) -> Run:
        """A distillation, or what is stored of it."""
        asked = {"budget": budget, "beginning": beginning, "seed": seed}

        def measure() -> dict[str, Any]:
            settings = DistilSettings(
                nfe=(case.nfe,),
                guidance_scale=case.guidance_scale,
                budget=budget or None,
                beginning=beginning,  # type: ignore[arg-type]  # DistilSettings checks it
                seed=seed,
            )
            begin = time.monotonic()
            outcome = distil(self.place, settings)
            (result,) = outcome.results.values()
            costs = {line.item: line.cost for line in outcome.bill.items()}
            return {
                "psnr_db": mean_psnr(result.artifact.solver, self.unseen(case.guidance_scale), self.place.pool.gather),
                "spent": {item: cost.evaluations for item, cost in costs.items() if cost is not None},
                "seconds": time.monotonic() - begin,
                "status": result.status,
                "training_pairs": result.training_pairs,
            }

        return Run(case=case, **asked, **self._stored([*case, *asked.values(), self.test_pairs], measure))

    def best_fixed(self, case: Case) -> tuple[str, float, int]:
        """The best fixed solver of the full search on the unseen pairs, its PSNR there, and evaluations of the search.

        It is chosen on the pairs on which it is measured, which favours it.
        """

        def measure() -> dict[str, Any]:
            scheduler, candidates = self.place.facts.scheduler, []
            for (name, options), grid in product(FAMILIES, GridSearch().candidates()):
                assert isinstance(grid, Grid)
                label = plugins.build("families", name, options).label
                choice = SolverChoice(family=name, options=options, label=label, grid=grid)
                try:
                    solver = choice.solver(case.nfe, 1.0).to_ns(scheduler)
                except ValueError:  # another number of evaluations per step, or steps indistinguishably close
                    continue
                candidates.append(Candidate(choice=choice, solver=solver))
            found = full_search(candidates, self.unseen(case.guidance_scale), SEARCH_PAIRS, self.place.pool)
            best = found.winner.choice
            evaluations = len(candidates) * FULL_SEARCH_PAIRS * case.nfe
            return {"label": f"{best.label}, {best.grid.label}", "psnr_db": found.psnr_db, "evaluations": evaluations}

        content = self._stored([*case, "full search", self.test_pairs], measure)
        return content["label"], content["psnr_db"], content["evaluations"]

    def _stored(self, key: Sequence[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        name = f"benchmarks/distil/{digest_of(list(key))}.json"
        if not self.storage.exists(name):
            self.storage.write(name, json.dumps(measure()).encode())
        content: dict[str, Any] = json.loads(self.storage.read(name))
        return content


def summary(runs: Sequence[Run], fixed: dict[Case, tuple[str, float, int]]) -> str:
    """A row per case, budget and beginning: the worst of the seeds, and the most that any of them spent."""
    rows = []
    for case, budget, beginning in dict.fromkeys((run.case, run.budget, run.beginning) for run in runs):
        group = [run for run in runs if (run.case, run.budget, run.beginning) == (case, budget, beginning)]
        worst, most = min(run.psnr_db for run in group), max(run.total for run in group)
        row = [*case[:2], f"{case.guidance_scale:g}", beginning, f"{budget:,}" if budget else "none", len(group)]
        row += [f"{worst:.2f}", f"{most:,}", f"{max(run.seconds for run in group):.0f}"]
        if case in fixed:
            label, psnr, evaluations = fixed[case]
            row += [f"{psnr:.2f} ({label})", f"{worst - psnr:+.1f}", f"1/{evaluations / most:.1f}"]
        rows.append(row)
    heading = ["model", "NFE", "guidance", "beginning", "budget", "seeds", "worst PSNR (dB)", "most spent", "seconds"]
    return table([*heading, *(["best fixed (dB)", "gain", "of that search's cost"] if fixed else [])], rows)


def details(runs: Sequence[Run]) -> str:
    """A row per run, with its bill by item."""
    rows = [
        [*run.case[:2], run.beginning, run.budget or "none", run.seed, f"{run.psnr_db:.2f}", f"{run.total:,}"]
        + [f"{run.spent.get(item, 0):,}" for item in ITEMS]
        + [run.training_pairs, run.status, f"{run.seconds:.0f}"]
        for run in runs
    ]
    heading = ["model", "NFE", "beginning", "budget", "seed", "PSNR (dB)", "spent", *ITEMS]
    return table([*heading, "training pairs", "ended", "seconds"], rows)


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


@command(__doc__)
@click.option("--cases", default="digits_fm_ot:8", help="Comma-separated MODEL:NFE[:GUIDANCE].")
@click.option("--budgets", default="0", callback=_numbers, help="Velocity evaluations of the whole; 0: no limit.")
@click.option("--beginnings", default="auto", help="Comma-separated: auto, held, time, free.")
@click.option("--seeds", default="0", callback=_numbers, help="Each has its own training pairs.")
@click.option("--test-pairs", default=1024, help="Unseen pairs.")
@click.option("--tolerance", default=1e-7, help="rtol and atol of the unseen pairs.")
@click.option("--fixed/--no-fixed", default=True, help="Compare with the best fixed solver of a full search.")
@click.option("--storage", default="", help="Folder for pairs and finished runs; a temporary one by default.")
@click.option("--name", default="distil", help="Name of the result file, after the date.")
@quick_option
@results_option
def main(
    cases: str,
    budgets: list[int],
    beginnings: str,
    seeds: list[int],
    test_pairs: int,
    tolerance: float,
    fixed: bool,
    storage: str,
    name: str,
    quick: bool,
    results: Path,
) -> None:
    torch.set_num_threads(1)
    before = load()
    if quick:
        test_pairs, tolerance, budgets, fixed = 64, 1e-5, [12_000], False
    parsed = [Case.parse(case) for case in cases.split(",")]
    runs, best = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for model in dict.fromkeys(case.model for case in parsed):
            bench = Bench(model, Storage.at(storage or temporary), test_pairs, tolerance)
            for case in (case for case in parsed if case.model == model):
                for budget, beginning, seed in product(budgets, beginnings.split(","), seeds):
                    runs.append(bench.run(case, budget, beginning, seed))
                    click.echo(json.dumps(dataclasses.asdict(runs[-1])))
                if fixed:
                    best[case] = bench.best_fixed(case)
    assert all(math.isfinite(run.psnr_db) for run in runs)
    note_on_pairs = (
        f"PSNR on {test_pairs:,} unseen pairs at {tolerance:g}. Everything is spent: the bill by item is below."
    )
    sections = [note_on_pairs, summary(runs, best), details(runs)]
    publish(results, name, "A distillation at the least cost", sections, quick=quick, load_before=before)


if __name__ == "__main__":
    main()
