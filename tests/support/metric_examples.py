"""Metrics that compare pairs, built for the contract tests: those that need weights get random ones."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest

from orchestrator import plugins
from orchestrator.metrics.base import Metric


@cache
def built(name: str) -> Metric:
    """The metric of this name; skips the test if it needs a package that is not installed."""
    return plugins.build("metrics", name, {"trunk": "squeeze", "weights": _squeezenet()} if name == "lpips" else {})


@cache
def _squeezenet() -> str:
    """A file of the smallest trunk of LPIPS as torchvision has it, with random weights."""
    import torch

    pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    path = Path(tempfile.gettempdir()) / f"squeezenet-random-{torchvision.__version__}.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return str(path)
