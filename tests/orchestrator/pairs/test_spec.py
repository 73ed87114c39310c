"""Pair specs: their digest, and the division of pairs into shards and batches."""

from __future__ import annotations

import dataclasses
import json

import pytest
from pair_spec_example import pair_spec

from orchestrator.pairs import PairSpec

SPEC = pair_spec()

OTHER = {
    "model_digest": "n",
    "content": "of another dataset",
    "guidance_scale": 3.0,
    "shape": (3, 8, 8),
    "seed": 1,
    "count": 41,
    "batch_size": 16,
    "shard_size": 32,
    "rtol": 1e-7,
    "atol": 1e-7,
    "device_class": "NVIDIA H200",
    "trajectory": True,
    "format": 2,
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(PairSpec) if f.name != "conditioning"])
def test_a_change_of_any_field_changes_the_digest(field: str) -> None:
    """The digest names the folder, so it must cover everything that pairs depend on."""
    assert dataclasses.replace(SPEC, **{field: OTHER[field]}).digest != SPEC.digest


def test_the_place_of_the_conditioning_is_not_part_of_the_digest() -> None:
    """Its content is: a folder of prompts that was moved has the same pairs."""
    assert pair_spec(conditioning={"name": "prompts", "options": {"file": "/elsewhere.txt"}}).digest == SPEC.digest


def test_a_spec_survives_a_round_trip_through_json() -> None:
    """A store is opened from its manifest alone."""
    restored = PairSpec.from_dict(json.loads(json.dumps(dataclasses.asdict(SPEC))))
    assert restored == SPEC
    assert restored.digest == SPEC.digest


def test_the_digest_stays_the_same_between_versions() -> None:
    """If it changed by accident, every store on disk would be remade."""
    assert SPEC.digest == "3d1df8c6c0e79aad"


@pytest.mark.parametrize("count", [1, 8, 15, 16, 17, 40, 48])
def test_every_pair_belongs_to_one_batch_of_one_shard(count: int) -> None:
    """Batches follow from the index. None spans two shards, and only the last one may be short."""
    spec = dataclasses.replace(SPEC, count=count)
    batches = [batch for shard in range(spec.shards) for batch in spec.batches(shard)]
    assert [index for batch in batches for index in batch] == list(range(count))
    assert all(batch.start % spec.batch_size == 0 for batch in batches)
    assert all(len(batch) == spec.batch_size for batch in batches[:-1])
    for shard in range(spec.shards):
        assert [index for batch in spec.batches(shard) for index in batch] == list(spec.shard_indices(shard))
        assert len(spec.shard_indices(shard)) <= spec.shard_size


def test_a_larger_set_begins_with_the_same_batches() -> None:
    """Pair i is then solved in the same batch in both sets."""
    larger = dataclasses.replace(SPEC, count=400)
    assert larger.batches(0) == SPEC.batches(0)
    assert larger.batches(1) == SPEC.batches(1)
