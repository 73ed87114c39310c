"""The picture of theta shows every number with its sign, also to readers who see no colours."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from orchestrator.reports.drawing.theta import draw_theta
from solvers.ns import NSSolver


def _random(nfe: int) -> NSSolver:
    generator = torch.Generator().manual_seed(nfe)
    times = torch.rand(nfe, dtype=torch.float64, generator=generator).sort().values
    a = torch.randn(nfe + 1, dtype=torch.float64, generator=generator)
    b = torch.randn(nfe + 1, nfe, dtype=torch.float64, generator=generator).tril(-1)
    return NSSolver(times, a, b)


@pytest.mark.parametrize("nfe", [1, 8, 20])
def test_every_number_has_a_cell_and_every_negative_one_a_sign(nfe: int) -> None:
    """Numbers are written up to NFE 12, the minus signs of larger thetas without them."""
    theta = _random(nfe)
    figure = draw_theta(theta, {"start": _random(nfe)})
    try:
        times, cells = figure.axes[:2]
        np.testing.assert_array_equal(times.lines[1].get_xdata(), theta.times.numpy())
        shown = cells.images[0].get_array()
        assert shown is not None
        assert int((~np.isnan(np.ma.filled(shown, np.nan))).sum()) == (nfe + 1) + nfe * (nfe + 1) // 2
        texts = [text.get_text() for text in cells.texts]
        numbers = np.concatenate([theta.a.numpy(), theta.b[tuple(torch.tril_indices(nfe + 1, nfe, -1))].numpy()])
        assert sum(text.startswith("−") for text in texts) == int((numbers < 0).sum())
        if nfe <= 12:
            assert sorted(float(text.replace("−", "-")) for text in texts) == sorted(
                float(f"{number:.2f}") for number in numbers
            )
    finally:
        plt.close(figure)


def test_a_theta_of_zeros_can_be_drawn() -> None:
    """A degenerate theta costs no report."""
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    figure = draw_theta(NSSolver(zeros[0], zeros[:, 0], zeros), {})
    plt.close(figure)
