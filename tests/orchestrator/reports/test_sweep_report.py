"""The sweep report: figures, a table and one self-contained HTML file."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from pair_spec_example import pair_spec

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.hosts.truth import TruthFacts
from orchestrator.metrics.psnr import PSNR
from orchestrator.models.facts import ModelFacts
from orchestrator.reports.curves import LEARNED_COLOURS, curves, training
from orchestrator.reports.gallery import Panel, Strip
from orchestrator.reports.sweep import comparison_csv, markdown_table, summary, write_report, write_tables
from orchestrator.results.bill import Bill
from orchestrator.results.store import Kind, Result, Row
from orchestrator.results.truth import Truth
from solvers.schedulers.cond_ot import CondOT

FACTS = ModelFacts(
    name="digits_fm_ot",
    digest="0123456789abcdef" * 4,
    shape=(1, 8, 8),
    prediction="velocity",
    scheduler=CondOT(),
    native_scheduler="cond_ot",
    data_range=2.0,
    device_class="cpu",
    parameters=648_000,
    rate=None,
    kind="image",
    data_min=-1.0,
    data_max=1.0,
)


def _row(label: str, kind: Kind, nfe: int, psnr: float, scale: float = 1.0) -> Row:
    return Row(
        label=label,
        kind=kind,
        nfe=nfe,
        guidance_scale=scale,
        sigma0=1.5,
        detail="warped p=1.4 q=1.2" if kind == "best grid" else "uniform",
        metrics={"psnr_db": psnr, "rmse": 10 ** (-psnr / 20)},
        stderr={"psnr_db": 0.123, "rmse": 0.001},
        seeds=2,
        forwards=1234567,
        backwards=0,
        keys=("k",),
    )


@pytest.fixture
def table() -> list[Row]:
    """Euler on two grids and BNS with its start at two NFEs, DPM-Solver++ at one, and Euler at guidance scale 3."""
    rows = []
    for nfe in (4, 8):
        rows += [
            _row("Euler", "common grid", nfe, 20.0 + nfe),
            _row("Euler", "best grid", nfe, 22.0 + nfe),
            _row("BNS", "start", nfe, 22.0 + nfe),
            _row("BNS", "learned", nfe, 30.0 + nfe),
        ]
    rows.append(_row("DPM-Solver++(2M)", "best grid", 8, 29.5))
    return [*rows, _row("Euler", "common grid", 4, 18.25, scale=3.0)]


def _learned(nfe: int) -> Result:
    return Result(
        key="k",
        point={"nfe": nfe, "guidance_scale": 1.0},
        name="BNS",
        kind="learned",
        label="BNS",
        grid="from Euler",
        status="finished",
        validation_psnr_db=30.0,
        metrics={},
        history=[[0, 20.0], [10, 30.0]],
    )


@pytest.fixture
def panels() -> list[Panel]:
    """Samples of ground truth and of one solver."""
    samples = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    return [Panel(4, 1.0, (Strip("Ground truth (dopri5)", samples, None), Strip("BNS", samples * 0.9, 34.0)))]


def _write(folder: Path, config: ExperimentConfig, table: Sequence[Row], panels: Sequence[Panel]) -> list[Path]:
    results = [_learned(4), _learned(8)]
    return [*write_tables(folder, table), *write_report(folder, config, FACTS, [], table, results, panels)]


def test_the_table_is_written_first_and_the_report_last(
    tmp_path: Path, config: ExperimentConfig, table: list[Row], panels: list[Panel]
) -> None:
    """The table does not depend on any figure; then come figures, and report.html last."""
    files = _write(tmp_path, config, table, panels)
    assert [file.name for file in files] == [
        "comparison.csv",
        "psnr_db_vs_nfe_guidance1.png",
        "rmse_vs_nfe_guidance1.png",
        "training_guidance1.png",
        "samples_guidance1_nfe4.png",
        "psnr_db_vs_nfe_guidance3.png",
        "rmse_vs_nfe_guidance3.png",
        "report.html",
    ]
    assert all(file.stat().st_size > 0 for file in files)
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in files if file.suffix == ".png")
    assert plt.get_fignums() == []  # open figures would stay in memory for the whole session


def test_a_report_is_self_contained(
    tmp_path: Path, config: ExperimentConfig, table: list[Row], panels: list[Panel]
) -> None:
    """It can be sent by mail: every picture is embedded, and nothing is fetched."""
    text = _write(tmp_path, config, table, panels)[-1].read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text)
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|https?://", text)


def test_a_report_says_what_was_compared_and_how(
    tmp_path: Path, config: ExperimentConfig, table: list[Row], panels: list[Panel]
) -> None:
    """It has every solver, every value with its standard error, the model, the grid search and the configuration."""
    text = _write(tmp_path, config, table, panels)[-1].read_text(encoding="utf-8")
    for row in table:
        assert row.name in text
        assert f"{row.metrics['psnr_db']:.2f}" in text
    assert "± 0.12" in text
    assert "digits_fm_ot (velocity prediction" in text
    assert f"the best of {len(config.grid_search.candidates())} grids" in text
    assert "1,234,567" in text
    assert "name: small" in text
    assert "Guidance scale 3" in text


def test_labels_are_escaped(tmp_path: Path, config: ExperimentConfig) -> None:
    """The label of a family is not interpreted as markup."""
    text = _write(tmp_path, config, [_row("<b>Euler</b>", "common grid", 4, 20.0)], [])[-1].read_text(encoding="utf-8")
    assert "&lt;b&gt;Euler&lt;/b&gt;" in text
    assert "<b>Euler" not in text
    assert "<b>" not in markdown_table([_row("<b>Euler</b>", "common grid", 4, 20.0)])


def test_the_csv_table_can_be_read_back(table: list[Row]) -> None:
    """Names with commas and quotation marks are quoted. There is one line per row of the table."""
    table = [*table, _row('a "quoted", name', "learned", 4, 1.0)]
    lines = list(csv.DictReader(io.StringIO(comparison_csv(table))))
    assert len(lines) == len(table)
    for line, row in zip(lines, table, strict=True):
        assert (line["solver"], line["kind"], line["detail"]) == (row.name, row.kind, row.detail)
        assert (int(line["nfe"]), float(line["guidance_scale"]), float(line["sigma0"])) == (
            row.nfe,
            row.guidance_scale,
            row.sigma0,
        )
        assert float(line["psnr_db"]) == pytest.approx(row.metrics["psnr_db"], abs=1e-4)
        assert int(line["seeds"]) == 2


def test_an_empty_table_is_a_header() -> None:
    """This is the table of a sweep in which nothing finished."""
    assert comparison_csv([]).splitlines() == ["solver,kind,nfe,guidance_scale,sigma0,detail,seeds"]
    assert markdown_table([]) == ""


def _truth(accuracy_db: float | None, problem: str | None = None) -> Truth:
    facts = TruthFacts(
        low=-1.25,
        high=1.5,
        mean=0.1,
        std=0.5,
        nfe=51.0,
        accuracy_db=accuracy_db,
        problem=problem,
        again=8,
        evaluations=640,
        forwards=1280,
    )
    return Truth(pair_spec(), facts, 1.5, reused=False)


def test_scores_near_the_accuracy_of_ground_truth_are_marked_and_explained(
    tmp_path: Path, config: ExperimentConfig, table: list[Row], panels: list[Panel]
) -> None:
    """BNS at NFE 8 has 38 dB, within 10 dB of 47.5; nothing else is, and guidance 3 has other pairs."""
    truths = {1.0: _truth(47.5), 3.0: _truth(None, "rounding in the network is larger than the tolerance")}
    markdown = markdown_table(table, truths)
    assert "**38.0† ± 0.12**" in markdown
    assert markdown.count("†") == 2
    assert "† within 10 dB of ground truth's own accuracy of 47.5 dB" in markdown
    assert "pairs.rtol and pairs.atol" in markdown
    bill = Bill(lambda scale: 2)
    bill.add_evaluations("report", "samples", 12, 3.0, 0.5)
    bill.add("distillation", "BNS", None, reused=True, detail="BNS nfe4")
    *_, report = write_report(tmp_path, config, FACTS, [], table, [], panels, truths=truths, bill=bill)
    text = html.unescape(report.read_text(encoding="utf-8"))
    assert text.count("38.00†") == 2
    assert text.count("†") == 3
    assert "values from -1.25 to 1.5, mean 0.1, standard deviation 0.5; 51 evaluations per pair" in text
    assert "own accuracy 47.5 dB (8 pairs solved again at a tenth of the tolerance)" in text
    assert "own accuracy unknown: rounding in the network is larger than the tolerance" in text
    assert (tmp_path / "bill.png").exists()
    assert "What it cost" in text
    assert "<td>12</td><td>24</td><td>0</td><td>0.5 s</td>" in text
    assert "<td>—</td><td>—</td><td>—</td><td>—</td><td>all</td>" in text
    assert bill.sentence().startswith("12 velocity evaluations, 24 forward and 0 backward passes")


def test_the_markdown_table_has_a_cell_for_every_nfe(table: list[Row]) -> None:
    """Solvers that were not run at an NFE have a dash there. The best value per NFE is bold."""
    lines = markdown_table(table).splitlines()
    assert lines[:4] == ["PSNR (dB), guidance 1", "", "| solver | NFE 4 | NFE 8 |", "|---|---|---|"]
    assert "| BNS | **34.0 ± 0.12** | **38.0 ± 0.12** |" in lines
    assert "| DPM-Solver++(2M), best grid | — | 29.5 ± 0.12 |" in lines
    assert "PSNR (dB), guidance 3" in lines


def test_learned_solvers_come_first_and_the_best_of_each_nfe_is_marked(table: list[Row]) -> None:
    """The result of a sweep is visible at a glance."""
    lines: list[dict[str, Any]] = summary([row for row in table if row.guidance_scale == 1])
    assert lines[0]["name"] == "BNS"
    assert lines[0]["best"] == {4: True, 8: True}
    assert not any(best for line in lines[1:] for best in line["best"].values())


def test_a_figure_of_many_solvers_shows_the_best() -> None:
    """As many lines are drawn as there are distinguishable colours, and the best solvers are kept."""
    rows = [_row(f"learned {i}", "learned", 4, 40.0 + i) for i in range(12)]
    rows += [_row(f"fixed {i}", "best grid", 4, 20.0 + i) for i in range(30)]
    figure = curves(rows, PSNR())
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    plt.close(figure)
    assert len([name for name in labels if name.startswith("learned")]) == len(LEARNED_COLOURS)
    assert {"learned 11", "fixed 29"} < set(labels)
    assert not {"learned 0", "fixed 0"} & set(labels)


def test_iterations_of_two_methods_share_a_logarithmic_axis() -> None:
    """One method runs 40 iterations and the other 1500: on a linear axis, the shorter curve would be a dot."""

    def result(method: str, last: int) -> Result:
        return Result(
            key=method,
            point={"nfe": 8, "method": method},
            name=method,
            kind="learned",
            label="BNS",
            grid="uniform",
            status="finished",
            validation_psnr_db=50.0,
            metrics={},
            history=[[0, 40.0], [last, 50.0]],
        )

    both = training([result("adam", 1500), result("levenberg_marquardt", 40)])
    alone = training([result("adam", 1500)])
    scales = [figure.axes[0].get_xscale() for figure in (both, alone)]
    plt.close("all")
    assert scales == ["symlog", "linear"]
