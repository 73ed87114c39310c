"""Peak signal-to-noise ratio against ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.metrics.base import PairMetric, check_comparable
from solvers.losses import per_sample_mse, psnr_db


@dataclass(frozen=True)
class PSNR(PairMetric):
    """10 log10(range^2 / MSE) per sample, dB, on unclipped floats (BNS section 5).

    The papers do not state the range; here it is the model's data range, 2 for data in [-1, 1]. +inf for an exact
    sample.
    """

    column = "psnr_db"
    higher_is_better = True
    name_with_unit = "PSNR (dB)"

    def per_sample(self, samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
        check_comparable(samples, reference)
        return psnr_db(per_sample_mse(samples.to(torch.float64), reference.to(torch.float64)), data_range)


METRIC = PSNR
