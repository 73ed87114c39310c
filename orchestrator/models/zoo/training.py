"""Training of zoo models: flow matching and diffusion losses on one dataset, with EMA and resumable checkpoints.

A task of its own: hosts never train. Knows nothing of solvers' distillation, pairs or Ray.
"""

from __future__ import annotations

import copy
import io
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.models.base import freeze
from orchestrator.models.zoo.adapter import METADATA_KEY
from orchestrator.models.zoo.nets import build_net
from orchestrator.storage import Storage
from solvers.prediction import Prediction
from solvers.schedulers.base import Scheduler


class PretrainConfig(BaseModel):
    """What ``bespoke pretrain`` is asked to train."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    dataset: str = "digits"
    architecture: dict[str, Any]
    prediction: Prediction
    scheduler: Literal["cond_ot", "cosine", "vp"]
    iterations: int = Field(6000, ge=1)
    batch_size: int = Field(256, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    ema_decay: float = Field(0.9995, gt=0, lt=1)
    label_dropout: float = Field(0.15, ge=0, lt=1)
    validation_share: float = Field(0.1, gt=0, lt=1)
    checkpoint_every: int = Field(1000, ge=1)
    seed: int = 0
    threads: int = Field(2, ge=1)
    storage: str = "bespoke-data"


Progress = Callable[[int, float], None]
"""``progress(iteration, loss)``, called after each iteration."""


def train(config: PretrainConfig, output: Path, progress: Progress) -> dict[str, Any]:
    """Train to the end, going on from the last checkpoint, and write ``{name}.safetensors`` and its model card.

    Args:
        config: The recipe.
        output: Folder for weights and card.
        progress: Told of every iteration.

    Returns:
        The facts on the model card: final training and validation loss, sizes, versions.

    Raises:
        ConfigError: The dataset has no reference samples to train on, or the architecture is none.
    """
    torch.set_num_threads(config.threads)
    data = _Data.load(config)
    storage = Storage.at(config.storage)
    checkpoint_key = f"pretrain/{config.name}/checkpoint.pt"
    try:
        run = _Run(config, data)
    except ValueError as error:
        raise ConfigError(f"pretraining {config.name!r}: {error}") from error
    if storage.exists(checkpoint_key):
        run.restore(storage.read(checkpoint_key))
    while run.iteration < config.iterations:
        loss = run.step()
        progress(run.iteration, loss)
        if run.iteration % config.checkpoint_every == 0 or run.iteration == config.iterations:
            storage.write(checkpoint_key, run.checkpoint())
    facts = run.facts()
    output.mkdir(parents=True, exist_ok=True)
    target = Storage.at(output)
    description = {
        "architecture": config.architecture,
        "prediction": config.prediction,
        "scheduler": config.scheduler,
        "data_range": data.range,
    }
    weights = {name: tensor.contiguous() for name, tensor in run.ema.state_dict().items()}
    target.write(f"{config.name}.safetensors", save(weights, {METADATA_KEY: json.dumps(description, sort_keys=True)}))
    target.write(f"{config.name}.md", model_card(config, facts).encode())
    storage.delete(checkpoint_key)
    return facts


class _Data:
    """Samples and labels, a fixed share of them held out for the validation loss."""

    def __init__(self, samples: Tensor, labels: Tensor, held_out: int):
        self.range = float(samples.max() - samples.min())
        self.train = samples[held_out:], labels[held_out:]
        self.validation = samples[:held_out], labels[:held_out]

    @classmethod
    def load(cls, config: PretrainConfig) -> _Data:
        reference = plugins.build("datasets", config.dataset).reference()
        if reference is None:
            raise ConfigError(
                f"dataset {config.dataset!r} has no samples to train on; choose one that has, e.g. digits"
            )
        order = torch.randperm(len(reference.labels), generator=torch.Generator().manual_seed(config.seed))
        samples = torch.from_numpy(reference.samples)[order]
        labels = torch.from_numpy(reference.labels)[order]
        return cls(samples, labels, max(1, round(config.validation_share * len(order))))


class _Run:
    """One training run: network, EMA, optimiser, and the generator its randomness comes from."""

    def __init__(self, config: PretrainConfig, data: _Data):
        self.config, self.data = config, data
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.net = build_net(config.architecture)
        self.null_label = int(config.architecture["classes"])
        self.ema = freeze(copy.deepcopy(self.net))
        self.scheduler: Scheduler = plugins.build("schedulers", config.scheduler)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=config.iterations, pct_start=0.05
        )
        self.iteration = 0

    def step(self) -> float:
        samples, labels = self.data.train
        chosen = torch.randint(len(samples), (self.config.batch_size,), generator=self.generator)
        dropped = torch.rand(self.config.batch_size, generator=self.generator) < self.config.label_dropout
        label = torch.where(dropped, self.null_label, labels[chosen])
        loss = self._loss(self.net, samples[chosen], label, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.iteration += 1
        # A short horizon at first: an average of initial weights helps nobody.
        decay = min(self.config.ema_decay, self.iteration / (self.iteration + 10))
        with torch.no_grad():
            for average, weight in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)
        return loss.item()

    def _loss(self, net: torch.nn.Module, x1: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the prediction at x_t = alpha x1 + sigma eps, t uniform in the domain."""
        t = torch.rand(len(x1), generator=generator)
        noise = torch.randn(x1.shape, generator=generator)
        shape = (-1,) + (1,) * (x1.ndim - 1)
        # The derivative of sigma is infinite at t = 1 on some paths, and only velocity targets use it.
        point = self.scheduler(t.double())
        alpha, sigma, d_alpha, d_sigma = (value.float().view(shape) for value in point)
        x_t = alpha * x1 + sigma * noise
        match self.config.prediction:
            case "velocity":
                target = d_alpha * x1 + d_sigma * noise
            case "v_prediction":
                target = alpha * noise - sigma * x1
            case "epsilon":
                target = noise
            case "sample":
                target = x1
        return (net(x_t, t, label) - target).square().mean()

    def checkpoint(self) -> bytes:
        buffer = io.BytesIO()
        torch.save(
            {
                "config": self.config.model_dump_json(),
                "iteration": self.iteration,
                "net": self.net.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "generator": self.generator.get_state(),
                "torch_generator": torch.get_rng_state(),
            },
            buffer,
        )
        return buffer.getvalue()

    def restore(self, data: bytes) -> None:
        """Go on from a checkpoint.

        Raises:
            ConfigError: It was made with another recipe.
        """
        state = torch.load(io.BytesIO(data), weights_only=True)
        ours, theirs = (json.loads(text) for text in (self.config.model_dump_json(), state["config"]))
        changed = [key for key in ours if ours[key] != theirs.get(key) and key not in ("storage", "threads")]
        if changed:
            raise ConfigError(
                f"the checkpoint of {self.config.name!r} was made with another {', '.join(changed)}; restore those "
                f"values, give the model another name, or delete its folder under {self.config.storage}/pretrain"
            )
        self.iteration = state["iteration"]
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])

    def facts(self) -> dict[str, Any]:
        """Losses of the averaged weights on fixed draws, and where they were trained."""
        losses = {}
        for name, (samples, labels) in {"train": self.data.train, "validation": self.data.validation}.items():
            generator = torch.Generator().manual_seed(1)
            count = min(len(samples), len(self.data.validation[0]))
            with torch.no_grad():
                draws = [self._loss(self.ema, samples[:count], labels[:count], generator).item() for _ in range(50)]
            losses[f"{name}_loss"] = round(sum(draws) / len(draws), 5)
        return {
            **losses,
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "training_samples": len(self.data.train[0]),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": _commit(),
        }


