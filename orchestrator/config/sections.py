"""All sections except those for solvers: pairs, search, resources, evaluation."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.config.base import MetricChoice, Source, Strict
from orchestrator.config.solvers import BaselineConfig
from orchestrator.models.base import Precision

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""A name that can be part of a file name."""


MOST_PAIRS = 10**9
"""Largest pair set; beyond it, the list of its shards alone would fill the memory."""


class PairsConfig(Strict):
    """Ground-truth pairs: counts, tolerances, batches and shards."""

    train: int = Field(520, ge=1, le=MOST_PAIRS, strict=True)
    validation: int = Field(1024, ge=1, le=MOST_PAIRS, strict=True)
    test: int = Field(1024, ge=1, le=MOST_PAIRS, strict=True)
    rtol: float = Field(1e-6, gt=0, lt=1)
    atol: float = Field(1e-6, gt=0, lt=1)
    batch_size: int = Field(64, ge=1, strict=True)
    shard_size: int = Field(256, ge=1, strict=True)
    seed: int = Field(0, ge=0, lt=2**31, strict=True)

    @model_validator(mode="after")
    def _whole_batches(self) -> PairsConfig:
        if self.shard_size % self.batch_size:
            raise ValueError(
                f"shard_size {self.shard_size} is not a multiple of batch_size {self.batch_size}: a batch must not "
                f"span shards; use {max(1, self.shard_size // self.batch_size) * self.batch_size}"
            )
        return self


class SearchConfig(Strict):
    """Ray Tune's scheduler for a cell's trials. 'asha' stops the worse ones early, comparing only within the cell."""

    scheduler: Literal["fifo", "asha"] = "fifo"
    grace_validations: int = Field(3, ge=1, strict=True)
    reduction_factor: int = Field(3, ge=2, strict=True)


class Resources(Strict):
    """Cluster resources of a sweep.

    Fractions of a CPU or GPU only affect how Ray schedules; ``host_threads`` sets the torch threads of a host.
    """

    hosts: int = Field(2, ge=1, strict=True)
    host_cpus: float = Field(0.5, gt=0)
    host_gpus: float = Field(0, ge=0)
    host_threads: int = Field(1, ge=1, strict=True)
    trial_cpus: float = Field(0.125, gt=0)
    local_cpus: int | None = Field(None, ge=1, strict=True)
    device: str = Field("cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    host_memory_gb: float = Field(1.0, gt=0)
    """Memory for a distillation step on a host, beside the model, in 10^9 bytes; batches shrink to fit."""
    precision: Precision = "float32"
    """Precision of the network in distillation steps; bfloat16 and float16 use torch's autocast, on any device. Losses,
    states and theta keep their own precision. Ground truth and scores always use the network as loaded."""
    checkpoint: bool = Field(False, strict=True)
    """Gradients keep the activations of only one evaluation and recompute the others: less memory, 1.5 to 2 times the
    time."""
    compile: bool = Field(False, strict=True)
    """Distil with the network compiled by torch.compile. Needs a C++ or CUDA compiler; a failure is an error."""
    request_timeout: float | None = Field(None, gt=0)
    """Seconds after which a host that does not answer is considered hung and is restarted; None: never. The time that a
    host takes to start is not limited."""
    batch_runs: int = Field(8, ge=1, strict=True)
    """Largest number of runs of one NFE that a host advances in the same model batches, if it measures that to be
    faster. The result of a run then depends, by rounding, on the runs it is batched with. With 1, a sweep is repeatable
    to the bit."""

    @property
    def cpu_budget(self) -> int:
        """CPUs of a local Ray: ``local_cpus``, or all cores of this machine."""
        return self.local_cpus or os.cpu_count() or 1

    @model_validator(mode="after")
    def _device_matches(self) -> Resources:
        if self.device.startswith("cuda") and self.host_gpus == 0:
            raise ValueError(f"device {self.device!r} needs resources.host_gpus above 0, e.g. 1 or 0.5")
        if self.device == "cpu" and self.host_gpus > 0:
            raise ValueError(f"host_gpus is {self.host_gpus:g} but device is 'cpu'; set resources.device to cuda")
        return self


class EvaluationConfig(Strict):
    """Datasets, metrics and baselines of ``bespoke evaluate``.

    Attributes:
        datasets: Sources of conditioning (and of real samples, prompts, voices) by their names in tables. If empty, the
            experiment's own conditioning.
        metrics: Metrics and their options. If empty, the metrics of the sweep.
        samples: Samples per solver and dataset; None: as many as there are test pairs.
        baselines: Fixed solvers evaluated beside the theta.
        ground_truth: Whether ground truth gets a row of its own.
        training_passes: Passes of one sample through the network that training the model took (a backward counts as
            two). If set, the cost of a distillation is reported as a share of it.
        scorers: Number of scorers: actors that hold the networks of metrics.
        scorer_cpus, scorer_gpus, scorer_device: Resources of each scorer.
        batch_size: Samples per forward pass of a metric's network.
        pictures: Samples shown per solver, if they are pictures; fewer if they need more room, more of vectors.
    """

    datasets: dict[Name, Source] = Field(default_factory=dict)
    metrics: tuple[MetricChoice, ...] = ()
    samples: int | None = Field(None, ge=1, strict=True)
    baselines: tuple[
        Annotated[BaselineConfig, BeforeValidator(lambda v: {"family": v} if isinstance(v, str) else v)], ...
    ] = ()
    ground_truth: bool = Field(True, strict=True)
    training_passes: int | None = Field(None, ge=1, strict=True)
    scorers: int = Field(1, ge=1, strict=True)
    scorer_cpus: float = Field(0.5, gt=0)
    scorer_gpus: float = Field(0, ge=0)
    scorer_device: str = Field("cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    batch_size: int = Field(64, ge=1, strict=True)
    pictures: int = Field(8, ge=1, le=64, strict=True)

    @model_validator(mode="after")
    def _device_matches(self) -> EvaluationConfig:
        if self.scorer_device.startswith("cuda") and self.scorer_gpus == 0:
            raise ValueError(f"scorer_device {self.scorer_device!r} needs scorer_gpus above 0, e.g. 1 or 0.5")
        return self
