"""Signal-to-noise ratio against ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.metrics.base import PairMetric, check_comparable


@dataclass(frozen=True)
class SNR(PairMetric):
    """10 log10(sum x^2 / sum (x - x-hat)^2) per sample, dB (BNS section 5.4, for audio features).

    Unlike PSNR, it is relative to the energy of each sample. +inf for an exact sample.
    """

    column = "snr_db"
    higher_is_better = True
    name_with_unit = "SNR (dB)"

    def per_sample(self, samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
        check_comparable(samples, reference)
        signal = reference.to(torch.float64).flatten(1)
        error = signal - samples.to(torch.float64).flatten(1)
        return 10 * (torch.log10(signal.square().sum(dim=1)) - torch.log10(error.square().sum(dim=1)))


METRIC = SNR
