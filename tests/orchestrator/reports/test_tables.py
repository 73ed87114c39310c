"""Tables in the layout of the papers: order of rows, bold values and notes."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pyarrow.parquet as pq
import pytest
from pair_spec_example import pair_spec

from orchestrator.evaluation.bootstrap import Comparison
from orchestrator.evaluation.cases import Case, Score
from orchestrator.evaluation.solvers import EvaluatedSolver
from orchestrator.metrics.base import Summary
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.reports.evaluation import score_curves
from orchestrator.reports.tables import across_datasets, by_dataset, comparisons, shown, to_parquet
from solvers import NSSolver
from solvers.families import GridSolver
from solvers.families.euler import Euler
from solvers.grids import Grid
from solvers.schedulers.cond_ot import CondOT

PAIRS = pair_spec()


def _solver(nfe: int) -> NSSolver:
    return GridSolver(Euler(), nfe, Grid()).to_ns(CondOT())


TRUTH = EvaluatedSolver(kind="ground truth", name="GT", guidance_scale=1.0)
BNS = EvaluatedSolver(kind="theta", name="BNS", guidance_scale=1.0, ns=_solver(8), passes=5e5)
EULER = EvaluatedSolver(kind="baseline", name="Euler", guidance_scale=1.0, ns=_solver(8))


def _score(
    solver: EvaluatedSolver, metric: str, mean: float, stderr: float = 0.1, dataset: str = "digits", **more: object
) -> Score:
    return Score(
        case=Case(solver=solver, dataset=dataset, pairs=PAIRS),
        metric=MetricSpec(metric),
        summary=Summary(mean, stderr, 100, 0),
        nfe=solver.nfe or 158.4,
        **more,  # type: ignore[arg-type]
    )


def test_a_table_has_ground_truth_first_and_the_best_in_bold() -> None:
    """One row per solver and NFE, one column per metric, and the direction of improvement in the heading."""
    scores = [
        _score(EULER, "psnr", 31.65, 0.079),
        _score(EULER, "rmse", 0.05, 0.001),
        _score(BNS, "psnr", 57.8123, 0.0123),
        _score(BNS, "rmse", 0.003, 0.0001),
        _score(TRUTH, "psnr", math.inf),
    ]
    (table,) = by_dataset(scores, None)
    assert table.title == "digits, unguided"
    assert table.header == ("solver", "NFE", "PSNR (dB) ↑", "RMSE ↓")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["GT", "158", "∞", "—"],
        ["BNS", "8", "57.812 ± 0.012", "0.00300 ± 0.00010"],
        ["Euler", "8", "31.650 ± 0.079", "0.0500 ± 0.0010"],
    ]
    assert [[cell.bold for cell in row] for row in table.rows[1:]] == [
        [False, False, True, True],
        [False, False, False, False],
    ]


def test_the_share_of_the_models_training_is_shown_if_known() -> None:
    """As %Time in BST's tables, but in passes: half a million of a hundred million are 0.5 %."""
    (table,) = by_dataset([_score(BNS, "psnr", 57.8), _score(EULER, "psnr", 31.6)], 10**8)
    assert table.header[-1] == "passes / training (%)"
    assert [row[-1].text for row in table.rows] == ["0.5", "—"]


def test_a_value_is_rounded_to_the_digits_of_its_error() -> None:
    """The error has two digits, a value without an error has four digits, and NaN is shown as a dash."""
    assert shown(_score(BNS, "psnr", 57.81234, 1.234)) == "57.8 ± 1.2"
    assert shown(_score(BNS, "psnr", 57.81234, math.nan)) == "57.81"
    assert shown(_score(BNS, "psnr", math.nan)) == "—"


def test_failures_and_samples_that_are_not_finite_are_noted_below_the_table() -> None:
    """Each note names the solver, and the samples or the reason."""
    bad = _score(BNS, "psnr", 57.8, not_finite=(3, 17))
    (table,) = by_dataset([bad, _score(EULER, "psnr", math.nan, failure="no weights")], None)
    assert "BNS at NFE 8: samples that are not finite: 3, 17." in table.notes
    assert "psnr_db of Euler at NFE 8: no weights." in table.notes


def test_a_share_of_ground_truth_is_shown_only_if_it_has_a_value() -> None:
    """A distance to real samples is also a share of ground truth's; of one to ground truth itself there is none."""
    real = [_score(TRUTH, "frechet", 2.0), _score(BNS, "frechet", 3.0)]
    (table,) = by_dataset(real, None)
    assert table.header[-1] == "frechet[raw] / GT (%)"
    assert [row[-1].text for row in table.rows] == ["100", "150"]
    (table,) = by_dataset([_score(TRUTH, "frechet", 0.0, is_exact=True), _score(BNS, "frechet", 3.0)], None)
    assert table.header == ("solver", "NFE", "frechet[raw] ↓")


