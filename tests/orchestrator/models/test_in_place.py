"""Networks that change their inputs in place, or reuse their outputs' memory, give the numbers of those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from orchestrator import plugins
from orchestrator.models.base import ModelAdapter
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs.ground_truth import solve
from solvers.batched import sample_batched
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.field import FunctionField
from solvers.grids import Grid
from solvers.ns import NSSolver
from solvers.schedulers import CondOT

SUPPORT = Path(__file__).parents[2] / "support"

OWN: dict[str, dict[str, Any]] = {
    "flow": {"factory": "own_networks:Flow", "prediction": "velocity", "native_scheduler": "cond_ot"},
    "noise": {
        "factory": "own_networks:Noise",
        "prediction": "epsilon",
        "native_scheduler": "discrete_vp",
        "time": "timestep",
    },
}
LABELLED = {"path": str(SUPPORT), "shape": [1, 2, 3], "call": "x, t, y", "classes": 3, "null_label": 3}


def model_of(name: str) -> ModelAdapter:
    """The model of that name, new."""
    if name in OWN:
        return plugins.build("models", "torch_module", LABELLED | OWN[name])
    if name.startswith("zoo:"):
        return ZooModel(name.removeprefix("zoo:"))
    pytest.importorskip("transformers")
    import tiny_pipelines

    from orchestrator.models.diffusers import DiffusersModel

    pipe = tiny_pipelines.KINDS[name][0]()
    return DiffusersModel.of(pipe, tiny_pipelines.sample_size(pipe))


def spoil(model: ModelAdapter) -> None:
    """Make the network overwrite all of its inputs after each call, and its last output at the next call."""
    net: Any = model.network.net if hasattr(model, "network") else model.net  # type: ignore[attr-defined]
    memory: list[Tensor] = []

    def overwrite(module: Any, inputs: Any, named: Any, output: Any) -> Any:
        answer = output[0] if isinstance(output, tuple) else output
        if not memory or memory[0].shape != answer.shape:
            memory[:] = [answer.clone()]
        memory[0].copy_(answer)
        tree_map(lambda value: value.zero_() if isinstance(value, Tensor) else value, (inputs, named))
        return (memory[0],) if isinstance(output, tuple) else memory[0]

    net.register_forward_hook(overwrite, with_kwargs=True)


def numbers(model: ModelAdapter, scale: float) -> dict[str, Tensor]:
    """Every way in which states, times and conditions reach a network and are used again afterwards."""
    x0 = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    condition = torch.tensor([0, 1])
    if hasattr(model, "network") and hasattr(model.network, "encode"):
        condition = model.network.encode(["a cat", "two dogs"])
    elif getattr(model, "name", "").startswith("ddpm"):
        condition = torch.zeros(2, dtype=torch.int64)
    kept = x0.clone(), condition.clone()
    field = model.field(condition, scale)
    solver = GridSolver(Midpoint(), 6, Grid()).to_ns(model.scheduler)
    middle = torch.tensor(0.4, dtype=torch.float64)
    with torch.no_grad():
        found = {
            "float32": solver.sample(field, x0),
            "float64": solver.sample(field, x0.double()),
            "truth": solve(field, x0, 1e-2, 1e-2).x1,
            "batched": sample_batched(
                torch.stack([solver.flat(), solver.flat()]),
                model.field(torch.cat([condition, condition]), scale),
                torch.stack([x0, x0]),
            ),
            "twice": torch.stack([field(x0, middle), field(x0, middle)]),
            "per sample": field(x0, middle.expand(2).clone()),
        }
    assert torch.equal(x0, kept[0])
    assert torch.equal(condition, kept[1])
    assert middle == 0.4
    return found


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("flow", 1.0),
        ("flow", 2.0),
        ("noise", 1.0),
        ("noise", 2.0),
        ("zoo:digits_fm_ot", 1.0),
        ("zoo:digits_eps_vp", 2.0),
        ("dit", 3.0),
        ("sd-epsilon", 1.0),
        ("sdxl", 3.0),
        ("flux", 3.5),
        ("stable-audio", 1.0),
    ],
)
def test_what_a_network_does_to_its_tensors_changes_no_number(name: str, scale: float) -> None:
    """States, velocities, times and conditions are those of an adapter whose network leaves its inputs alone."""
    expected = numbers(model_of(name), scale)
    model = model_of(name)
    spoil(model)
    spoiled = numbers(model, scale)
    for way, value in expected.items():
        assert torch.equal(spoiled[way], value), way


class Halves(torch.nn.Module):
    """A linear velocity; halves its input first, in place if asked to."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.in_place, self.weight = in_place, torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.div_(2) if self.in_place else x / 2
        return torch.tanh(x) * self.weight


def test_gradients_pass_through_a_network_that_works_in_place() -> None:
    """The gradient in theta and the tangent in the state are those of the same network without in-place operations."""
    x0 = torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for in_place in (False, True):
        model = plugins.build(
            "models",
            "torch_module",
            {
                "factory": f"{__name__}:Halves",
                "kwargs": {"in_place": in_place},
                "shape": [1, 2, 3],
                "prediction": "sample",
                "native_scheduler": {"name": "cond_ot", "options": {"t_max": 0.99}},
            },
        )
        field = model.field(torch.zeros(3, dtype=torch.int64), 1.0)
        flat = GridSolver(Midpoint(), 4, Grid()).to_ns(model.scheduler).flat().requires_grad_(True)
        (gradient,) = torch.autograd.grad(NSSolver.from_flat(flat).sample(field, x0).square().sum(), flat)
        _, tangent = torch.func.jvp(lambda x, f=field: f(x, torch.tensor(0.5, dtype=torch.float64)), (x0,), (x0,))
        found.append((gradient, tangent))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_ground_truth_protects_its_state_from_any_field() -> None:
    """A field of one's own is called with a copy of the ODE's state."""
    x0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    clean = solve(FunctionField(lambda x, t: -x, CondOT()), x0, 1e-4, 1e-4)
    in_place = solve(FunctionField(lambda x, t: x.neg_(), CondOT()), x0, 1e-4, 1e-4)
    assert torch.equal(clean.x1, in_place.x1)
