"""Trains zoo models: flow-matching and diffusion losses on one dataset, with EMA and resumable checkpoints.

Hosts never train. This module does not depend on distillation, pairs or Ray.
"""

from __future__ import annotations

import copy
import io
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from safetensors.torch import save
from torch import Tensor

from orchestrator import plugins
from orchestrator.config.base import PluginConfig, Source, Strict, as_plugin
from orchestrator.datasets.base import LabelledSamples
from orchestrator.datasets.spoken_digits import SpokenDigits
from orchestrator.errors import ConfigError
from orchestrator.models.base import AUTOCAST, Precision
from orchestrator.models.zoo.adapter import METADATA_KEY
from orchestrator.models.zoo.nets import build_net
from orchestrator.storage import Storage
from orchestrator.training.data import LabelledData, Split, SpokenStrings, TrainingData
from orchestrator.weights.frozen import freeze
from solvers.schedulers.base import Scheduler

VALIDATION_DRAWS = 50
VALIDATION_BATCH = 256


class PretrainConfig(Strict):
    """Configuration of ``bespoke pretrain``: the training recipe of a zoo model.

    Attributes:
        dataset: Dataset plugin that has training samples: a name, or ``{name: ..., options: {...}}``.
        flip: Whether training images are mirrored at random, each with probability 1/2.
        precision: Precision of the network's computations in training; weights, loss and optimiser are float32.
        device: Device; 'auto' means the first GPU, or the CPU if there is none.
        weights_dtype: Dtype of the stored weights. They are loaded as float32.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    dataset: Annotated[Source, BeforeValidator(as_plugin)] = PluginConfig(name="digits")
    flip: bool = False
    architecture: dict[str, Any]
    prediction: Literal["velocity", "v_prediction", "epsilon", "sample"]
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
    precision: Precision = "float32"
    device: str = "auto"
    weights_dtype: Literal["float32", "float16"] = "float32"
    threads: int = Field(2, ge=1)
    storage: str = "bespoke-data"


PLACES = ("folder", "path", "file")
"""Options of datasets that say where the files are, which the model card leaves out."""

ELSEWHERE = ("storage", "threads", "device")
"""Settings that may differ when a run resumes from a checkpoint."""

Progress = Callable[[int, float], None]
"""``progress(iteration, loss)``, called after each iteration."""

Record = Callable[[int, Mapping[str, float]], None]
"""``record(iteration, metrics)``, called at each checkpoint."""


def train(config: PretrainConfig, output: Path, progress: Progress, record: Record | None = None) -> dict[str, Any]:
    """Train to the end, resuming from the last checkpoint, and write ``{name}.safetensors`` and its model card.

    Args:
        config: The recipe.
        output: Folder for weights and card.
        progress: Called after each iteration.
        record: Called with the losses at each checkpoint.

    Returns:
        Facts for the model card: final training and validation loss, sizes, versions.

    Raises:
        ConfigError: The dataset has no samples to train on, or the architecture is not valid.
    """
    torch.set_num_threads(config.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    data = training_data(config, device)
    storage = Storage.at(config.storage)
    checkpoint_key = f"pretrain/{config.name}/checkpoint.pt"
    try:
        run = _Run(config, data, device)
    except ValueError as error:
        raise ConfigError(f"pretraining {config.name!r}: {error}") from error
    if storage.exists(checkpoint_key):
        run.restore(storage.read(checkpoint_key))
    losses: list[float] = []
    while run.iteration < config.iterations:
        losses.append(run.step())
        progress(run.iteration, losses[-1])
        if run.iteration % config.checkpoint_every == 0 or run.iteration == config.iterations:
            storage.write(checkpoint_key, run.checkpoint())
            if record is not None:
                record(run.iteration, {"loss": sum(losses) / len(losses), **run.losses()})
            losses.clear()
    facts = run.facts()
    output.mkdir(parents=True, exist_ok=True)
    target = Storage.at(output)
    description = {
        "architecture": config.architecture,
        "prediction": config.prediction,
        "scheduler": config.scheduler,
        "data_range": data.data_range,
    }
    dtype = getattr(torch, config.weights_dtype)
    weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in run.ema.state_dict().items()}
    target.write(f"{config.name}.safetensors", save(weights, {METADATA_KEY: json.dumps(description, sort_keys=True)}))
    target.write(f"{config.name}.md", model_card(config, facts).encode())
    storage.delete(checkpoint_key)
    return facts


def training_data(config: PretrainConfig, device: str) -> TrainingData:
    """Training data of a recipe; a fixed share of the samples is held out.

    Raises:
        ConfigError: The dataset has no samples to train on, or its files are missing.
    """
    name = config.dataset.name
    dataset = plugins.build("datasets", name, config.dataset.options)
    try:
        if isinstance(dataset, SpokenDigits):
            return SpokenStrings(dataset, SpokenDigits(), device)
        reference = dataset.reference()
    except ValueError as error:
        raise ConfigError(f"dataset {name!r}: {error}") from error
    if reference is None:
        raise ConfigError(f"dataset {name!r} has no samples to train on; choose one that has, e.g. digits")
    order = torch.randperm(len(reference.labels), generator=torch.Generator().manual_seed(config.seed)).numpy()
    shuffled = LabelledSamples(reference.samples[order], reference.labels[order])
    return LabelledData(shuffled, config.validation_share, config.flip, device)


class _Run:
    """State of a training run: network, EMA, optimiser, and random generator."""

    def __init__(self, config: PretrainConfig, data: TrainingData, device: str):
        self.config, self.data, self.device = config, data, device
        torch.manual_seed(config.seed)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.net: Any = build_net(config.architecture).to(device)
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
        """Train for one iteration and return its loss."""
        loss = self._loss(self.net, "train", self.config.batch_size, self.config.label_dropout, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.iteration += 1
        # A short averaging horizon at first, so that the initial weights soon drop out of the average.
        decay = min(self.config.ema_decay, self.iteration / (self.iteration + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        return loss.item()

    def _loss(
        self, net: torch.nn.Module, split: Split, count: int, label_dropout: float, generator: torch.Generator
    ) -> Tensor:
        """Mean squared error of the prediction at x_t = alpha x1 + sigma eps, with t uniform in [0, 1)."""
        x1, condition = self.data.batch(split, count, generator)
        if label_dropout:
            drop = torch.rand(count, generator=generator, device=generator.device) < label_dropout
            drop = drop.view(-1, *(1,) * (condition.ndim - 1))
            condition = torch.where(drop, self.net.null_condition(condition), condition)
        t = torch.rand(count, generator=generator, device=generator.device)
        noise = torch.randn(x1.shape, generator=generator, device=generator.device)
        shape = (-1,) + (1,) * (x1.ndim - 1)
        # On some paths the derivative of sigma is infinite at t = 1; only velocity targets use it.
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
        dtype = AUTOCAST[self.config.precision]
        with torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not None):
            output = net(x_t, t, condition)
        return (output.float() - target).square().mean()

    def checkpoint(self) -> bytes:
        """Serialise the state of the run."""
        buffer = io.BytesIO()
        torch.save(
            {
                "config": self.config.model_dump_json(exclude=set(ELSEWHERE)),
                "iteration": self.iteration,
                "net": self.net.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "generator": self.generator.get_state(),
                "torch_generator": _global_generator(self.device).get_state(),
            },
            buffer,
        )
        return buffer.getvalue()

    def restore(self, data: bytes) -> None:
        """Resume from a checkpoint.

        Raises:
            ConfigError: The checkpoint was made with another recipe.
        """
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        settings, stored = self.config.model_dump(mode="json", exclude=set(ELSEWHERE)), json.loads(state["config"])
        changed = [key for key in settings if settings[key] != stored.get(key)]
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
        _global_generator(self.device).set_state(state["torch_generator"])

    def losses(self) -> dict[str, float]:
        """Mean losses of the averaged weights on fixed draws, without label dropout."""
        losses = {}
        for split in ("train", "validation"):
            generator = torch.Generator(self.device).manual_seed(1)
            count = min(VALIDATION_BATCH, self.data.sizes["validation"])
            with torch.no_grad():
                draws = [self._loss(self.ema, split, count, 0.0, generator).item() for _ in range(VALIDATION_DRAWS)]
            losses[f"{split}_loss"] = round(sum(draws) / len(draws), 5)
        return losses

    def facts(self) -> dict[str, Any]:
        """Losses, sizes, and versions of the software the weights were trained with."""
        return {
            **self.losses(),
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "training_samples": self.data.sizes["train"],
            "held_out_samples": self.data.sizes["validation"],
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": _commit(),
        }


def _global_generator(device: str) -> torch.Generator:
    """The default generator of the device, which dropout layers draw from."""
    parsed = torch.device(device)
    return torch.cuda.default_generators[parsed.index or 0] if parsed.type == "cuda" else torch.default_generator


def _commit() -> str:
    """Short hash of the checkout's commit, or 'unknown' outside a checkout."""
    process = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return process.stdout.strip() or "unknown"


