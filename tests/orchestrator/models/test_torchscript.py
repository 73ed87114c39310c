"""``torchscript``: an exported network behaves like its source module, derivatives included."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import own_networks
import pytest
import torch
from adapter_examples import EXAMPLES
from proofs import LABELS, noise
from torch import Tensor, nn

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.models.base import ModelAdapter

EXAMPLE = EXAMPLES["torchscript"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flow network, traced and saved."""
    return EXAMPLE.write(tmp_path_factory.mktemp("exported"))


def test_its_gradient_is_that_of_the_source_module(exported: Path) -> None:
    """The gradient in the state equals that of the source module, so Adam works."""
    t = torch.tensor(0.4, dtype=torch.float64)
    gradients = []
    for velocity in (
        EXAMPLE.build(exported).field(LABELS, 1.0),
        lambda x, t: own_networks.Flow()(x, t.float().expand(len(x)), LABELS),
    ):
        x = noise((1, 2, 3)).float().requires_grad_()
        (gradient,) = torch.autograd.grad(velocity(x, t).square().sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_weights_alone_are_rejected(tmp_path: Path) -> None:
    """They belong to the adapter 'torch_module'."""
    path = tmp_path / "net.pt"
    torch.save(own_networks.Flow().state_dict(), path)
    with pytest.raises(
        ConfigError, match=r"net\.pt is not TorchScript: it holds no code; .*the adapter 'torch_module'"
    ):
        EXAMPLE.build(path)


def test_a_damaged_file_is_rejected(tmp_path: Path) -> None:
    """It has the layout of TorchScript but is incomplete."""
    path = tmp_path / "damaged.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flow/code/__torch__.py", "class Flow")
    with pytest.raises(ConfigError, match=r"damaged\.pt cannot be loaded: .*export it again"):
        EXAMPLE.build(path).to("cpu")


class Layer(nn.Module):
    """A velocity that computes in the dtype of its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.flatten(1)) + t.to(x.dtype)[:, None]).view(x.shape)


def frozen(module: nn.Module, folder: Path, **options: Any) -> ModelAdapter:
    """The adapter of the module as frozen TorchScript, which has no parameters."""
    torch.jit.save(torch.jit.freeze(torch.jit.script(module.eval())), folder / "net.pt")
    described = {"shape": [1, 2, 3], "prediction": "velocity", "native_scheduler": "cond_ot"}
    return plugins.build("models", "torchscript", described | {"file": str(folder / "net.pt")} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_frozen_network_computes_in_the_dtype_of_its_constants(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its weights are constants of its code; it answers, and is counted, like the network that is not frozen."""
    module = Layer().to(dtype)
    model = frozen(module, tmp_path).to("cpu")
    x, t = noise((1, 2, 3)).float(), torch.tensor(0.4, dtype=torch.float64)
    velocity = model.field(torch.zeros(len(x), dtype=torch.int64), 1.0)(x, t)
    assert model.network_dtype == dtype
    assert model.parameters == sum(weight.numel() for weight in module.parameters())
    time = t.to(torch.promote_types(dtype, torch.float32)).expand(len(x))
    torch.testing.assert_close(velocity, module(x.to(dtype), time).float())


class Unconverted(Layer):
    """The same in float64, whose only constant is in float32."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.matmul(x.flatten(1), torch.eye(6, dtype=torch.float64)).view(x.shape) * torch.ones(1)


def test_a_network_without_weights_is_tried_out(tmp_path: Path) -> None:
    """Only float64 works; the option says so as well, and enters the digest then."""
    model = frozen(Unconverted(), tmp_path)
    assert model.network_dtype == torch.float64  # type: ignore[attr-defined]
    told = frozen(Unconverted(), tmp_path, dtype="float64")
    assert told.network_dtype == torch.float64  # type: ignore[attr-defined]
    assert told.digest != model.digest


def test_a_frozen_network_that_fails_in_every_dtype_is_rejected(tmp_path: Path) -> None:
    """Another shape than the network's; the message quotes the network and names the options."""
    model = frozen(Layer(), tmp_path, shape=[1, 3, 3])
    with pytest.raises(
        ConfigError, match=r"net is frozen, and fails with an input of any dtype \(float32: .*set dtype"
    ):
        model.field(torch.zeros(2, dtype=torch.int64), 1.0)(torch.zeros(2, 1, 3, 3), torch.tensor(0.5))


def test_an_unknown_dtype_is_rejected(tmp_path: Path) -> None:
    """The message lists the dtypes."""
    with pytest.raises(
        ConfigError, match=r"dtype 'half' is unknown; choose one of float32, float64, bfloat16, float16"
    ):
        frozen(Layer(), tmp_path, dtype="half")
