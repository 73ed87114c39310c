"""The report of a distillation: what cannot be drawn costs a sentence; tables need no figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.models.facts import ModelFacts
from orchestrator.reports import distillation
from orchestrator.reports.distillation import Learned, write_report, write_tables
from orchestrator.reports.gallery import Panel
from orchestrator.results.bill import Bill
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.guided import GuidedSolver
from solvers.schedulers import CondOT
from solvers.theta import ThetaArtifact

MIDPOINT = GridSolver(Midpoint(), 4, Grid()).to_ns(CondOT())


def _learned(theta: ThetaArtifact, **changes: object) -> Learned:
    values: dict[str, object] = {
        "nfe": 4,
        "theta": theta,
        "file": "x-nfe4.json",
        "psnr_db": 41.25,
        "fixed_name": "Midpoint, uniform",
        "fixed": MIDPOINT,
        "fixed_psnr_db": 40.0,
        "start_name": "Midpoint, uniform",
        "start_psnr_db": 40.0,
        "history": [(1000, 40.0), (2500, 41.25)],
        "pairs": dict.fromkeys(theta.guidance_range or (theta.guidance_scale,), "none/8"),
        "status": "converged",
        "notes": ["the budget was tight"],
    }
    return Learned(**values | changes)  # type: ignore[arg-type]


def _page(
    folder: Path, config: ExperimentConfig, facts: ModelFacts, one: Learned, panel: Panel
) -> tuple[str, list[str]]:
    """The report as text, and the notes about what is missing."""
    notes: list[str] = []
    bill = Bill(facts.forwards_per_evaluation)
    bill.add_evaluations("distillation", "theta at NFE 4", 2500, 1.0)
    write_report(
        folder,
        config,
        facts,
        [one],
        [panel],
        truths={},
        bill=bill,
        configuration={"budget": 3000},
        announce=notes.append,
    )
    return (folder / "report.html").read_text(encoding="utf-8"), notes


def test_what_cannot_be_drawn_costs_a_sentence(
    tmp_path: Path, config: ExperimentConfig, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture of theta fails, and the samples could not be made: table, progress and bill are there."""

    def fail(*arguments: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(distillation, "draw_theta", fail)
    page, notes = _page(tmp_path, config, facts, _learned(ThetaArtifact(MIDPOINT)), Panel(4, 1.0, (), "no decoder"))
    assert any("no ink" in sentence for sentence in notes)
    assert any("no decoder" in sentence for sentence in notes)
    assert "This figure could not be drawn" in page
    assert "41.25" in page
    assert "+1.25" in page
    assert "the budget was tight" in page
    assert page.count("<img") == 2, "progress and bill"
    assert "budget: 3000" in page


def test_a_theta_for_a_range_is_shown_at_both_ends(tmp_path: Path, config: ExperimentConfig, facts: ModelFacts) -> None:
    """With the PSNR of each guidance scale."""
    half = ThetaArtifact(
        GuidedSolver(MIDPOINT, MIDPOINT, (1.0, 5.0)),  # type: ignore[arg-type]
        validation_psnr_db_by_scale={1.0: 44.5, 3.0: 41.0, 5.0: 38.25},
    )
    one = _learned(half)
    page, _ = _page(tmp_path, config, facts, one, Panel(4, 5.0, (), "not made"))
    for part in (
        "The numbers of theta, NFE 4<",
        "The numbers of theta, NFE 4, guidance 5",
        "44.50",
        "38.25",
        "Guidance 5: samples",
    ):
        assert part in page, part
    names = [name for name, _, _ in one.entries(5.0)]
    assert names == ["Ground truth (dopri5)", "theta", "Midpoint, uniform"]
    assert one.entries(5.0)[1][2] == 38.25
    assert one.scales_sentence().endswith("44.50 at 1, 41.00 at 3, 38.25 at 5")


def test_the_tables_name_the_better_solver(tmp_path: Path, facts: ModelFacts) -> None:
    """A theta that is worse than the fixed solver is not the one in bold."""
    one = _learned(ThetaArtifact(MIDPOINT), psnr_db=39.5)
    write_tables(tmp_path, [one], Bill(facts.forwards_per_evaluation))
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| 4 | 39.50 | **40.00 (Midpoint, uniform)** | −0.50 |" in text
    (entry,) = json.loads((tmp_path / "table.json").read_text())["thetas"]
    assert (entry["psnr_db"], entry["evaluations"], entry["history"][0]) == (39.5, 2500, [1000, 40.0])
    assert torch.equal(one.fixed.times, MIDPOINT.times)
