"""Ways to get a frozen model wrong: what its examination must name."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.base import ModelAdapter
from solvers.prediction import Prediction
from solvers.schedulers import VP, CondOT, Cosine
from solvers.schedulers.base import Scheduler

Corruption = Callable[[ModelAdapter], ModelAdapter]

OTHER_SCHEDULER: dict[str, Scheduler] = {"cond_ot": Cosine(), "vp": CondOT(t_min=1e-3), "cosine": VP()}
"""The scheduler that a model of each scheduler is taken for."""

OTHER_PREDICTION: dict[str, tuple[Prediction, Scheduler]] = {
    "velocity": ("sample", CondOT(t_max=0.999)),
    "epsilon": ("v_prediction", VP()),
    "v_prediction": ("epsilon", Cosine(t_min=1e-3)),
}
"""The prediction that a model of each prediction is taken for, on a domain where it is defined."""


def changed(model: ModelAdapter, **attributes: Any) -> ModelAdapter:
    """A copy of the model with other attributes."""
    twin = copy.copy(model)
    vars(twin).update(attributes)
    return twin


def with_predict(change: Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor], Tensor]) -> Corruption:
    """A corruption of what the network gets or returns; ``change(predict, x, t, condition)`` returns the output."""
    return lambda model: changed(model, predict=lambda x, t, c, predict=model.predict: change(predict, x, t, c))


def other_scheduler(model: ModelAdapter) -> ModelAdapter:
    return changed(model, native=OTHER_SCHEDULER[model.native.name])


def other_prediction(model: ModelAdapter) -> ModelAdapter:
    prediction, native = OTHER_PREDICTION[model.prediction]
    return changed(model, prediction=prediction, native=native)


def student(model: ModelAdapter, steps: int = 4) -> ModelAdapter:
    """A network that predicts the end of the teacher's trajectory from any point of it, as consistency models do."""

    def predict(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        native = model.native(t)
        field = model.field(condition, 1.0)
        start = field.scheduler.time_at_angle(model.native.angle(t)).clamp(field.scheduler.t_min)
        point = field.scheduler(start)
        state = x.double() * float(torch.hypot(point.alpha, point.sigma) / torch.hypot(native.alpha, native.sigma))
        times = torch.linspace(float(start), field.scheduler.t_max, steps + 1, dtype=torch.float64)
        for time, after in itertools.pairwise(times):
            state = state + (after - time) * field(state, time)
        alpha, sigma = float(native.alpha), max(float(native.sigma), 1e-3)
        noise = (x - alpha * state) / sigma
        if model.prediction == "velocity":
            return (float(native.d_alpha) * state + float(native.d_sigma) * noise).to(x.dtype)
        outputs = {"epsilon": noise, "sample": state, "v_prediction": alpha * noise - sigma * state}
        return outputs[model.prediction].to(x.dtype)

    return changed(model, predict=predict)


def random_layers(model: ModelAdapter) -> ModelAdapter:
    """Every third of the later matrices has random weights of its own size, as if they had not been loaded."""
    net = copy.deepcopy(model.net)  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    matrices = [weight for weight in net.parameters() if weight.ndim > 1]
    with torch.no_grad():
        for weight in matrices[len(matrices) // 2 :: 3]:
            weight.copy_(weight.std() * torch.randn(weight.shape, generator=generator))
    return changed(model, net=net)


def condition_ignored(model: ModelAdapter) -> ModelAdapter:
    null = model.null_condition
    return with_predict(lambda predict, x, t, c: predict(x, t, null(c)))(model)


CORRUPTIONS: dict[str, Corruption] = {
    "sign of the output": with_predict(lambda predict, x, t, c: -predict(x, t, c)),
    "time in thousandths": with_predict(lambda predict, x, t, c: predict(x, t * 1000, c)),
    "time reversed": with_predict(lambda predict, x, t, c: predict(x, 1 - t, c)),
    "time ignored": with_predict(lambda predict, x, t, c: predict(x, torch.full_like(t, 0.5), c)),
    "time in steps of 0.01": with_predict(lambda predict, x, t, c: predict(x, (t * 100).floor() / 100, c)),
    "other scheduler": other_scheduler,
    "other prediction": other_prediction,
    "input doubled": with_predict(lambda predict, x, t, c: predict(2 * x, t, c)),
    "output halved": with_predict(lambda predict, x, t, c: predict(x, t, c) / 2),
    "data range halved": lambda model: changed(model, data_range=model.data_range / 2),
    "dropout on": with_predict(lambda predict, x, t, c: torch.nn.functional.dropout(predict(x, t, c), 0.1)),
    "one-step student": student,
    "layers random": random_layers,
    "condition ignored": lambda model: with_predict(lambda predict, x, t, c: predict(x, t, model.null_condition(c)))(
        model
    ),
}
"""By name. Every entry makes another model of a sane one, and leaves that as it is."""