def test_one_sample_is_not_called_samples() -> None:
    """Counts are singular or plural, below both kinds of table."""
    for count, expected in ((1, "1 sample;"), (1024, "1,024 samples;")):
        score = _score(BNS, "psnr", 57.8)
        (table,) = by_dataset([replace(score, summary=Summary(57.8, 0.0, count, 0))], None)
        assert table.notes[0].startswith(expected)
    one, two = (replace(_score(BNS, "snr", 40.0, dataset=d), summary=Summary(40.0, 0.0, 1, 0)) for d in "ab")
    (table,) = across_datasets([one, two])
    assert table.notes[0].startswith("1 sample per dataset;")
    (table,) = across_datasets([one, replace(two, summary=Summary(40.0, 0.0, 2, 0))])
    assert table.notes[0].startswith("1, 2 samples per dataset;")


def test_a_metric_across_datasets_has_a_column_for_each() -> None:
    """As in BNS Tables 6 and 7. A single dataset has no such table."""
    scores = [_score(s, "snr", 40.0 + i, dataset=d) for i, s in enumerate([EULER, BNS]) for d in ("george", "lucas")]
    (table,) = across_datasets(scores)
    assert table.header == ("solver", "NFE", "george", "lucas")
    assert [row[0].text for row in table.rows] == ["BNS", "Euler"]
    assert across_datasets(scores[:1]) == []


def test_markdown_and_latex_have_the_same_content() -> None:
    """Bold values, symbols that LaTeX does not have, and a vertical bar in a name."""
    solver = EvaluatedSolver(kind="theta", name="BNS | σ0=5_x", guidance_scale=1.0, ns=_solver(8))
    (table,) = by_dataset([_score(solver, "psnr", 57.8, 0.1), _score(EULER, "psnr", 31.6, 0.1)], None)
    assert "| BNS \\| σ0=5_x | 8 | **57.80 ± 0.10** |" in table.markdown()
    latex = table.latex()
    assert r"BNS | $\sigma$0=5\_x & 8 & \textbf{57.80 $\pm$ 0.10} \\" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1


def test_a_comparison_shows_the_probability_of_chance() -> None:
    """If no resample contradicts it, the table has "less than one in two thousand", not zero."""
    comparison = Comparison("BNS", "Euler", 26.2, 25.9, 26.5, 0.0, 100)
    table = comparisons([("digits, NFE 8", "psnr_db", comparison)])
    assert table is not None
    assert [cell.text for cell in table.rows[0]][-2:] == ["25.9 to 26.5", "< 0.0005"]
    assert comparisons([]) is None


def test_the_parquet_table_has_every_score_and_its_origin() -> None:
    """It has one flat row per score, readable by any program."""
    rows = pq.read_table(
        io.BytesIO(to_parquet([_score(BNS, "psnr", 57.8), _score(TRUTH, "psnr", math.inf)]))
    ).to_pylist()
    assert rows[0]["value"] == pytest.approx(57.8)
    assert rows[0]["ground_truth_value"] == math.inf
    assert (rows[0]["solver"], rows[0]["nfe"], rows[0]["metric"]) == ("BNS", 8.0, "psnr_db")
    assert (rows[0]["pairs_digest"], rows[0]["theta_digest"]) == (PAIRS.name, BNS.digest)


def test_each_panel_of_the_curves_names_its_metric_and_its_solvers() -> None:
    """The y axis is labelled with the metric, and the legend lists every solver with a value."""
    scores = [
        _score(EULER, "psnr", 31.65),
        _score(EULER, "rmse", 0.05),
        _score(BNS, "psnr", 57.8),
        _score(BNS, "rmse", 0.003),
        _score(TRUTH, "psnr", math.inf),
    ]
    figure = score_curves(scores)
    assert [axis.get_ylabel() for axis in figure.axes] == ["PSNR (dB) ↑", "RMSE ↓"]
    assert figure.axes[0].get_legend_handles_labels()[1] == ["Euler", "BNS"]
    plt.close(figure)


def test_a_psnr_near_the_accuracy_of_ground_truth_is_marked_in_every_form() -> None:
    """The mark is explained once below the table, in Markdown and in the caption of LaTeX."""
    scores = [_score(BNS, "psnr", 57.8, 0.01, footnote="† near ground truth"), _score(EULER, "psnr", 31.6)]
    (table,) = by_dataset(scores, None)
    assert "57.800† ± 0.010" in table.markdown()
    assert table.markdown().count("† near ground truth.") == 1
    assert r"57.800$\dagger$ $\pm$ 0.010" in table.latex()
    assert r"$\dagger$ near ground truth." in table.latex()
    assert "31.60 ±" in table.markdown()
