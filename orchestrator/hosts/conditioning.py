"""What conditions a network, for pairs that are made or loaded: numbers of rows become named tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.datasets.base import Dataset
from orchestrator.errors import StoreError
from orchestrator.models.base import ModelAdapter
from orchestrator.pairs import Condition, PairSet, PairSpec
from orchestrator.storage import canonical_json


def dataset_of(spec: PairSpec) -> Dataset:
    """The dataset that conditions the pairs of a spec.

    Raises:
        StoreError: Its content here differs from the spec's.
    """
    dataset = _dataset(canonical_json(spec.conditioning), spec.content)
    if dataset is None:
        raise StoreError(
            f"pair spec {spec.digest} is for other content of dataset {spec.conditioning['name']!r} than this host "
            f"reads; give every machine the same files, seed the random numbers of functions, and start the command "
            f"again"
        )
    return dataset


@lru_cache(maxsize=4)
def _dataset(conditioning: str, content: str) -> Dataset | None:
    """The dataset, read and digested once for all shards of a pair set; None if its content differs."""
    given = json.loads(conditioning)
    dataset: Dataset = plugins.build("datasets", given["name"], given["options"])
    return dataset if dataset.content == content else None


def drawn(model: ModelAdapter, dataset: Dataset, seed: int, indices: Sequence[int]) -> tuple[Tensor, Condition]:
    """The conditions of these pairs: what the store keeps, and what the network takes.

    Raises:
        ConfigError: The network does not take them.
    """
    numbers = torch.from_numpy(dataset.conditions(seed, indices))
    condition = model.encode_conditions(numbers, dataset)
    model.check_condition(condition)
    # Text is encoded once, here: the pairs store the encoding that conditions the network.
    return (numbers if dataset.named else condition), condition


def resolved(model: ModelAdapter, spec: PairSpec, pairs: PairSet) -> PairSet:
    """Loaded pairs with what the network takes, and what counts, where the store keeps numbers of rows.

    Raises:
        StoreError: The rows have changed.
    """
    if not plugins.load("datasets", spec.conditioning["name"]).named:
        return pairs
    dataset = dataset_of(spec)
    condition = model.encode_conditions(pairs.stored, dataset)
    return replace(pairs, condition=condition, mask=dataset.mask_of(pairs.stored.numpy(), spec.shape))
