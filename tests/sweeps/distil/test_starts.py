"""The shortlist of starts."""

from __future__ import annotations

import pytest

from orchestrator import plugins
from solvers.families.bns import BNS
from sweeps.distil.starts import shortlist


@pytest.mark.parametrize("name", ["cond_ot", "vp", "cosine", "edm"])
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5, 8, 16, 20])
def test_every_path_and_nfe_has_starts(name: str, nfe: int) -> None:
    """They are few and distinct, and a BNS solver can start from each."""
    scheduler = plugins.build("schedulers", name)
    starts = shortlist(nfe, scheduler)
    assert 1 <= len(starts) <= 24
    assert len({tuple(start.solver.flat().tolist()) for start in starts}) == len(starts)
    assert {start.solver.nfe for start in starts} == {nfe}
    assert all(start.choice.may_start(BNS(), nfe, 1.0, scheduler) for start in starts)
