"""Tables of scores like the papers' (BNS Tables 1-2 and 4-7, BST Tables 1-2 and 4) in Markdown, LaTeX and Parquet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.evaluation.bootstrap import Comparison
from orchestrator.evaluation.cases import Score
from orchestrator.metrics.base import EXACT_DB, SplitSummary
from orchestrator.progress import counted
from orchestrator.results.truth import MARK


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
        text: Plain text, with '±' between a value and its standard error.
        bold: Whether the value is the best.
    """

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table, to be written as Markdown, LaTeX or HTML.

    Attributes:
        title: Title.
        header: Column names.
        rows: Rows of cells, one cell per column.
        notes: Notes below the table, one sentence each.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table as Markdown, with its title as a heading."""
        lines = [f"### {self.title}", "", "| " + " | ".join(self.header) + " |", "|---" * len(self.header) + "|"]
        for row in self.rows:
            texts = (cell.text.replace("|", "\\|") for cell in row)
            entries = (f"**{text}**" if cell.bold else text for text, cell in zip(texts, row, strict=True))
            lines.append("| " + " | ".join(entries) + " |")
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes), ""])

    def latex(self) -> str:
        """The table as a LaTeX ``table`` with booktabs rules."""
        columns = "l" + "r" * (len(self.header) - 1)
        lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines += [" & ".join(name.translate(LATEX) for name in self.header) + r" \\", r"\midrule"]
        for row in self.rows:
            texts = ((cell.text.translate(LATEX), cell.bold) for cell in row)
            lines.append(" & ".join(rf"\textbf{{{text}}}" if bold else text for text, bold in texts) + r" \\")
        caption = " ".join([f"{self.title}.", *self.notes]).translate(LATEX)
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", r"\end{table}", ""])


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "σ": r"$\sigma$",
        "θ": r"$\theta$",
        "∞": r"$\infty$",
        MARK: r"$\dagger$",
        "—": "---",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{letter: f"\\{letter}" for letter in "%_&#${}"},
    }
)


def heading(score: Score) -> str:
    """Heading of a metric's column, with an arrow in the direction of improvement."""
    metric = score.metric.metric
    return f"{metric.heading} {'↑' if metric.higher_is_better else '↓'}"


def in_units(score: Score) -> tuple[float, float]:
    """A value and its standard error in the units of :func:`heading`."""
    metric = score.metric.metric
    return metric.in_units(score.summary.mean), metric.in_units(score.summary.stderr)


def shown(score: Score) -> str:
    """A value ± its standard error as text, rounded to two digits of the error."""
    mean, stderr = in_units(score)
    omitted = f" ({score.summary.not_finite} not finite)" if score.summary.not_finite else ""
    if score.is_exact:
        return "∞" if mean else "0"
    if score.metric.metric.column == "psnr_db" and mean >= EXACT_DB:
        return "∞"
    if not math.isfinite(mean):
        return f"—{omitted}"
    if isinstance(score.summary, SplitSummary):
        largest = max(score.summary.parts, key=lambda part: part[1])[0]
        omitted = f" ({largest}; mean {score.metric.metric.in_units(score.summary.over_parts):.3g}){omitted}"
    mark = MARK if score.footnote else ""
    if not math.isfinite(stderr) or stderr <= 0:
        return f"{mean:.4g}{mark}{omitted}"
    digits = min(max(0, 1 - math.floor(math.log10(stderr))), 6)
    return f"{mean:.{digits}f}{mark} ± {stderr:.{digits}f}{omitted}"


def by_dataset(scores: Sequence[Score], training_passes: int | None) -> list[Table]:
    """One table per dataset and guidance scale, with one row per solver and NFE and one column per metric."""
    tables = []
    for dataset, scale in sorted({(s.case.dataset, s.case.solver.guidance_scale) for s in scores}):
        part = [s for s in scores if (s.case.dataset, s.case.solver.guidance_scale) == (dataset, scale)]
        tables.append(_table(dataset, scale, part, training_passes))
    return tables


