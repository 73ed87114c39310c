"""The pair specs of an experiment: one for each split, guidance scale and seed."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


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
    specs: dict[PairKey, PairSpec] = {}
    pairs = config.pairs
    counts: dict[Split, int] = {"train": pairs.train, "validation": pairs.validation, "test": pairs.test}
    content = config.conditioning.build("datasets").content
    # Only training pairs keep trajectories: validation and test compare final samples.
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
                    content=content,
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
