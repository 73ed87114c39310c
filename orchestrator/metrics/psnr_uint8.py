"""Peak signal-to-noise ratio of images as they are saved: clipped and rounded to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.features.inception import to_uint8
from orchestrator.metrics.base import PairMetric, check_comparable
from solvers.losses import per_sample_mse, psnr_db


@dataclass(frozen=True)
class PSNRUint8(PairMetric):
    """10 log10(255^2 / MSE) per image, dB, after decoding, clipping and rounding to 8 bits.

    Rounding alone limits it to about 59 dB; use the unrounded ``psnr`` above that. +inf for equal images.
    """

    column = "psnr_uint8_db"
    higher_is_better = True
    name_with_unit = "8-bit PSNR (dB)"
    sees = "images"

    def per_sample(self, samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
        check_comparable(samples, reference)
        mine, theirs = (to_uint8(images).to(torch.float64) for images in (samples, reference))
        return psnr_db(per_sample_mse(mine, theirs), 255.0)


METRIC = PSNRUint8
