"""``bespoke evaluate``: theta files on the test pairs of an experiment, each one a run in MLflow."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from orchestrator.config import ExperimentConfig
from orchestrator.errors import UserError
from orchestrator.evaluate import evaluate
from orchestrator.progress import bar
from orchestrator.tracking import ROLE
from solvers.ns import ThetaArtifact
from sweeps.session import Session
from sweeps.space import PairKey


def evaluate_thetas(
    config: ExperimentConfig,
    artifacts: Mapping[str, ThetaArtifact],
    *,
    address: str | None,
    wait: bool,
    allow_transfer: bool,
) -> list[dict[str, Any]]:
    """Metrics of each theta on the test pairs of its own guidance scale.

    Args:
        config: The experiment whose model and pairs to use.
        artifacts: theta by the path it came from.
        address: Ray cluster; None for a local one.
        wait: Whether to wait for another process on the same pairs.
        allow_transfer: Score theta also on a model it was not made for.

    Returns:
        One dictionary a theta: theta, nfe, family, guidance_scale, columns, each column and its standard error.

    Raises:
        InvalidThetaError: theta belongs to another model and ``allow_transfer`` is false.
        UserError: The experiment has no test pairs at a theta's guidance scale.
    """
    for path, artifact in artifacts.items():
        if artifact.guidance_scale not in config.guidance_scale:
            raise UserError(
                f"{path} was made for guidance scale {artifact.guidance_scale:g}, the configuration has "
                f"{list(config.guidance_scale)}; add it with --set guidance_scale=[{artifact.guidance_scale:g}]"
            )
    with Session(config, address=address, wait=wait) as session:
        for artifact in artifacts.values():
            artifact.check_model(session.facts.digest, allow_transfer=allow_transfer)
        tracker, experiment = session.open_tracking()
        session.make_pairs(splits=["test"])
        found = []
        with bar(len(artifacts), "theta", "evaluation") as progress:
            for path, artifact in artifacts.items():
                pairs = session.specs[PairKey("test", artifact.guidance_scale, 0)]
                summaries = evaluate(session.pool, artifact.solver, pairs.digest, config.metrics, pairs.count)
                name = f"evaluation of {artifact.family} nfe{artifact.solver.nfe}"
                entry: dict[str, Any] = {
                    "theta": path,
                    "family": artifact.family,
                    "nfe": artifact.solver.nfe,
                    "guidance_scale": artifact.guidance_scale,
                    "columns": list(summaries),
                }
                numbers: dict[str, float] = {}
                for column, summary in summaries.items():
                    numbers |= {column: summary["mean"], f"{column}_stderr": summary["stderr"]}
                # By what was scored, not by where the file lay: the same theta again is the same run. Two families may
                # have the same numbers, as Euler and DDIM on CondOT.
                scored = hashlib.sha256(f"{artifact.family}/{artifact.digest}/{pairs.digest}".encode()).hexdigest()[:16]
                log = tracker.run(experiment, f"evaluation/{scored}", name, {ROLE: "evaluation"})
                log.parameters(
                    {key: entry[key] for key in ("family", "nfe", "guidance_scale")} | {"pairs": pairs.digest}
                )
                log.tags({"bespoke.theta": path})
                log.finish(numbers | {"nfe": artifact.solver.nfe}, texts={"theta.json": artifact.to_json()})
                found.append(entry | numbers)
                progress.update()
        return found
