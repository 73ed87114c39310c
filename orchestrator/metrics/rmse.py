"""Root mean squared error against ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.metrics.base import PairMetric, check_comparable
from solvers.losses import per_sample_mse


@dataclass(frozen=True)
class RMSE(PairMetric):
    """sqrt(||x_n - x(1)||^2) per sample, where the squared norm is a mean over dimensions (BST eq. 6)."""

    column = "rmse"
    higher_is_better = False
    name_with_unit = "RMSE"
    log_axis = True

    def per_sample(self, samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
        check_comparable(samples, reference)
        return per_sample_mse(samples.to(torch.float64), reference.to(torch.float64)).sqrt()


METRIC = RMSE
