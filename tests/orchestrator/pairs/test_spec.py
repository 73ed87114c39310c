"""Pair specs: their digest, and the division of pairs into shards and batches."""

from __future__ import annotations

import dataclasses
import json

import pytest
from pair_spec_example import pair_spec

from orchestrator.errors import StoreError
from orchestrator.pairs import PairSpec
from orchestrator.pairs.spec import split_name

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
    "steps": (0.0, 0.5, 1.0),
    "format": 3,
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(PairSpec) if f.name != "conditioning"])
def test_a_change_of_any_field_changes_the_name_of_the_pairs(field: str) -> None:
    """The digest names the folder, so it must cover everything that pair i depends on; the count is in the name."""
    other = dataclasses.replace(SPEC, **{field: OTHER[field]})
    assert other.name != SPEC.name
    assert (other.digest == SPEC.digest) == (field == "count")


def test_the_name_of_pairs_holds_the_digest_and_the_count() -> None:
    """Hosts find the folder by it, and use as many of its pairs as the name says."""
    assert split_name(SPEC.name) == (SPEC.digest, 40)
    for wrong in ("", "40", "-40", SPEC.digest, f"{SPEC.digest}-", f"{SPEC.name}x", f"{SPEC.digest}-²"):
        with pytest.raises(StoreError, match="does not name pairs"):
            split_name(wrong)


def test_the_place_of_the_conditioning_is_not_part_of_the_digest() -> None:
    """Its content is: a folder of prompts that was moved has the same pairs."""
    assert pair_spec(conditioning={"name": "prompts", "options": {"file": "/elsewhere.txt"}}).digest == SPEC.digest


def test_a_spec_survives_a_round_trip_through_json() -> None:
    """A store is opened from its manifest alone."""
    restored = PairSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())), SPEC.count)
    assert restored == SPEC
    assert restored.digest == SPEC.digest


def test_the_digest_stays_the_same_between_versions() -> None:
    """If it changed by accident, every store on disk would be remade."""
    assert SPEC.digest == "v2-e47b3709b33e07fb"


@pytest.mark.parametrize("count", [1, 8, 15, 16, 17, 40, 48])
def test_every_pair_belongs_to_one_whole_batch_of_one_shard(count: int) -> None:
    """Batches follow from the index alone, so the pairs of a set do not depend on how many there are."""
    spec = dataclasses.replace(SPEC, count=count)
    shards = spec.gaps([])
    assert [index for indices in shards for index in indices] == list(range(spec.made))
    assert spec.made - count in range(8)
    batches = [batch for indices in shards for batch in spec.batches(indices)]
    assert all(len(batch) == 8 and batch.start % 8 == 0 for batch in batches)
    assert all(indices.start // 16 == indices[-1] // 16 for indices in shards)
    assert [index for shard in range(spec.shards) for index in spec.shard_indices(shard)] == list(range(count))


@pytest.mark.parametrize(
    ("present", "gaps"),
    [
        ([(0, 16), (16, 32), (32, 40)], []),
        ([(0, 16)], [(16, 32), (32, 40)]),
        ([(0, 8)], [(8, 16), (16, 32), (32, 40)]),
        ([(8, 16), (32, 48)], [(0, 8), (16, 32)]),
        ([(0, 16), (48, 64)], [(16, 32), (32, 48)]),
    ],
)
def test_only_what_is_missing_is_made(present: list[tuple[int, int]], gaps: list[tuple[int, int]]) -> None:
    """The rest of a shard that was begun, shards that are lost, and what the files of a larger set need."""
    assert SPEC.gaps(range(*ends) for ends in present) == [range(*ends) for ends in gaps]
