"""Freezes networks: while a solver is distilled, only theta learns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def freeze(module: torch.nn.Module) -> torch.nn.Module:
    """Put the module in evaluation mode and switch off gradients of its weights, in place; returns it."""
    return module.eval().requires_grad_(False)


@contextmanager
def frozen(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Freeze modules of the user's for a while; afterwards their modes, and their weights' gradients, are as before."""
    modules = list(modules)
    training = [(part, part.training) for module in modules for part in module.modules()]
    learning = [(weight, weight.requires_grad) for module in modules for weight in module.parameters()]
    for module in modules:
        freeze(module)
    try:
        yield
    finally:
        for part, mode in training:
            part.training = mode
        for weight, learns in learning:
            weight.requires_grad_(learns)
