"""Adapter of zoo models: safetensors files whose metadata describe the network and how it was trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orchestrator import plugins
from orchestrator.audio.mel import RATE, vocode
from orchestrator.datasets.spoken_digits import SpokenDigits
from orchestrator.errors import ConfigError
from orchestrator.files import data_files
from orchestrator.models.base import ModelAdapter, expand_time
from orchestrator.models.zoo.nets import NETS, build_net
from orchestrator.plugins import FILE_OR_NAME
from orchestrator.weights.frozen import freeze

WEIGHTS = Path(__file__).parent / "weights"
METADATA_KEY = "bespoke_zoo"


def zoo_names() -> list[str]:
    """Names of the models whose weights ship with the package."""
    return [path.stem for path in data_files(WEIGHTS, [".safetensors"], below=False)]


def weights_path(weights: str) -> Path:
    """The path of a zoo model's file.

    Raises:
        ConfigError: The file does not exist; the message lists the existing names.
    """
    # The path is absolute because hosts run in other working directories.
    path = Path(weights).absolute() if weights.endswith(".safetensors") else WEIGHTS / f"{weights}.safetensors"
    if not path.is_file():
        hint = plugins.did_you_mean(weights, zoo_names())
        raise ConfigError(
            f"no zoo model {weights!r}{hint}; there are: {', '.join(zoo_names())}, or give the path of a "
            f".safetensors file"
        )
    return path


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the network description and the weights of a file.

    Raises:
        ConfigError: The file is not a zoo model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not a zoo model: {error}; make one with `bespoke pretrain`") from error
    return description, tensors


@dataclass
class ZooModel(ModelAdapter):
    """A small model of the zoo, or any other model trained by ``bespoke pretrain``.

    Attributes:
        weights: A name from ``bespoke list models``, or the path of a safetensors file written by ``bespoke pretrain``.
    """

    weights: str = field(metadata=FILE_OR_NAME)
    net: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path = weights_path(self.weights)
        self._load(path, *_read(path))

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if set(options) != {"weights"} or not isinstance(options["weights"], str):
            raise ConfigError(f"model adapter 'zoo' takes one option, 'weights', a name or a path; got {options}")
        weights_path(options["weights"])

    @classmethod
    def without_network(cls, options: dict[str, Any]) -> ZooModel:
        return cls(**options)  # its networks are small

    @classmethod
    def check_conditioning(cls, options: dict[str, Any], dataset: Any) -> None:
        path = weights_path(options["weights"])
        architecture = _read(path)[0]["architecture"]
        conditioning = NETS[architecture["net"]].conditioning
        speech = conditioning == "spoken_digits"
        if speech != isinstance(dataset, SpokenDigits):
            raise ConfigError(
                f"model {path.stem!r} is conditioned on {'strings to be spoken' if speech else 'class labels'}, which "
                f"{type(dataset).__name__} does not provide; set conditioning.name to {conditioning}"
            )
        if not speech:
            try:
                dataset.check_labels(architecture["classes"], f"model {path.stem!r}")
            except ValueError as error:
                raise ConfigError(str(error)) from error

    @classmethod
    def default_conditioning(cls, options: dict[str, Any]) -> dict[str, Any]:
        architecture = _read(weights_path(options["weights"]))[0]["architecture"]
        name = NETS[architecture["net"]].conditioning
        return {"name": name, "options": {"classes": architecture["classes"]} if name == "labels" else {}}

    def _load(self, path: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.net = build_net(description["architecture"])
        self.net.load_state_dict(tensors)
        freeze(self.net)
        self._own = self.net  # has null_condition and condition_error; ``net`` may be compiled
        self.name = path.stem
        self.shape = tuple(description["architecture"]["shape"])
        self.prediction = description["prediction"]
        self.native = plugins.build("schedulers", description["scheduler"])
        self.data_range = float(description["data_range"])
        self.rate = RATE if self.net.conditioning == "spoken_digits" else None
        self.parameters = sum(parameter.numel() for parameter in self.net.parameters())
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def to(self, device: str) -> ZooModel:
        self.net.to(device)
        return self

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        inner = x.to(torch.float32)
        return self.net(inner, expand_time(t, inner), condition).to(x.dtype)

    def sound(self, samples: Tensor) -> Tensor:
        """Convert log-mel frames to waves by the Griffin-Lim algorithm."""
        return torch.from_numpy(np.stack([vocode(frames) for frames in samples.float().cpu().numpy()]))

    def check_condition(self, condition: Tensor) -> None:
        error = self._own.condition_error(condition)
        if error is not None:
            raise ConfigError(f"model {self.name!r}: {error}")

    def null_condition(self, condition: Tensor) -> Tensor:
        null: Tensor = self._own.null_condition(condition)
        return null

    def encode_conditions(self, condition: Tensor, dataset: Any) -> Tensor:
        """Return labels; for spoken digits, return the infilling conditioning (prompt, mask and tokens)."""
        if isinstance(dataset, SpokenDigits):
            return dataset.infilling(condition.numpy())
        labels: Tensor = super().encode_conditions(condition, dataset)
        return labels
