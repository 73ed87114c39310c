"""The pair specs of an experiment: one for each split, guidance scale and seed."""

from __future__ import annotations

from typing import NamedTuple

from orchestrator import plugins
from orchestrator.config.base import PluginConfig
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.sections import PairsConfig
from orchestrator.datasets.base import SPLITS, Split
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec


class PairKey(NamedTuple):
    """Identifies a pair set of an experiment. Training sets differ by seed; all seeds share the other sets."""

    split: Split
    guidance_scale: float
    seed: int


STREAMS: dict[Split, int] = {"validation": 0, "test": 1, "train": 2}
SEED_STRIDE = 1002
"""Number of noise streams per ``pairs.seed``: those of ``pairs.seed`` s begin at s times this number.

The training pairs of sweep seed k use stream ``STREAMS["train"] + k``.
"""


def pair_specs(config: ExperimentConfig, facts: ModelFacts) -> dict[PairKey, PairSpec]:
    """The spec of every pair set that the experiment needs. The noise of different sets never overlaps."""
    splits = [split for split in SPLITS if split != "train" or config.needs_training_pairs]
    keys = [
        PairKey(split, scale, seed)
        for scale in config.guidance_scale
        for split in splits
        for seed in (config.seeds if split == "train" else (0,))
    ]
    return {key: pair_spec(config, facts, key) for key in keys}


def pair_spec(
    config: ExperimentConfig,
    facts: ModelFacts,
    key: PairKey,
    *,
    count: int | None = None,
    conditioning: PluginConfig | None = None,
) -> PairSpec:
    """The spec of one pair set.

    Args:
        config: The experiment.
        facts: Facts of its model.
        key: Identifies the set.
        count: Number of pairs; None: as configured for the split.
        conditioning: What conditions the pairs; None: the experiment's own conditioning.
    """
    counts: dict[Split, int] = {
        "train": config.pairs.train,
        "validation": config.pairs.validation,
        "test": config.pairs.test,
    }
    return split_spec(
        config.pairs,
        conditioning or config.conditioning,
        facts,
        key,
        count=counts[key.split] if count is None else count,
        # Only training pairs keep trajectories: validation and test compare final samples.
        trajectory=key.split == "train" and config.needs_trajectories,
    )


def split_spec(
    pairs: PairsConfig, conditioning: PluginConfig, facts: ModelFacts, key: PairKey, *, count: int, trajectory: bool
) -> PairSpec:
    """The spec of one pair set, without an experiment.

    Args:
        pairs: Tolerances, batches and the seed of all noise; its counts are not used.
        conditioning: What conditions the pairs.
        facts: Facts of the model.
        key: Identifies the set.
        count: Number of pairs.
        trajectory: Whether the pairs keep their trajectories.
    """
    # Whole batches are made. Fewer pairs than one batch are a batch of their own, which costs no more than is needed.
    batch_size, shard_size = (pairs.batch_size, pairs.shard_size) if count >= pairs.batch_size else (count, count)
    source = conditioning.model_dump()
    source["options"] |= plugins.build("datasets", **source).split_options(key.split)
    return PairSpec(
        model_digest=facts.digest,
        conditioning=source,
        content=plugins.build("datasets", **source).content,
        guidance_scale=key.guidance_scale,
        shape=facts.shape,
        seed=pairs.seed * SEED_STRIDE + STREAMS[key.split] + key.seed,
        count=count,
        batch_size=batch_size,
        shard_size=shard_size,
        rtol=pairs.rtol,
        atol=pairs.atol,
        device_class=facts.device_class,
        trajectory=trajectory,
    )
