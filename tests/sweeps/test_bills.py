"""The bill of a sweep has the network passes that the hosts have counted, item by item."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from trial_example import trial_context

from orchestrator.config.pair_plan import pair_specs
from orchestrator.config.reading import parse_config
from orchestrator.cost import load_costs
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs.make import complete, ensure_pairs
from orchestrator.pool.requests import LocalPool
from orchestrator.reports.bill import gallery_cost
from orchestrator.reports.gallery import make_gallery
from orchestrator.results.bill import Bill
from orchestrator.results.store import Result, ResultStore, rows
from orchestrator.results.truth import find_truths
from orchestrator.storage import Storage
from sweeps.bills import charge_gallery, opening_bill
from sweeps.points.execute import run_point
from sweeps.session import Session
from sweeps.space import fixed_points, learned_points
from sweeps.sweep import best_choices, by_key

LEARNED: list[dict[str, Any]] = [
    {"family": "bns", "start": ["best", "least_squares"], "iterations": 2, "batch_size": 16, "validate_every": 1},
    {"family": "bns", "method": "levenberg_marquardt", "iterations": 1, "batch_size": 24, "validate_every": 1},
]


class _Experiment:
    """A sweep in this process, with one host that counts its forward passes."""

    def __init__(self, experiment: dict[str, Any], storage: Storage, settings: HostSettings):
        self.config = parse_config(experiment, "the small experiment")
        self.config.check()
        self.storage, self.host = storage, Host(settings)
        self.pool, self.facts = LocalPool(self.host), self.host.facts()
        self.specs = pair_specs(self.config, self.facts)

    def bill(self) -> Bill:
        """Run what is missing, and make the bill."""
        reused_pairs = complete(self.storage, self.specs.values())
        ensure_pairs(self.storage, list(self.specs.values()), self.pool, wait=True, announce=lambda sentence: None)
        fixed = fixed_points(self.config, self.specs)
        reused = {point.key for point in fixed if ResultStore(self.storage, point.key).is_complete()}
        results = {point.key: self._run(point) for point in fixed}
        learned = learned_points(
            self.config, self.specs, best_choices(fixed, results), self.facts.scheduler, lambda name: None
        )
        reused |= {point.key for point in learned if ResultStore(self.storage, point.key).is_complete()}
        results |= {point.key: self._run(point) for point in learned}
        ordered = [results[key] for key in by_key(fixed, learned)]
        tests = {key.guidance_scale: spec for key, spec in self.specs.items() if key.split == "test"}
        truths = find_truths(self.storage, self.pool, tests, lambda sentence: None)
        panels = make_gallery(self.pool, self.storage, tests, rows(ordered), self.facts)
        session = SimpleNamespace(hosts=1, facts=self.facts, storage=self.storage, reused=reused_pairs)
        session.config = self.config
        pairs = {f"{split}, guidance {scale:g}": spec for (split, scale, _), spec in self.specs.items()}
        bill = opening_bill(cast(Session, session), pairs, truths.values())
        bill.add_results(self.storage, ordered, reused)
        charge_gallery(bill, gallery_cost(panels, self.facts.forwards_per_evaluation, 1.0))
        return bill

    def _run(self, point: Any) -> Result:
        context = trial_context(self.storage, self.facts)
        return run_point(point, context, self.pool, self.storage, lambda values: None)


@pytest.fixture
def small(experiment: dict[str, Any], storage: Storage, host_settings: Callable[..., HostSettings]) -> _Experiment:
    """Guided, so that an evaluation takes two passes; a grid search with GITS, and three distillations."""
    experiment |= {"model": {"name": "zoo", "options": {"weights": "digits_eps_vp"}}, "guidance_scale": [2.0]}
    experiment["resources"]["hosts"] = 1
    experiment["pairs"] |= {"train": 24, "test": 13, "validation": 11, "rtol": 1e-3, "atol": 1e-3}
    experiment["fixed"] = ["euler", "midpoint"]
    experiment["grid_search"] |= {"also": [{"kind": "gits"}]}
    experiment["learned"] = LEARNED
    return _Experiment(experiment, storage, host_settings(storage, "digits_eps_vp"))


def test_the_sum_of_the_bill_is_what_the_host_has_counted(small: _Experiment) -> None:
    """Pairs, search, distillation by both methods, validation, scores and the gallery: no forward pass is missing."""
    bill = small.bill()
    total = bill.total()
    assert total.cost is not None
    assert total.cost.forwards == small.host.work.forwards
    assert total.unknown == total.reused == 0
    assert [line.item for line in bill.items()] == [
        "examination",
        "pairs",
        "grid search",
        "distillation",
        "validation",
        "scoring",
        "report",
    ]
    assert sum(line.cost.forwards for line in bill.items() if line.cost) == total.cost.forwards
    assert sum(line.cost.forwards for line in bill.lines() if line.cost) == total.cost.forwards
    assert total.cost.forwards == 2 * total.cost.evaluations
    thrown_away = next(line for line in bill.lines() if line.part == "thrown away")
    assert thrown_away.cost is not None
    assert thrown_away.cost.evaluations > 0
    assert all(line.cost is not None and line.cost.seconds is not None for line in bill.items())


def test_reused_work_keeps_the_cost_of_when_it_was_made(small: _Experiment) -> None:
    """A second run computes the gallery alone, and has the same bill, marked as reused."""
    first = small.bill()
    before = small.host.work.forwards
    second = small.bill()
    gallery = next(line for line in second.items() if line.item == "report")
    assert gallery.cost is not None
    assert small.host.work.forwards - before == gallery.cost.forwards
    assert [line.cost for line in second.lines()] == [line.cost for line in first.lines()]
    assert {line.item: line.texts[-1] for line in second.items() if line.texts[-1] != "all"} == {
        "examination": "1 of 2",
        "report": "",
    }
    assert second.metrics() == first.metrics()


def test_results_without_recorded_costs_are_dashes_and_not_in_the_sum(small: _Experiment) -> None:
    """As those of an earlier version are: what is not known is not shown as nothing."""
    first = small.bill().total()
    lost = next(key for key in small.storage.names("points") if load_costs(small.storage, f"points/{key}"))
    costs = load_costs(small.storage, f"points/{lost}")
    small.storage.delete(f"points/{lost}/cost.json")
    for spec in small.specs.values():
        small.storage.delete(f"pairs/{spec.digest}/cost.json")
    bill = small.bill()
    total = bill.total()
    assert first.cost is not None
    assert total.cost is not None
    assert costs is not None
    assert total.unknown == 1
    assert total.cost.forwards == first.cost.forwards - sum(cost.forwards for cost in costs.values())
    pairs = next(line for line in bill.items() if line.item == "pairs")
    assert pairs.texts[3] == "—"
    assert "One entry was made by a version that recorded no costs (—) and is not in the sums." in bill.notes()
    assert "| — |" in bill.markdown()
