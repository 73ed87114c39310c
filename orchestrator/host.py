"""The host: owns one frozen model and answers questions about it. A plain class; ``pool`` makes actors of it.

What crosses its boundary is small: theta, indices of pairs, sums, per-sample numbers. It holds nothing that cannot be
rebuilt from the model and the pair store, so it may die at any moment. It never trains the model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.errors import StoreError
from orchestrator.metrics.base import Metric
from orchestrator.models.base import ModelAdapter
from orchestrator.pairs import PairSet, PairSpec, PairStore, ShardRecord
from orchestrator.pairs.ground_truth import solve
from orchestrator.randomness import noise
from orchestrator.storage import Storage
from solvers.distil.adam import AdamSettings, AdamState, LossAndGradient, advance
from solvers.families import LearnableFamily
from solvers.losses import psnr_loss
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

BLOCK = 64
"""Pairs whose losses are summed together. Fixed, so that sums do not depend on how many hosts share them."""

SCORING_BATCH = 512
"""Pairs per model call when no gradient is needed."""


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """How to make a host: what is sent to an actor instead of the model.

    Attributes:
        adapter: Model adapter plugin.
        options: The adapter's options.
        storage: Storage root of the pairs.
        device: 'cpu' or a CUDA device.
        threads: torch threads; more than the host's share of cores makes it many times slower.
    """

    adapter: str
    options: dict[str, Any]
    storage: str
    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the rest of the system needs to know of a model without holding it."""

    name: str
    digest: str
    shape: tuple[int, ...]
    prediction: str
    scheduler: Scheduler
    native_scheduler: str
    data_range: float
    device_class: str
    parameters: int


@dataclass(frozen=True, kw_only=True)
class LearnedRun:
    """Which learnable family a distillation moves, and on which pairs.

    Attributes:
        family: Family plugin.
        options: Its options.
        sigma0: Preconditioning.
        train: Digest of the training pairs.
        settings: Adam's settings.
    """

    family: str
    options: dict[str, Any]
    sigma0: float
    train: str
    settings: AdamSettings

    def build(self) -> LearnableFamily:
        return plugins.build("families", self.family, self.options)


