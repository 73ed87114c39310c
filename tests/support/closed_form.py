"""Models whose denoiser is known in closed form: mixtures of Gaussians, also on a plane in more dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.models.base import ModelAdapter
from solvers.field import per_sample
from solvers.prediction import Prediction
from solvers.schedulers.base import PathPoint, Scheduler
from solvers.schedulers.cond_ot import CondOT


class Mixture(ModelAdapter):
    """The exact network of a Gaussian mixture; its label, if it has several, selects the component.

    Args:
        means: Means of the components, (K, d).
        scale: Standard deviation of every component in d dimensions.
        shape: Shape of a sample. With more than d numbers the data lie on a random plane of d dimensions.
        native: The scheduler.
        prediction: What the network predicts.
        labelled: Whether the label selects the component.
        data_range: Declared data range.
    """

    name = "mixture"
    parameters = 0
    digest = "closed form"

    def __init__(
        self,
        means: Sequence[Sequence[float]] | Tensor,
        scale: float,
        shape: tuple[int, ...],
        native: Scheduler | None = None,
        prediction: Prediction = "velocity",
        labelled: bool = False,
        data_range: float = 4.0,
    ):
        self.means, self.scale, self.shape = torch.as_tensor(means, dtype=torch.float64), scale, shape
        self.native, self.prediction, self.labelled, self.data_range = (
            native or CondOT(),
            prediction,
            labelled,
            data_range,
        )
        size, d = math.prod(shape), self.means.shape[1]
        random = torch.randn(size, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.plane = torch.eye(size, dtype=torch.float64) if size == d else torch.linalg.qr(random).Q

    def to(self, device: str) -> Mixture:
        assert device == "cpu"
        return self

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, -1)

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = (per_sample(value, x.double()) for value in PathPoint(*self.native(t)))
        data = self.denoised(x.double(), alpha, sigma, condition)
        noise = (x - alpha * data) / sigma.clamp_min(1e-12)
        outputs = {
            "sample": data,
            "epsilon": noise,
            "velocity": d_alpha * data + d_sigma * noise,
            "v_prediction": alpha * noise - sigma * data,
        }
        return outputs[self.prediction].to(x.dtype)

    def denoised(self, x: Tensor, alpha: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """E[x1 | x] of the component of the label, or of the whole mixture."""
        z = x.flatten(1) @ self.plane
        a, s = (value.reshape(-1, 1) if value.ndim else value for value in (alpha, sigma))
        variance = a**2 * self.scale**2 + s**2
        away = z[:, None] - (a * self.means[None].expand(len(z), -1, -1).flatten(1)).view(len(z), *self.means.shape)
        weights = -away.square().sum(2) / (2 * variance)
        if self.labelled:
            other = condition[:, None] != torch.arange(len(self.means))
            weights = weights.masked_fill(other & (condition >= 0)[:, None], -math.inf)
        shrunk = self.means + (a * self.scale**2 / variance).reshape(-1, 1, 1) * away
        return ((weights.softmax(1)[:, :, None] * shrunk).sum(1) @ self.plane.T).view_as(x)
