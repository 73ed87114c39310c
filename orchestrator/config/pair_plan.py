"""Which pair sets an experiment needs: one spec for each split, guidance scale and seed."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class PairKey(NamedTuple):
    """Which of an experiment's pair sets: training sets differ by seed, the others are shared by all seeds."""

    split: Split
    guidance_scale: float
    seed: int


STREAMS: dict[Split, int] = {"validation": 0, "test": 1, "train": 2}
SEED_STRIDE = 1002
"""Noise of pairs.seed s begins at s times this; training pairs of seed k are k streams on."""


def pair_specs(config: ExperimentConfig, facts: ModelFacts) -> dict[PairKey, PairSpec]:
    """Every pair set of the experiment; noise of different sets never overlaps."""
    specs: dict[PairKey, PairSpec] = {}
    pairs = config.pairs
    counts: dict[Split, int] = {"train": pairs.train, "validation": pairs.validation, "test": pairs.test}
    # Training pairs alone: nothing else is scored between its ends.
    stepwise = config.needs_trajectories
    for scale in config.guidance_scale:
        for split, count in counts.items():
            if split == "train" and not config.needs_training_pairs:
                continue
            for seed in config.seeds if split == "train" else (0,):
                stream = STREAMS[split] + seed
                specs[PairKey(split, scale, seed)] = PairSpec(
                    model_digest=facts.digest,
                    conditioning=config.conditioning.model_dump(),
                    guidance_scale=scale,
                    shape=facts.shape,
                    seed=pairs.seed * SEED_STRIDE + stream,
                    count=count,
                    batch_size=pairs.batch_size,
                    shard_size=pairs.shard_size,
                    rtol=pairs.rtol,
                    atol=pairs.atol,
                    device_class=facts.device_class,
                    trajectory=stepwise and split == "train",
                )
    return specs
