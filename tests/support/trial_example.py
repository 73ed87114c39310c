"""The context of a trial for tests that run points in this process, without Ray and MLflow."""

from __future__ import annotations

from orchestrator.models.facts import ModelFacts
from orchestrator.storage import Storage
from sweeps.points.execute import TrialContext


def trial_context(storage: Storage, facts: ModelFacts) -> TrialContext:
    """A context for one host, without a pool or a tracking server."""
    return TrialContext(
        storage=storage.root,
        tracking_uri="",
        experiment_id="",
        parent_run_id="",
        pool="",
        hosts=1,
        facts=facts,
    )
