"""How much of a solver's beginning can be learned for a model, so that its theta can be exported everywhere."""

from __future__ import annotations

from orchestrator.models.facts import ModelFacts
from solvers.families.bns import Beginning


def beginning_for(facts: ModelFacts) -> Beginning:
    """The option ``beginning`` of BNS with most freedom whose theta the exporters accept.

    Args:
        facts: Facts about the model.

    Returns:
        'free', or 'time' if the model is a pipeline whose network gets the unscaled noise, which needs a_0 = 1.
    """
    return "free" if facts.scales_start else "time"
