"""Bills of the main jobs, from what is stored beside pairs and points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.cost import Cost
from orchestrator.hosts.network_check import EVALUATIONS
from orchestrator.pairs import PairSpec
from orchestrator.results.bill import Bill, guided
from orchestrator.results.truth import Truth
from sweeps.examination import stored, subjects
from sweeps.session import Session


def opening_bill(session: Session, pairs: Mapping[str, PairSpec], truths: Iterable[Truth]) -> Bill:
    """The bill of a session up to its complete pairs and the facts about ground truth.

    Args:
        session: The session; its pairs are made.
        pairs: Pair sets, by what they are for.
        truths: Facts about ground truth.
    """
    bill = Bill(session.facts.forwards_per_evaluation)
    checked = session.hosts * EVALUATIONS
    bill.add_evaluations("examination", "each host checks the network", checked, session.config.guidance_scale[0])
    for subject in subjects(pairs.values()):
        evidence = stored(session.storage, session.facts, subject)
        if evidence is not None:
            spent = round(evidence.evaluations * evidence.samples)
            cost = Cost(evaluations=spent, forwards=evidence.forwards, seconds=evidence.seconds)
            part = f"the teacher is looked at{guided(subject.guidance_scale)}"
            bill.add("examination", part, cost, reused=subject not in session.examined)
    for truth in truths:
        part = f"accuracy of ground truth{guided(truth.spec.guidance_scale)}"
        bill.add("examination", part, truth.cost, reused=truth.reused)
    for name, spec in pairs.items():
        bill.add_pairs(session.storage, spec, name, reused=spec.name in session.reused)
    return bill


def charge_gallery(bill: Bill, cost: Cost) -> None:
    """Add the samples that a report shows."""
    if cost.evaluations:
        bill.add("report", "samples to look at and to listen to", cost)


def fact_tags(truths: Mapping[float, Truth], bill: Bill) -> dict[str, str]:
    """Facts about ground truth, by guidance scale, and the bill, as tags of a command's run.

    Tags, since metrics of this run alone would be empty charts above the curves of the solvers.
    """
    facts = {f"ground_truth/{n}/guidance {g:g}": v for g, truth in truths.items() for n, v in truth.numbers().items()}
    return {f"bespoke.{name}": f"{value:.6g}" for name, value in (facts | bill.metrics()).items()}
