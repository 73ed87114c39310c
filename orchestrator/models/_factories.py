"""Building of third-party networks by their factories."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from orchestrator.errors import RAISED, describe


def build_module(factory: Callable[..., Any], name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a network by calling its factory.

    Raises:
        ValueError: The factory fails, or does not return a module.
    """
    try:
        module = factory(**copy.deepcopy(dict(kwargs)))  # a factory may change what it is given
    except RAISED as error:  # the constructor may raise anything
        raise ValueError(f"{name} with kwargs {dict(kwargs)} fails: {describe(error, called=True)}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, got {type(module).__name__}")
    return module


def build_without_weights(factory: Callable[[], Any]) -> Any:
    """Build a module for its shapes, without allocating memory for weights if its constructor allows that."""
    try:
        with torch.device("meta"):
            return factory()
    except RAISED:
        # Constructors that compute with tensor values fail on the meta device. Any other error is raised again here.
        return factory()
