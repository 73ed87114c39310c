"""Names and devices of models that a user did not give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.models.base import ModelAdapter


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._") or "model"


def name_of(network: Any) -> str:
    """Name of a function, or of a module's class."""
    name = getattr(network, "__name__", None) or type(network).__name__
    return "model" if name == "<lambda>" else str(name)


def title(adapter: str, options: Mapping[str, Any]) -> str:
    """Name of a model from files: that of its weights, file, class or pipeline."""
    for option in ("weights", "file", "factory", "pipeline"):
        if isinstance(options.get(option), str):
            text = str(options[option])
            return Path(text).stem if option != "factory" else text.rpartition(":")[2]
    return adapter


def device_of(adapter: ModelAdapter) -> str | None:
    """Device of an adapter's network, its own or its pipeline's; None if it has none."""
    network = getattr(adapter, "net", None) or getattr(getattr(adapter, "network", None), "net", None)
    weight = next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None
    return None if weight is None else str(weight.device)
