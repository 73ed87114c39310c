"""Files of an evaluation: tables in three formats, samples to look at and to listen to, and ``report.html``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml

from orchestrator.config import ExperimentConfig
from orchestrator.evaluation.run import Score
from orchestrator.evaluation.tables import Table, to_parquet
from orchestrator.gallery import Panel
from orchestrator.host import ModelFacts
from orchestrator.report import DIFFERENCE_GAIN, environment, gallery
from orchestrator.sound import players, wav


def write_evaluation(
    folder: Path,
    config: ExperimentConfig,
    facts: ModelFacts,
    scores: Sequence[Score],
    tables: Sequence[Table],
    panels: Sequence[tuple[str, Panel]],
) -> list[Path]:
    """Write ``scores.parquet``, ``tables.md``, ``tables.tex``, pictures, sound and ``report.html``; the report last.

    Args:
        folder: An existing folder.
        config: The experiment.
        facts: The model.
        scores: All of them.
        tables: What to show of them.
        panels: Samples of every solver from the same noise, by dataset.
    """
    files = []

    def save(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        files.append(folder / name)

    save("scores.parquet", to_parquet(scores))
    save("tables.md", "\n".join(table.markdown() for table in tables).encode())
    save("tables.tex", "\n".join(table.latex() for table in tables).encode())
    shown = []
    for dataset, panel in panels:
        name = f"samples_{dataset}_guidance{panel.guidance_scale:g}_nfe{panel.nfe}"
        figure = gallery(panel)
        figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
        plt.close(figure)
        files.append(folder / f"{name}.png")
        for strip in panel.strips:
            if strip.waves is not None and strip.rate is not None:
                title = "".join(letter if letter.isalnum() else "-" for letter in strip.title)
                save(f"{name}_{title}.wav", wav(np.concatenate(list(strip.waves)), strip.rate))
        shown.append((dataset, panel, base64.b64encode((folder / f"{name}.png").read_bytes()).decode(), players(panel)))
    text = (
        environment()
        .get_template("evaluation.html.j2")
        .render(
            config=config,
            facts=facts,
            tables=tables,
            panels=shown,
            gain=DIFFERENCE_GAIN,
            configuration=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    save("report.html", text.encode())
    return files