def _table(dataset: str, scale: float, scores: Sequence[Score], training_passes: int | None) -> Table:
    headings = list(dict.fromkeys(heading(score) for score in scores))
    truth = {heading(score): score for score in scores if score.case.solver.kind == "ground truth"}
    relative = [name for name, score in truth.items() if score.metric.metric.relative_to_truth and not score.is_exact]
    costed = training_passes is not None and any(s.case.solver.passes is not None for s in scores)
    best = _best(scores)
    rows = []
    for line in _lines(scores, heading):
        first = next(iter(line.values()))
        cells = [Cell(first.case.solver.name), Cell(f"{first.nfe:.0f}")]
        cells += [_cell(line.get(name), best) for name in headings]
        cells += [Cell(_percent(line.get(name), truth.get(name))) for name in relative]
        if costed:
            passes = first.case.solver.passes
            share = "—" if passes is None or training_passes is None else f"{100 * passes / training_passes:.2g}"
            cells.append(Cell(share))
        rows.append(tuple(cells))
    count = max((s.summary.count for s in scores), default=0)
    header = ["solver", "NFE", *headings, *(f"{name.split(' ')[0]} / GT (%)" for name in relative)]
    return Table(
        title=f"{dataset}, {_guided(scale)}",
        header=tuple([*header, "passes / training (%)"] if costed else header),
        rows=tuple(rows),
        notes=(f"{counted(count, 'sample')}; ± is the standard error of the mean over samples.", *_warnings(scores)),
    )


def _guided(scale: float) -> str:
    return "unguided" if scale == 1 else f"guidance scale {scale:g}"


def _lines(scores: Iterable[Score], column: Callable[[Score], str]) -> list[dict[str, Score]]:
    """The rows of a table, one per solver in their order: the scores by column."""
    lines: dict[tuple[object, ...], dict[str, Score]] = {}
    for score in scores:
        lines.setdefault(score.case.solver.order, {})[column(score)] = score
    return [lines[order] for order in sorted(lines)]


def _cell(score: Score | None, best: set[int]) -> Cell:
    return Cell("—") if score is None else Cell(shown(score), id(score) in best)


def _best(scores: Iterable[Score]) -> set[int]:
    """``id`` of the best scores of each metric at each NFE, ties included; ground truth does not take part."""
    cells: dict[tuple[str, str, float, float], list[Score]] = {}
    for score in scores:
        if score.case.solver.kind != "ground truth" and math.isfinite(score.summary.mean):
            place = (score.case.dataset, heading(score), score.case.solver.guidance_scale, score.nfe)
            cells.setdefault(place, []).append(score)
    best = set()
    for rivals in cells.values():
        choose = max if rivals[0].metric.metric.higher_is_better else min
        value = choose(score.summary.mean for score in rivals)
        if len(rivals) > 1:
            best |= {id(score) for score in rivals if score.summary.mean == value}
    return best


def _percent(score: Score | None, truth: Score | None) -> str:
    """A score in percent of the ground-truth value, or a dash if either is missing."""
    if score is None or truth is None or not truth.summary.mean > 0 or not math.isfinite(score.summary.mean):
        return "—"
    return f"{100 * score.summary.mean / truth.summary.mean:.0f}"


def _warnings(scores: Iterable[Score]) -> list[str]:
    """Notes about references, samples that are not finite and metrics that failed, without duplicates."""
    notes: dict[str, None] = {}
    for score in scores:
        if score.reference:
            notes[f"{score.metric.metric.column} compares with {score.reference}."] = None
        name = f"{score.case.solver.name} at NFE {score.nfe:.0f}"
        if score.not_finite:
            listed = ", ".join(map(str, score.not_finite))
            notes[f"{name}: samples that are not finite: {listed}{' …' if len(score.not_finite) == 10 else ''}."] = None
        if score.footnote is not None:
            notes[f"{score.footnote}."] = None
        if score.failure is not None:
            notes[f"{score.metric.metric.column} of {name}: {score.failure}."] = None
    return list(notes)