class Host:
    """One frozen model on one device, and the pairs it has been asked about."""

    def __init__(self, settings: HostSettings):
        self.settings = settings
        self.storage = Storage.at(settings.storage)
        self.model: ModelAdapter = plugins.build("models", settings.adapter, settings.options).to(settings.device)
        # After every import: some libraries set the thread count when they load.
        torch.set_num_threads(settings.threads)
        self._pairs: dict[str, tuple[PairSpec, PairSet]] = {}

    @cached_property
    def device_class(self) -> str:
        """'cpu', or the accelerator's name: pairs of different classes are not bit-identical."""
        if self.settings.device.startswith("cuda"):
            return torch.cuda.get_device_name(torch.device(self.settings.device))
        return self.settings.device

    def facts(self) -> ModelFacts:
        model = self.model
        return ModelFacts(
            name=model.name,
            digest=model.digest,
            shape=model.shape,
            prediction=model.prediction,
            scheduler=model.scheduler,
            native_scheduler=model.native.name,
            data_range=model.data_range,
            device_class=self.device_class,
            parameters=model.parameters,
        )

    def process_id(self) -> int:
        return os.getpid()

    # ---- make these pairs -------------------------------------------------------------------------------------

    def make_shard(self, spec: PairSpec, shard: int) -> ShardRecord:
        """Solve for the pairs of one shard and write it; the record for the manifest.

        Raises:
            StoreError: The spec is for another model or device class, or the device is full.
        """
        if spec.model_digest != self.model.digest:
            raise StoreError(f"pair spec {spec.digest} is for another model than {self.model.name}")
        if spec.device_class != self.device_class:
            raise StoreError(
                f"pair spec {spec.digest} is for device class {spec.device_class!r}, this host is "
                f"{self.device_class!r}; shards of two classes are not "
                f"mixed, choose another storage or the same kind of device"
            )
        conditioning = plugins.build("datasets", spec.conditioning["name"], spec.conditioning["options"])
        parts = [self._solve(spec, list(batch), conditioning) for batch in spec.batches(shard)]
        pairs = PairSet(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        return PairStore(self.storage, spec).write_shard(shard, pairs)

    def _solve(self, spec: PairSpec, indices: list[int], conditioning: Any) -> PairSet:
        x0 = torch.from_numpy(noise(spec.seed, indices, spec.shape))
        condition = torch.from_numpy(conditioning.conditions(spec.seed, indices))
        self.model.check_condition(condition)
        device = self.settings.device
        field = self.model.field(condition.to(device), spec.guidance_scale)
        x1, nfe = solve(field, x0.to(device), spec.rtol, spec.atol)
        return PairSet(x0, x1.to("cpu", torch.float32), condition, torch.full((len(indices),), nfe, dtype=torch.int32))

    # ---- loss and gradient at theta on these pairs ------------------------------------------------------------

    def loss_and_gradient(
        self, theta: npt.NDArray[np.float64], pairs: str, indices: Sequence[int]
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """Sum over these pairs (one block) of the PSNR loss, and of its gradient in theta's flat form.

        Args:
            theta: :meth:`NSSolver.flat`, float64.
            pairs: Digest of a pair store.
            indices: Pairs of one block, at most :data:`BLOCK`.
        """
        flat = torch.from_numpy(theta).clone().requires_grad_(True)
        batch, field = self._batch(pairs, indices)
        loss = psnr_loss(NSSolver.from_flat(flat).sample(field, batch.x0), batch.x1).to(torch.float64).sum()
        (gradient,) = torch.autograd.grad(loss, flat)
        return loss.item(), gradient.numpy()

    def advance(self, run: LearnedRun, state: AdamState, steps: int) -> AdamState:
        """``steps`` optimiser steps from this state: used where a round trip per step would cost too much."""

        def objective(solver: NSSolver, indices: list[int]) -> LossAndGradient:
            theta = solver.flat().numpy()
            return mean_of_blocks(
                [self.loss_and_gradient(theta, run.train, block) for block in blocks(indices)], indices
            )

        return advance(state, steps, run.settings, run.build(), self.model.scheduler, run.sigma0, objective)

    # ---- sample and score theta on these pairs ----------------------------------------------------------------

    def sample(self, theta: npt.NDArray[np.float64], pairs: str, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """Samples of theta from the noise of these pairs, shape (len(indices), ...)."""
        solver = NSSolver.from_flat(torch.from_numpy(theta))
        parts = []
        with torch.no_grad():
            for first in range(0, len(indices), SCORING_BATCH):
                batch, field = self._batch(pairs, indices[first : first + SCORING_BATCH])
                parts.append(solver.sample(field, batch.x0).float().cpu())
        return torch.cat(parts).numpy()

    def score(
        self, theta: npt.NDArray[np.float64], pairs: str, metrics: Sequence[str], indices: Sequence[int] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Each metric of theta on each of these pairs (all of them by default), in order of index."""
        count = len(self._load(pairs)[1])
        chosen = list(range(count)) if indices is None else list(indices)
        samples = torch.from_numpy(self.sample(theta, pairs, chosen))
        reference = self._load(pairs)[1].select(chosen).x1
        scorers: dict[str, Metric] = {name: plugins.load("metrics", name)() for name in metrics}
        return {
            name: scorer.per_sample(samples, reference, self.model.data_range).numpy()
            for name, scorer in scorers.items()
        }

    def score_many(
        self, thetas: Sequence[npt.NDArray[np.float64]], pairs: str, metric: str, indices: Sequence[int]
    ) -> list[npt.NDArray[np.float64]]:
        """One metric of several theta on the same pairs: a grid search in one request."""
        return [self.score(theta, pairs, [metric], indices)[metric] for theta in thetas]

    def ground_truth(self, pairs: str, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """The ground-truth samples of these pairs."""
        return self._load(pairs)[1].select(list(indices)).x1.numpy()

    # ---- pairs in memory --------------------------------------------------------------------------------------

    def _load(self, digest: str) -> tuple[PairSpec, PairSet]:
        if digest not in self._pairs:
            store = PairStore.open(self.storage, digest)
            if store.spec.model_digest != self.model.digest:
                raise StoreError(f"pair store {digest} was made by another model than {self.model.name}")
            self._pairs[digest] = (store.spec, store.load())
        return self._pairs[digest]

    def _batch(self, digest: str, indices: Sequence[int]) -> tuple[PairSet, Any]:
        spec, pairs = self._load(digest)
        batch = PairSet(*(column.to(self.settings.device) for column in pairs.select(list(indices))))
        return batch, self.model.field(batch.condition, spec.guidance_scale)


def blocks(indices: Sequence[int]) -> list[list[int]]:
    """``indices`` in blocks of :data:`BLOCK`, the unit of every sum."""
    return [list(indices[first : first + BLOCK]) for first in range(0, len(indices), BLOCK)]


def mean_of_blocks(parts: Sequence[tuple[float, npt.NDArray[np.float64]]], indices: Sequence[int]) -> LossAndGradient:
    """The mean loss and gradient from per-block sums, added in order of block."""
    gradient = torch.zeros(len(parts[0][1]), dtype=torch.float64)
    loss = 0.0
    for block_loss, block_gradient in parts:
        loss += block_loss
        gradient += torch.from_numpy(block_gradient)
    return LossAndGradient(loss / len(indices), gradient / len(indices))


def to_numpy(theta: Tensor) -> npt.NDArray[np.float64]:
    """A flat theta as it crosses the wire."""
    return theta.detach().to(torch.float64).numpy()
