"""Freezes networks: while a solver is distilled, only theta learns."""

from __future__ import annotations

import torch


def freeze(module: torch.nn.Module) -> torch.nn.Module:
    """Put the module in evaluation mode and switch off gradients of its weights, in place; returns it."""
    return module.eval().requires_grad_(False)