def model_card(config: PretrainConfig, facts: dict[str, Any]) -> str:
    """The model card as Markdown."""
    architecture = ", ".join(f"{key} {value}" for key, value in config.architecture.items())
    classes = config.architecture.get("classes")
    kind = "class-conditional model" if classes is not None else "speech-infilling model"
    if classes is not None:
        columns = "Samples, one column per class"
        dropped = f'Label {classes} means "dropped": guidance combines its prediction with that of the class label.'
    else:
        columns = "Masked input, sample, and recording"
        dropped = "Without prompt and digits the model is unconditional: guidance combines both predictions."
    options = "".join(f", {key} {value}" for key, value in config.dataset.options.items() if key not in PLACES)
    return f"""# {config.name}

A small {kind} from the zoo, for experiments with solvers. It is not a reference model for its dataset.

| | |
|---|---|
| data | `{config.dataset.name}`{options}, {facts["training_samples"]:,} training samples, \
{facts["held_out_samples"]:,} held out |
| network | {architecture}; {facts["parameters"]:,} parameters |
| prediction | {config.prediction} |
| scheduler | {config.scheduler} |
| recipe | AdamW, one-cycle rate up to {config.learning_rate:g}, weight decay {config.weight_decay:g}, \
batch {config.batch_size}, {config.iterations:,} iterations, EMA {config.ema_decay:g}, \
labels dropped {config.label_dropout:.0%} |
| seed | {config.seed} |
| loss of the averaged weights | training {facts["train_loss"]:.4f}, held out {facts["validation_loss"]:.4f} |
| trained with | torch {facts["torch"]}, Python {facts["python"]}, commit {facts["commit"]} |

![{columns}]({config.name}.png)

{dropped}

Reproduce it with `bespoke pretrain sweeps/configs/pretrain/{config.name}.yaml`.
"""
