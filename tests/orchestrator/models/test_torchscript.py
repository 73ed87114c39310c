"""``torchscript``: an exported network behaves like its source module, derivatives included."""

from __future__ import annotations

import zipfile
from pathlib import Path

import own_networks
import pytest
import torch
from adapter_examples import EXAMPLES
from proofs import LABELS, noise

from orchestrator.errors import ConfigError

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
