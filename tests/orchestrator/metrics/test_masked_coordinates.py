"""Errors by coordinate and masks do not go together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.datasets.tensors import Tensors
from orchestrator.errors import ConfigError
from orchestrator.metrics.coordinate_rmse import CoordinateRMSE


def test_coordinates_of_masked_samples_are_refused(tmp_path: Path) -> None:
    """Samples with few counted entries would weigh more."""
    file = str(tmp_path / "rows.npz")
    np.savez(file, mask=np.ones((10, 2)))
    with pytest.raises(ConfigError, match=r"'coordinate_rmse' weighs .* mask 'mask' leaves out entries .* use 'rmse'"):
        CoordinateRMSE().check(Tensors(file=file, mask="mask"))
    CoordinateRMSE().check(Tensors(file=file))
