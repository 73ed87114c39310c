"""Trajectory matching: every state of the solver should lie on the ground-truth trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from orchestrator.objectives.base import SolverObjective
from orchestrator.pairs import PairSet
from solvers.field import VelocityField
from solvers.losses import MSE_FLOOR, per_sample_mse, psnr_loss
from solvers.ns import NSSolver


@dataclass(frozen=True)
class TrajectoryObjective(SolverObjective):
    """log of the weighted mean over states of ||x_k - x(t_k)||^2, the last state against x(1).

    Attributes:
        path_weight: Total weight of the intermediate states; the sample has weight 1 - path_weight. With 0 this is
            the PSNR loss.
    """

    path_weight: float = 0.5
    needs_trajectory = True
    source = "matching of intermediate states as in Zhou et al. 2024 (AMED-Solver), here of every state of theta"

    def __post_init__(self) -> None:
        if not 0 <= self.path_weight < 1:
            raise ValueError(f"path_weight must lie in [0, 1), got {self.path_weight}; the sample itself must count")

    @property
    def label(self) -> str:
        return f"trajectory {self.path_weight:g}"

    def per_sample(self, solver: NSSolver, field: VelocityField, pairs: PairSet) -> Tensor:
        assert pairs.path is not None
        states = [pairs.counted(state) for state in islice(solver.states(field, pairs.x0), 1, None)]
        truth = pairs.counted(pairs.x1)
        sample = states.pop()
        if not states or self.path_weight == 0:
            return psnr_loss(sample, truth)
        on_the_way = [
            per_sample_mse(state, pairs.counted(pairs.path.state(t)))
            for state, t in zip(states, solver.times[1:], strict=True)
        ]
        error = per_sample_mse(sample, truth) * (1 - self.path_weight)
        error = error + torch.stack(on_the_way).mean(dim=0) * self.path_weight
        return torch.log(error.clamp_min(MSE_FLOOR))


OBJECTIVE = TrajectoryObjective
