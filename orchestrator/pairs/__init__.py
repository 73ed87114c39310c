"""Ground-truth pairs: what they depend on, how they are solved for, where they are kept."""

from orchestrator.pairs.pair_set import PairSet, concatenate
from orchestrator.pairs.spec import PairSpec
from orchestrator.pairs.store import PairStore, ShardRecord

__all__ = ["PairSet", "PairSpec", "PairStore", "ShardRecord", "concatenate"]
