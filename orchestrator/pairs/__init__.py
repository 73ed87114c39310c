"""Ground-truth pairs: their spec, the solver that makes them, and their storage."""

from orchestrator.pairs.conditions import Condition, Conditions
from orchestrator.pairs.pair_set import PairSet, concatenate
from orchestrator.pairs.spec import PairSpec
from orchestrator.pairs.store import PairStore, ShardRecord

__all__ = ["Condition", "Conditions", "PairSet", "PairSpec", "PairStore", "ShardRecord", "concatenate"]
