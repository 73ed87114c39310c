"""Which detector names which corruption of which zoo model, and what the detectors read on the models themselves.

    python benchmarks/bench_teacher.py --output benchmarks/results

It takes about 20 minutes on one core; ``--models digits_fm_ot`` takes one.
"""

from __future__ import annotations

import argparse
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from corruptions import CORRUPTIONS

from orchestrator import plugins
from orchestrator.hosts.teacher.detectors import readings
from orchestrator.hosts.teacher.evidence import Evidence
from orchestrator.hosts.teacher.probe import Probe, batch_size
from orchestrator.models.base import ModelAdapter
from orchestrator.models.zoo.adapter import zoo_names

SEED, TOLERANCE = 2, 1e-7
SCALES = (1.0, 3.0)


def load(name: str) -> tuple[ModelAdapter, Any]:
    """A zoo model and the conditions of a batch."""
    model = plugins.build("models", "zoo", {"weights": name})
    dataset = plugins.build("datasets", *(("spoken_digits", {}) if model.rate else ("labels", {"classes": 10})))
    drawn = dataset.conditions(SEED, list(range(batch_size(math.prod(model.shape)))))
    return model, model.encode_conditions(torch.from_numpy(drawn), dataset)


def examine(model: ModelAdapter, condition: Any, scale: float) -> Evidence:
    """The evidence of one model at one guidance scale."""
    return Probe(model, condition, scale, SEED, TOLERANCE, TOLERANCE).run()


def named(evidence: Evidence) -> dict[str, str]:
    """Severity of each finding, by detector."""
    return {reading.name: reading.finding.severity for reading in readings(evidence) if reading.finding}


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def report(models: list[str], corruptions: list[str], scales: tuple[float, ...] = SCALES) -> str:
    """Markdown tables: what detectors read on sane models, and what names each corruption."""
    sane: dict[str, dict[str, float | None]] = {}
    alarms, lines = [], []
    lines += [_row(["corruption", *(f"{name} @{scale:g}" for name in models for scale in scales)])]
    lines += [_row(["---"] * (1 + len(models) * len(scales)))]
    cells: dict[str, list[str]] = {corruption: [] for corruption in corruptions}
    count = caught = 0
    for name in models:
        model, condition = load(name)
        for scale in scales:
            evidence = examine(model, condition, scale)
            sane[f"{name} @{scale:g}"] = {reading.name: reading.value for reading in readings(evidence)}
            alarms += [f"{name} @{scale:g}: {found}" for found in named(evidence)]
            for corruption in corruptions:
                torch.manual_seed(0)
                found = named(examine(CORRUPTIONS[corruption](model), condition, scale))
                count, caught = count + 1, caught + bool(found)
                shown = [f"**{one}**" if severity == "refused" else one for one, severity in found.items()]
                cells[corruption].append(", ".join(shown) or "nothing")
    lines += [_row([corruption, *row]) for corruption, row in cells.items()]
    return "\n".join(
        [
            f"{caught} of {count} corruptions are named (bold: refused). False alarms on the models themselves: "
            f"{'; '.join(alarms) or 'none'}.",
            "",
            *lines,
            "",
            "## What the detectors read on the models themselves",
            "",
            *_values(sane),
            "",
        ]
    )


def _values(sane: dict[str, dict[str, float | None]]) -> list[str]:
    detectors = list(next(iter(sane.values())))
    rows = [_row(["model", *detectors]), _row(["---"] * (1 + len(detectors)))]
    for name, values in sane.items():
        rows.append(_row([name, *("" if (v := values[one]) is None else f"{v:.3g}" for one in detectors)]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=zoo_names())
    parser.add_argument("--corruptions", nargs="+", default=list(CORRUPTIONS), choices=list(CORRUPTIONS))
    parser.add_argument("--output", type=Path, help="folder of the result file; default: print it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = report(arguments.models, arguments.corruptions)
    if arguments.output is None:
        print(text)
        return
    path = arguments.output / f"{datetime.now(UTC):%Y-%m-%d}-teacher.md"
    models = "" if arguments.models == zoo_names() else f" --models {' '.join(arguments.models)}"
    command = f"`python benchmarks/bench_teacher.py{models} --output {arguments.output}`"
    path.write_text(f"# Corruptions of the zoo's models, and what names them\n\n{command}\n\n{text}", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
