"""``torchscript``: an exported network behaves like its source module, derivatives included."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import own_networks
import pytest
import torch
from proofs import GUIDANCE, LABELS, errors, guided, influences, noise
from torch import Tensor

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.models.torchscript import TorchScript

DROPPED = torch.full_like(LABELS, own_networks.DROPPED)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flow network, traced and saved."""
    path = tmp_path_factory.mktemp("exported") / "flow.pt"
    torch.jit.save(torch.jit.trace(own_networks.Flow(), (torch.zeros(2, 1, 2, 3), torch.zeros(2), LABELS[:2])), path)
    return path


def build(file: Path, **changes: Any) -> TorchScript:
    """Build the adapter after its configuration check."""
    options: dict[str, Any] = {
        "file": str(file),
        "shape": [1, 2, 3],
        "prediction": "velocity",
        "native_scheduler": "cond_ot",
        "call": "x, t, y",
        "classes": own_networks.CLASSES,
        "null_label": own_networks.DROPPED,
    } | changes
    TorchScript.check(options)
    model: TorchScript = plugins.build("models", "torchscript", options)
    return model


def test_a_loop_over_the_exported_file_converges_to_the_ground_truth(exported: Path) -> None:
    """Guided Euler steps on the loaded file are within 1 % at 200 steps, and twice the steps halve the error."""
    network = torch.jit.load(exported)

    def sampler(x: Tensor, steps: int) -> Tensor:
        x = x.float()
        for t, next_t in itertools.pairwise(np.linspace(0, 1, steps + 1)):
            times, state = torch.full((len(x),), float(t)), x
            velocity = guided(lambda y, state=state, times=times: network(state, times, y), DROPPED, GUIDANCE)
            x = x + float(next_t - t) * velocity
        return x.double()

    coarse, middle, fine = errors(build(exported), sampler, (50, 100, 200), GUIDANCE)
    assert fine < 1e-2
    assert coarse / middle == pytest.approx(2, rel=0.15)
    assert middle / fine == pytest.approx(2, rel=0.15)


def test_the_velocity_depends_on_every_input(exported: Path) -> None:
    """State, time, label and guidance each change it by more than 1 %."""
    assert min(influences(build(exported)).values()) > 0.01


def test_its_gradient_is_that_of_the_source_module(exported: Path) -> None:
    """The gradient in the state equals that of the source module, so Adam works."""
    t = torch.tensor(0.4, dtype=torch.float64)
    gradients = []
    for velocity in (
        build(exported).field(LABELS, 1.0),
        lambda x, t: own_networks.Flow()(x, t.float().expand(len(x)), LABELS),
    ):
        x = noise((1, 2, 3)).float().requires_grad_()
        (gradient,) = torch.autograd.grad(velocity(x, t).square().sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_weights_are_frozen(exported: Path) -> None:
    """Only theta is trained."""
    assert not any(parameter.requires_grad for parameter in build(exported).net.parameters())


def test_the_digest_depends_on_the_file_and_the_options(exported: Path, tmp_path: Path) -> None:
    """A copy elsewhere is the same model; another option makes another model."""
    copy = tmp_path / "copy.pt"
    copy.write_bytes(exported.read_bytes())
    assert build(copy).digest == build(exported).digest != build(exported, time="1-t").digest


@pytest.mark.parametrize("content", ["weights", "bytes"])
def test_a_file_without_code_is_rejected_before_anything_starts(tmp_path: Path, content: str) -> None:
    """Weights alone belong to the adapter 'torch_module'."""
    path = tmp_path / "net.pt"
    if content == "weights":
        torch.save(own_networks.Flow().state_dict(), path)
    else:
        path.write_bytes(b"nothing")
    with pytest.raises(
        ConfigError, match=r"net\.pt is not TorchScript: it holds no code; .*the adapter 'torch_module'"
    ):
        build(path)


def test_a_damaged_file_is_rejected(tmp_path: Path) -> None:
    """It has the layout of TorchScript but is incomplete."""
    path = tmp_path / "damaged.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flow/code/__torch__.py", "class Flow")
    with pytest.raises(ConfigError, match=r"damaged\.pt cannot be loaded: .*export it again"):
        build(path).to("cpu")
