"""LPIPS features: their squared distance equals that of the reference package. Weights are torchvision files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.features.lpips import FILES, LPIPS

pytest.importorskip("lpips")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file as torchvision downloads it, but with random weights so that nothing has to be downloaded."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub") / FILES["alex"]
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def features(weights: Path) -> LPIPS:
    return LPIPS(weights=str(weights))


def _images(channels: int, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    first, second = torch.rand(2, 3, channels, size, size, generator=generator) * 2 - 1
    return first, second


def test_the_squared_distance_of_features_is_lpips(features: LPIPS) -> None:
    """Compared with the reference package on the same trunk."""
    first, second = _images(3)
    expected = features.net(first, second).flatten()
    distances = (features(first) - features(second)).square().sum(dim=1)
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-6)


def test_one_channel_is_shown_as_grey(features: LPIPS) -> None:
    """A viewer would show it the same way."""
    first, _ = _images(1)
    torch.testing.assert_close(features(first), features(first.expand(-1, 3, -1, -1)))


def test_gradients_reach_the_samples_but_not_the_weights(features: LPIPS) -> None:
    """LPIPS is minimised over theta, and its network stays frozen."""
    first, second = _images(3, 32)
    first.requires_grad_()
    (features(first) - features(second)).square().sum().backward()
    assert first.grad is not None
    assert float(first.grad.abs().max()) > 0
    assert not any(parameter.requires_grad for parameter in features.net.parameters())


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 64, 64), (2, 64)])
def test_unsupported_image_shapes_are_refused(features: LPIPS, shape: tuple[int, ...]) -> None:
    """The images are too small or have another number of channels. The message says what is accepted."""
    with pytest.raises(
        ValueError, match=r"LPIPS is of images of 1 or 3 channels and at least 32 x 32 .*, got shape \("
    ):
        features(torch.zeros(shape))


def test_missing_weights_are_refused_before_any_work(tmp_path: Path) -> None:
    """The message has the path at which the file was expected."""
    with pytest.raises(
        ConfigError, match=rf"need torchvision's vgg weights, and {tmp_path}/x.pth is not there; download vgg16"
    ):
        plugins.build("features", "lpips", {"trunk": "vgg", "weights": f"{tmp_path}/x.pth"})


def test_weights_of_another_network_are_refused(tmp_path: Path, weights: Path) -> None:
    """A file with other tensors is not accepted."""
    other = tmp_path / FILES["vgg"]
    torch.save({"features.0.bias": torch.zeros(64)}, other)
    with pytest.raises(ConfigError, match=r"holds no torchvision weights of vgg: \d+ of \d+ tensors are missing"):
        _ = LPIPS(trunk="vgg", weights=str(other)).net
