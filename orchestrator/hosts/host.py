"""The host: owns one frozen model and answers requests about it.

A plain class, from which ``pool`` makes actors. Requests and answers are small: theta, indices of pairs, sums,
per-sample values. Everything in a host can be rebuilt from the model and the pair store, so it may die at any moment.
It never trains the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.audio.spectrogram import spectrogram
from orchestrator.errors import StoreError
from orchestrator.hosts.batching import Batching, BatchingStatistics
from orchestrator.hosts.conditioning import drawn, resolved
from orchestrator.hosts.distillation import advance, advance_steps
from orchestrator.hosts.forms import Forms
from orchestrator.hosts.lockstep import run_in_lockstep
from orchestrator.hosts.media import MediaShard
from orchestrator.hosts.network_check import check_network
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.runs import LearnedRun, PairSets, State, sets_of
from orchestrator.hosts.settings import HostSettings
from orchestrator.hosts.teacher.evidence import Evidence
from orchestrator.hosts.teacher.probe import Probe, batch_size
from orchestrator.hosts.timing import Timing, time_field
from orchestrator.hosts.truth import FieldOf, TruthFacts, solve_pairs, steps_for, truth_facts
from orchestrator.hosts.work import MeteredField, Work
from orchestrator.metrics.base import Media, PairMetric
from orchestrator.metrics.measurements import MetricSpec, write_values
from orchestrator.models.base import AUTOCAST, AutocastField, ModelAdapter
from orchestrator.models.facts import ModelFacts
from orchestrator.objectives.base import FamilyObjective, SolverObjective
from orchestrator.pairs import Condition, PairSet, PairSpec, PairStore, ShardRecord, accuracy, concatenate
from orchestrator.pairs.steps import SAMPLES, ChosenSteps
from orchestrator.pool.requests import R, Request
from orchestrator.storage import Storage, canonical_json
from solvers.distil.least_squares import fit
from solvers.distil.normal_equations import Jacobian, NormalEquations, normal_equations
from solvers.distil.pair_field import PairField
from solvers.field import VelocityField
from solvers.gits import gits_grid
from solvers.losses import psnr_loss
from solvers.network_schedule import NetworkSchedule
from solvers.ns import CheckpointedField, NSSolver
from solvers.trajectory import DensePath

SCORING_BATCH = 512
"""Pairs per model call when no gradient is needed."""


class Host(HostProtocol):
    """One frozen model on one device, and the pair sets it has loaded. ``HostProtocol`` documents its requests.

    Args:
        settings: How to build the model, and on which device.
    """

    def __init__(self, settings: HostSettings):
        self.settings = settings
        self.work = Work()
        self.storage = Storage.at(settings.storage)
        self.model: ModelAdapter = plugins.build("models", settings.adapter, settings.options).to(settings.device)
        # Set after all imports, since some libraries change the thread count when they load.
        torch.set_num_threads(settings.threads)
        self._pairs: dict[str, tuple[PairSpec, PairSet]] = {}
        self._objectives: dict[str, Any] = {}
        # The model of distillation steps: the model itself, or its compiled form, which shares the weights.
        self._distilled_on = self.model.compiled() if settings.compile else self.model
        self._is_checked = False
        self._forms = Forms(self.model, settings.device)
        self._batching = Batching(self._answer, self._select, self._distillation_field)

    @cached_property
    def device_class(self) -> str:
        """'cpu' or the accelerator's name. Pairs of different device classes are not bit-identical."""
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
            rate=model.rate,
            code=model.code,
            kind=model.shown_kind,
            data_min=model.shown_range[0],
            data_max=model.shown_range[1],
            forwards_unguided=model.forwards_per_evaluation(1.0),
            forwards_with_guidance=model.forwards_per_evaluation(2.0),
            scales_start=model.scales_start,
        )

    def process_id(self) -> int:
        return os.getpid()

    def batching_statistics(self) -> BatchingStatistics:
        """Counts of this host's batched requests, and the timings by which it decides to batch."""
        return self._batching.statistics

    # ---- ground-truth pairs -----------------------------------------------------------------------------------

    def make_shard(self, spec: PairSpec, first: int, stop: int) -> ShardRecord:
        if spec.model_digest != self.model.digest:
            raise StoreError(f"pair spec {spec.digest} is for a different model than {self.model.name}")
        if spec.device_class != self.device_class:
            raise StoreError(
                f"pair spec {spec.digest} is for device class {spec.device_class!r}, but this host is "
                f"{self.device_class!r}; shards of two classes are not mixed: choose another storage or the same kind "
                f"of device"
            )
        device = self.settings.device
        parts = [
            solve_pairs(spec, batch, self.model, self._field, device) for batch in spec.batches(range(first, stop))
        ]
        pairs = concatenate(parts)
        record = PairStore(self.storage, spec).write_shard(first, pairs)
        self.work.pairs += len(pairs)
        return record

    def choose_steps(self, spec: PairSpec, samples: int = SAMPLES) -> ChosenSteps:
        return steps_for(spec, samples, self.model, self._field, self.settings.device)

    def examine(
        self, conditioning: Mapping[str, Any], seed: int, guidance_scale: float, rtol: float, atol: float
    ) -> Evidence:
        dataset = plugins.build("datasets", conditioning["name"], conditioning["options"])
        indices = range(batch_size(math.prod(self.model.shape)))
        stored, condition = drawn(self.model, dataset, seed, list(indices))
        mask = dataset.mask_of(stored.numpy(), self.model.shape) if dataset.named else None
        device = self.settings.device
        mask = None if mask is None else mask.to(device)
        evidence = Probe(self.model, condition.to(device), guidance_scale, seed, rtol, atol, mask).run()
        self.work.forwards += evidence.forwards
        return evidence

    def time_evaluation(
        self, conditioning: Mapping[str, Any], guidance_scale: float, batch_sizes: Sequence[int]
    ) -> Timing:
        dataset = plugins.build("datasets", conditioning["name"], conditioning["options"])
        condition = drawn(self.model, dataset, 0, list(range(max(batch_sizes))))[1].to(self.settings.device)
        before = self.work.forwards
        seconds = time_field(lambda c: self._field(c, guidance_scale), condition, self.model.shape, batch_sizes)
        forwards = self.work.forwards - before
        evaluations = forwards // self.model.forwards_per_evaluation(guidance_scale)
        state_bytes = 4 * math.prod(self.model.shape)
        return Timing(seconds=seconds, evaluations=evaluations, forwards=forwards, state_bytes=state_bytes)

    def truth(self, pairs: str, again: int = accuracy.PAIRS) -> TruthFacts:
        spec, pair_set = self._load(pairs)
        first, velocity = self._batch(pairs, range(min(again, len(pair_set))))
        forwards = self.model.forwards_per_evaluation(spec.guidance_scale)
        return truth_facts(spec, pair_set, first, velocity, self.model.data_range, forwards)

    # ---- losses and gradients ---------------------------------------------------------------------------------

    def loss_and_gradient(
        self,
        theta: npt.NDArray[np.float64],
        pairs: str,
        indices: Sequence[int],
        objective: str = "psnr",
        objective_options: dict[str, Any] | None = None,
    ) -> tuple[float, npt.NDArray[np.float64]]:
        solver_objective: SolverObjective = self._objective(objective, objective_options or {})
        flat = torch.from_numpy(theta).clone().requires_grad_(True)
        batch, velocity = self._batch(pairs, indices, self._distillation_field)
        loss = solver_objective.per_sample(NSSolver.from_flat(flat), velocity, batch).to(torch.float64).sum()
        (gradient,) = torch.autograd.grad(loss, flat)
        return loss.item(), gradient.numpy()

    def loss_and_gradient_of_parameters(
        self, run: LearnedRun, parameters: npt.NDArray[np.float64], indices: Sequence[int]
    ) -> tuple[float, npt.NDArray[np.float64]]:
        objective: FamilyObjective = self._objective(run.objective, run.objective_options)
        variables = torch.from_numpy(parameters).clone().requires_grad_(True)
        (pairs,) = sets_of(run.train)
        batch, velocity = self._batch(pairs, indices, self._distillation_field)
        loss = objective.per_sample(run.build(), variables, run.sigma0, velocity, batch).to(torch.float64).sum()
        (gradient,) = torch.autograd.grad(loss, variables)
        return loss.item(), gradient.numpy()

    def _objective(self, name: str, options: dict[str, Any]) -> Any:
        """The objective, built only once, since some hold a network."""
        key = canonical_json([name, options])
        if key not in self._objectives:
            self._objectives[key] = plugins.build("objectives", name, options)
        return self._objectives[key]

    # ---- normal equations -------------------------------------------------------------------------------------

    def normal_equations(
        self,
        theta: npt.NDArray[np.float64],
        pairs: str,
        indices: Sequence[int],
        jacobian: Jacobian = "forward",
        free: npt.NDArray[np.bool_] | None = None,
    ) -> NormalEquations:
        spec, pair_set = self._load(pairs)
        batch = pair_set.select(list(indices)).to(self.settings.device)
        return normal_equations(
            NSSolver.from_flat(torch.from_numpy(theta)),
            self._pair_field(batch, spec, self._distillation_field),
            batch.x0,
            batch.x1,
            memory_bytes=self.settings.memory_bytes,
            jacobian=jacobian,
            free=None if free is None else torch.from_numpy(free),
            precision=AUTOCAST[self.settings.precision],
            mask=batch.mask,
        )

    def loss(self, theta: npt.NDArray[np.float64], pairs: str, indices: Sequence[int]) -> float:
        solver, size, loss = NSSolver.from_flat(torch.from_numpy(theta)), self._scoring_batch(theta), 0.0
        with torch.no_grad():
            for first in range(0, len(indices), size):
                batch, velocity = self._batch(pairs, indices[first : first + size], self._distillation_field)
                sample = solver.sample(velocity, batch.x0)
                loss += psnr_loss(batch.counted(sample), batch.counted(batch.x1)).to(torch.float64).sum().item()
        return loss

    # ---- distillation steps -----------------------------------------------------------------------------------

    def advance(self, run: LearnedRun, state: State, steps: int, validation: PairSets | None = None) -> State:
        def ask(requests: Sequence[Request[R]], /) -> list[R]:
            return [self._answer(request) for request in requests]

        return advance(run, state, steps, self.model.scheduler, ask, validation)

    def advance_batched(self, requests: Sequence[dict[str, Any]]) -> list[State]:
        """:meth:`advance` for several runs in lockstep, with shared model batches if these are faster.

        Runs may differ in everything. Requests for the PSNR loss share a batch if they agree in NFE, number of pairs
        and guidance scale. All others are answered one by one. If a run ends early, the others go on.

        Returns:
            The states, in order. Each equals that of a separate :meth:`advance` up to rounding in the network, which
            depends on the batch size. For a single request it is identical to the bit.
        """
        tasks = [advance_steps(**request, scheduler=self.model.scheduler) for request in requests]
        return run_in_lockstep(tasks, self._batching.answer)

    def _answer(self, request: Request[Any]) -> Any:
        return getattr(self, request.method)(**request.arguments)

    def _pair_field(self, batch: PairSet, spec: PairSpec, field: FieldOf) -> PairField:
        """A function that returns the velocity field of some rows of a batch."""
        return lambda rows: field(batch.condition[rows.to(batch.condition.device)], spec.guidance_scale)

    def _field(self, condition: Condition, guidance_scale: float) -> VelocityField:
        """The field of the model as loaded, for ground truth, starts and scores."""
        return self._metered(self.model, condition, guidance_scale)

    def _metered(self, model: ModelAdapter, condition: Condition, guidance_scale: float) -> VelocityField:
        forwards = model.forwards_per_evaluation(guidance_scale)

        def field_of(condition: Condition) -> VelocityField:
            return MeteredField(model.field(condition, guidance_scale), self.work, forwards)

        if not self._is_checked:
            check_network(model.name, model.network_dtype, model.shape, field_of, condition)
            self._is_checked = True
        return field_of(condition)

    def _distillation_field(self, condition: Condition, guidance_scale: float) -> VelocityField:
        """The model's field for distillation steps: compiled, autocast and checkpointed according to the settings."""
        field = self._metered(self._distilled_on, condition, guidance_scale)
        dtype = AUTOCAST[self.settings.precision]
        if dtype is not None:
            field = AutocastField(field, dtype)
        return CheckpointedField(field) if self.settings.checkpoint else field

    def schedule(self, times: npt.NDArray[np.float64]) -> NetworkSchedule:
        return self.model.schedule(torch.from_numpy(times))

    # ---- starts and grids from trajectories -------------------------------------------------------------------

    def least_squares(self, pairs: str, times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        spec, pair_set = self._load(pairs)
        batch, grid = pair_set.to(self.settings.device), torch.from_numpy(times)
        pair_field = self._pair_field(batch, spec, self._field)
        states = _path(batch, pairs).state(grid)
        fitted = fit(pair_field, batch.x0, states, grid, batch_size=SCORING_BATCH, mask=batch.mask)
        return fitted.flat().numpy()

    def gits_grid(
        self, pairs: str, steps: int, gamma: float, loss: Literal["error", "deviation"], trajectories: int, knots: int
    ) -> tuple[npt.NDArray[np.float64], int]:
        batch, field = self._batch(pairs, range(min(trajectories, len(self._load(pairs)[1]))))
        scheduler = self.model.scheduler
        times = torch.linspace(scheduler.t_min, scheduler.t_max, max(knots, 4 * steps + 1), dtype=torch.float64)
        states = _path(batch, pairs).state(times)
        with torch.no_grad():
            # No step starts at the last knot.
            velocities = [field(x, t) for x, t in zip(states[:-1], times[:-1], strict=True)]
        spent = len(velocities) * len(batch)
        velocities.append(torch.zeros_like(velocities[0]))
        states, slopes = batch.counted(states), batch.counted(torch.stack(velocities))
        return gits_grid(states, slopes, times, steps, gamma, loss).numpy(), spent

    # ---- samples and scores -----------------------------------------------------------------------------------

    def sample(self, theta: npt.NDArray[np.float64], pairs: str, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        spec, pair_set = self._load(pairs)
        return self._sample(theta, replace(pair_set, path=None).select(list(indices)), spec).numpy()

    def score(
        self, theta: npt.NDArray[np.float64], pairs: str, metrics: Sequence[str], indices: Sequence[int] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        spec, pair_set = self._load(pairs)
        chosen = replace(pair_set, path=None).select(slice(None) if indices is None else list(indices))
        samples = self._sample(theta, chosen, spec)
        built: dict[str, PairMetric] = {name: plugins.build("metrics", name) for name in metrics}
        batches = {media: self._forms.compared(media, samples, chosen) for media in {m.sees for m in built.values()}}
        return {name: metric.measure(batches[metric.sees])[:, 0].numpy() for name, metric in built.items()}

    def measure_shard(
        self,
        theta: npt.NDArray[np.float64] | None,
        pairs: str,
        shard: int,
        metrics: Sequence[MetricSpec],
        keys: Sequence[str],
        finite: str,
        media: str | None = None,
        forms: Sequence[Media] = (),
    ) -> int:
        store = PairStore.open(self.storage, pairs)
        pair_set = resolved(self.model, store.spec, store.load_shard(shard))
        samples = pair_set.x1 if theta is None else self._sample(theta, pair_set, store.spec)
        seen = {spec.metric.sees for spec in metrics}
        batches = {form: self._forms.compared(form, samples, pair_set) for form in seen}
        samples = pair_set.filled(samples)
        for spec, key in zip(metrics, keys, strict=True):
            values = spec.metric.measure(batches[spec.metric.sees])
            write_values(self.storage, key, values.numpy())
            self.work.scored += len(samples)
        is_finite = torch.isfinite(samples.flatten(1)).all(dim=1)
        if media is not None:
            kept = {form: self._forms.form(form, samples[is_finite]) for form in forms}
            MediaShard(kept, is_finite.numpy(), self.model.rate).write(self.storage, media)
        write_values(self.storage, finite, is_finite.numpy()[:, None])
        return len(pair_set)

    def _sample(self, theta: npt.NDArray[np.float64], pairs: PairSet, spec: PairSpec) -> Tensor:
        """Samples of theta from the noise of these pairs, float32, on the CPU."""
        solver, size = NSSolver.from_flat(torch.from_numpy(theta)), self._scoring_batch(theta)
        parts = []
        with torch.no_grad():
            for first in range(0, len(pairs), size):
                batch = pairs.select(slice(first, first + size)).to(self.settings.device)
                field = self._field(batch.condition, spec.guidance_scale)
                parts.append(solver.sample(field, batch.x0).float().cpu())
        return torch.cat(parts)

    def _scoring_batch(self, theta: npt.NDArray[np.float64]) -> int:
        """Pairs per call of theta: its velocities, and a few states, fit into the memory of a distillation step."""
        per_pair = 4 * math.prod(self.model.shape) * (NSSolver.from_flat(torch.from_numpy(theta)).nfe + 6)
        return max(1, min(SCORING_BATCH, self.settings.memory_bytes // per_pair))

    def sound(
        self, theta: npt.NDArray[np.float64] | None, pairs: str, indices: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        spec, pair_set = self._load(pairs)
        chosen = pair_set.select(list(indices))
        return self._forms.heard(chosen.x1 if theta is None else self._sample(theta, chosen, spec)).numpy()

    def score_thetas(
        self, thetas: Sequence[npt.NDArray[np.float64]], pairs: str, metric: str, indices: Sequence[int]
    ) -> list[npt.NDArray[np.float64]]:
        return [self.score(theta, pairs, [metric], indices)[metric] for theta in thetas]

    def pictures(
        self, theta: npt.NDArray[np.float64] | None, pairs: str, indices: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        if theta is None:
            samples = self._load(pairs)[1].select(list(indices)).x1
        else:
            samples = torch.from_numpy(self.sample(theta, pairs, indices))
        if self.model.shown_kind != "sound":
            return self._forms.shown(samples).numpy()
        if not self.model.decodes:
            return samples.numpy()
        assert self.model.rate is not None
        return spectrogram(self._forms.heard(samples), self.model.rate).numpy()

    # ---- pairs in memory --------------------------------------------------------------------------------------

    def _load(self, name: str) -> tuple[PairSpec, PairSet]:
        if name not in self._pairs:
            store = PairStore.open(self.storage, name)
            if store.spec.model_digest != self.model.digest:
                raise StoreError(f"pair store {name} was made by a different model than {self.model.name}")
            pairs = resolved(self.model, store.spec, store.load())
            self._pairs[name] = store.spec, pairs
            for other, (spec, fewer) in self._pairs.items():  # of a set that has grown, only the larger one is kept
                if spec.digest == store.spec.digest and len(fewer) < len(pairs):
                    self._pairs[other] = spec, pairs.select(slice(len(fewer)))
        return self._pairs[name]

    def _batch(self, name: str, indices: Sequence[int], field: FieldOf | None = None) -> tuple[PairSet, VelocityField]:
        """These pairs on the device, and their velocity field: the model's own by default."""
        spec, pairs = self._load(name)
        batch = pairs.select(list(indices)).to(self.settings.device)
        return batch, (field or self._field)(batch.condition, spec.guidance_scale)

    def _select(self, name: str, indices: Sequence[int]) -> tuple[float, PairSet]:
        """The guidance scale of a pair set, and its pairs at these indices without their trajectories."""
        spec, pairs = self._load(name)
        ends = replace(pairs, path=None)
        return spec.guidance_scale, ends.select(list(indices)).to(self.settings.device)

    BATCHED: ClassVar[dict[str, str]] = {advance.__name__: advance_batched.__name__}
    """Methods with a batched form, and its name. It takes a list of arguments as ``requests``; answers are in order."""


def _path(pair_set: PairSet, digest: str) -> DensePath:
    if pair_set.path is None:
        raise StoreError(f"pair store {digest} holds no trajectories; make it with `bespoke pairs`")
    return pair_set.path
