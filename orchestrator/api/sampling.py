"""Samples of a theta for given or drawn conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.api.conditions import Conditioning
from orchestrator.api.model import Model
from orchestrator.errors import UserError
from orchestrator.hosts.conditioning import drawn
from orchestrator.models.base import ModelAdapter
from orchestrator.pairs import Condition, Conditions
from orchestrator.randomness import noise
from solvers.theta import ThetaArtifact

STREAM = 2**31
"""First seed of the noise of samples, beyond those of all pair sets."""


def sampled(
    model: Model,
    theta: ThetaArtifact,
    n: int,
    *,
    conditions: Any,
    seed: int,
    x0: Tensor | None,
    decode: bool,
    batch_size: int,
    allow_transfer: bool,
    storage: str,
) -> Tensor:
    """Samples of theta, see :meth:`orchestrator.Solver.sample`."""
    adapter = model.loaded
    theta.check_model(adapter.digest, allow_transfer=allow_transfer)
    condition = _condition(model, adapter, conditions, n, STREAM + seed, storage)
    if x0 is None:
        x0 = torch.from_numpy(noise(STREAM + seed, range(n), adapter.shape))
    elif tuple(x0.shape) != (n, *adapter.shape):
        raise UserError(f"x0 must have shape {(n, *adapter.shape)}, got {tuple(x0.shape)}")
    parts = []
    with model.at_rest(), torch.no_grad():
        for first in range(0, n, batch_size):
            rows = slice(first, first + batch_size)
            field = adapter.field(condition[rows].to(model.device), theta.guidance_scale)
            samples = theta.solver.sample(field, x0[rows].to(model.device))
            parts.append((adapter.decode(samples) if decode else samples).float().cpu())
    return torch.cat(parts)


def _condition(model: Model, adapter: ModelAdapter, given: Any, n: int, seed: int, storage: str) -> Condition:
    """What the network is conditioned on, one per sample.

    Raises:
        UserError: There is not one per sample, or the model does not take them.
    """
    if given is None:
        dataset = model.config(storage=storage).conditioning.build("datasets")
        return drawn(adapter, dataset, seed, range(n))[1]
    labels = _labels(given)
    conditioning = Conditioning() if labels is not None else Conditioning.of(given)
    condition: Condition
    if labels is not None:
        condition = labels.expand(n) if labels.ndim == 0 else labels
    elif conditioning.arrays is not None:
        condition = Conditions({name: torch.from_numpy(one) for name, one in conditioning.arrays.items()})
    else:
        assert conditioning.described is not None
        dataset = plugins.build("datasets", **conditioning.described)
        if not isinstance(given, Sequence):
            return drawn(adapter, dataset, seed, range(n))[1]
        condition = adapter.encode_conditions(torch.arange(len(given)), dataset)
    if len(condition) != n:
        raise UserError(f"there are {len(condition)} conditions for {n} samples; give one per sample")
    adapter.check_condition(condition)
    return condition


def _labels(given: Any) -> Tensor | None:
    """Labels as int64; None if the conditions are something else."""
    listed = isinstance(given, Sequence) and bool(given) and all(isinstance(label, int) for label in given)
    if isinstance(given, int | np.ndarray | Tensor) or listed:
        return torch.as_tensor(given, dtype=torch.int64)
    return None