def across_datasets(scores: Sequence[Score]) -> list[Table]:
    """One table per metric and guidance scale, with one column per dataset (BNS Tables 6, 7); none for one dataset."""
    datasets = list(dict.fromkeys(score.case.dataset for score in scores))
    if len(datasets) < 2:
        return []
    tables = []
    places = dict.fromkeys((heading(s), s.case.solver.guidance_scale) for s in scores)
    best = _best(scores)
    for name, scale in places:
        part = [s for s in scores if (heading(s), s.case.solver.guidance_scale) == (name, scale)]
        rows = []
        for line in _lines(part, lambda score: score.case.dataset):
            first = next(iter(line.values()))
            adaptive = first.case.solver.kind == "ground truth"
            cells = [Cell(first.case.solver.name), Cell("adaptive" if adaptive else f"{first.nfe:.0f}")]
            rows.append((*cells, *(_cell(line.get(dataset), best) for dataset in datasets)))
        *fewer, most = sorted({s.summary.count for s in part})
        counts = ", ".join([*(f"{count:,}" for count in fewer), counted(most, "sample")])
        note = f"{counts} per dataset; ± is the standard error of the mean over samples."
        tables.append(Table(f"{name} by dataset, {_guided(scale)}", ("solver", "NFE", *datasets), tuple(rows), (note,)))
    return tables


def comparisons(compared: Sequence[tuple[str, str, Comparison]]) -> Table | None:
    """Table of bootstrap comparisons, each given as (case, metric, comparison); None if there are none."""
    if not compared:
        return None
    rows = tuple(
        (
            Cell(place),
            Cell(metric),
            Cell(c.better, bold=True),
            Cell(c.other),
            Cell(f"{c.difference:.4g}"),
            Cell(f"{c.low:.4g} to {c.high:.4g}"),
            Cell(f"{c.chance:.4f}" if c.chance else "< 0.0005"),
        )
        for place, metric, c in compared
    )
    return Table(
        "Is the best solver significantly better than the others?",
        ("case", "metric", "best", "compared with", "difference", "95 % interval", "p"),
        rows,
        ("Paired bootstrap over samples; p is the share of resamples in which the best solver is not better.",),
    )


def to_rows(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Every score, and every part of one, as a flat row; missing numbers are NaN."""
    truth = {
        (s.case.dataset, s.case.solver.guidance_scale, s.metric.metric.column): s.summary.mean
        for s in scores
        if s.case.solver.kind == "ground truth"
    }
    return [
        {
            "dataset": s.case.dataset,
            "guidance_scale": s.case.solver.guidance_scale,
            "kind": s.case.solver.kind,
            "solver": s.case.solver.name,
            "nfe": float(s.nfe),
            "metric": s.metric.metric.column,
            "part": part,
            "value": value,
            "stderr": stderr,
            "count": s.summary.count,
            "not_finite": s.summary.not_finite,
            "ground_truth_value": truth.get(
                (s.case.dataset, s.case.solver.guidance_scale, s.metric.metric.column), math.nan
            ),
            "passes": math.nan if s.case.solver.passes is None else float(s.case.solver.passes),
            "reference": s.reference,
            "failure": s.failure or "",
            "origin": s.case.solver.origin or "",
            "theta_digest": s.case.solver.digest,
            "pairs_digest": s.case.pairs.name,
        }
        for s in scores
        for part, value, stderr in _parts(s)
    ]


def _parts(score: Score) -> list[tuple[str, float, float]]:
    """Name, value and standard error of a score, with an empty name, and of its parts: all coordinates and the mean."""
    summary = score.summary
    own = [("", summary.mean, summary.stderr)]
    if not isinstance(summary, SplitSummary):
        return own
    return [*own, ("mean", summary.over_parts, math.nan), *summary.parts]


def to_parquet(scores: Sequence[Score]) -> bytes:
    """The rows of :func:`to_rows` as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(to_rows(scores)), sink)
    return sink.getvalue().to_pybytes()
