"""A metric plugin for the tests: it measures images and needs no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import orchestrator.metrics

PLUGIN = '''
from dataclasses import dataclass

import torch

from orchestrator.metrics.base import MeanMetric


@dataclass(frozen=True)
class Brightness(MeanMetric):
    """The mean of all pixels of an image, plus an offset."""

    offset: float = 0.0
    higher_is_better = True
    sees = "images"
    column = "brightness"

    def measure(self, batch):
        assert torch.isfinite(batch.samples).all()
        return batch.samples.double().flatten(1).mean(1, keepdim=True) + self.offset


METRIC = Brightness
'''


@pytest.fixture
def brightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a metric that scorers measure."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    (folder / "brightness.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.setattr(orchestrator.metrics, "__path__", [*orchestrator.metrics.__path__, str(folder)])
    return "brightness"