def _commit() -> str:
    """The commit of the code that trains, or 'unknown' outside a checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def model_card(config: PretrainConfig, facts: dict[str, Any]) -> str:
    """The model card, Markdown."""
    architecture = ", ".join(f"{key} {value}" for key, value in config.architecture.items())
    return f"""# {config.name}

A small class-conditional model of the zoo, for experiments with solvers. Not a model of record.

| | |
|---|---|
| data | `{config.dataset}`, {facts["training_samples"]} training samples, {config.validation_share:.0%} held out |
| network | {architecture}; {facts["parameters"]:,} parameters |
| prediction | {config.prediction} |
| scheduler | {config.scheduler} |
| recipe | AdamW, one-cycle rate up to {config.learning_rate:g}, weight decay {config.weight_decay:g}, \
batch {config.batch_size}, {config.iterations:,} iterations, EMA {config.ema_decay:g}, \
labels dropped {config.label_dropout:.0%} |
| seed | {config.seed} |
| loss of the averaged weights | training {facts["train_loss"]:.4f}, held out {facts["validation_loss"]:.4f} |
| trained with | torch {facts["torch"]}, Python {facts["python"]}, commit {facts["commit"]} |

![Samples, one column a class]({config.name}.png)

Label {config.architecture["classes"]} means "dropped": guidance mixes its prediction with the labelled one.

Made again by `bespoke pretrain sweeps/configs/pretrain/{config.name}.yaml`.
"""
