"""A decoder of the user's own: the autoencoder of a latent flow, from its class and checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator import plugins
from orchestrator.errors import CodeError, ConfigError
from orchestrator.models.torch_module import TorchModule


class Autoencoder(nn.Module):
    """Latents (B, 4) to images (B, 1, 8, 8) in [0, 1]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(4, width), nn.Sigmoid())

    def decode(self, latents: Tensor) -> Tensor:
        return self.up(latents).view(-1, 1, 8, 8)

    def pair(self, latents: Tensor) -> Any:
        return latents, latents


OPTIONS = {"factory": "test_module_decoder:Autoencoder", "path": str(Path(__file__).parent), "method": "decode"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint of the autoencoder."""
    torch.manual_seed(1)
    torch.save(Autoencoder().state_dict(), tmp_path / "autoencoder.pt")
    return tmp_path / "autoencoder.pt"


def _decoder(**options: Any) -> Any:
    return plugins.build("decoders", "torch_module", OPTIONS | options)


def test_latents_are_decoded_by_the_users_own_module(weights: Path) -> None:
    """Its images in [0, 1] are mapped to [-1, 1], where pictures and metrics of images expect them."""
    net = Autoencoder()
    net.load_state_dict(torch.load(weights, weights_only=True))
    latents = torch.randn(3, 4)
    decoded = _decoder(weights=str(weights), data_min=0, data_max=1)(latents)
    torch.testing.assert_close(decoded, 2 * net.decode(latents).detach() - 1)
    assert not decoded.requires_grad
    normalised = _decoder(weights=str(weights), mean=0.5, std=2, data_min=0, data_max=1)
    torch.testing.assert_close(normalised((latents - 0.5) / 2), decoded)


def test_what_decides_the_images_is_part_of_the_content(weights: Path, tmp_path: Path) -> None:
    """Weights and the range of values; not the place of the file."""
    plain = _decoder(weights=str(weights)).content
    for option in ({"data_min": 0}, {"std": 2}, {"mean": 1}):
        assert _decoder(weights=str(weights), **option).content != plain
    assert _decoder().content != plain
    moved = weights.rename(tmp_path / "other.pt")
    assert _decoder(weights=str(moved)).content == plain


def test_a_model_of_latents_makes_what_its_decoder_makes(weights: Path) -> None:
    """Vectors of latents are shown as images, or as sound if the decoder has a rate."""
    model = {
        "factory": "own_networks:Unset",
        "shape": [4],
        "prediction": "velocity",
        "native_scheduler": "cond_ot",
        "decoder": {"name": "torch_module", "options": OPTIONS | {"weights": str(weights)}},
    }
    images = TorchModule(**model)
    assert (images.shown_kind, images.shown_range) == ("image", (-1.0, 1.0))
    assert images.decode(torch.zeros(2, 4)).shape == (2, 1, 8, 8)
    model["decoder"] = {"name": "torch_module", "options": OPTIONS | {"rate": 8000}}
    assert TorchModule(**model).shown_kind == "sound"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "test_module_decoder"}, r"write it as 'package\.module:name'"),
        ({"weights": "nowhere.pt"}, r"weights: there is no file .*nowhere\.pt; every machine"),
        ({"method": "encode"}, r"has no method 'encode'; set method to the one that decodes"),
        ({"std": 0}, r"std must be positive, got 0"),
        ({"data_min": 1}, r"data_max must be above data_min"),
        ({"rate": 0}, r"rate must be a positive number of samples per second, got 0"),
        ({"kwargs": {"depth": 2}}, r"test_module_decoder:Autoencoder with kwargs {'depth': 2} fails"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    """Before a host starts, by name."""
    with pytest.raises(ConfigError, match=message):
        _decoder(**options)


def test_a_decoder_that_fails_shows_its_line() -> None:
    """With the shape it was called with; what is not one tensor is refused."""
    with pytest.raises(CodeError, match=r"test_module_decoder\.py, line \d+.*called with float32 \(2, 5\)"):
        _decoder()(torch.zeros(2, 5))
    with pytest.raises(ConfigError, match=r"must return one tensor of 2 images or sounds, got tuple; set method"):
        _decoder(method="pair")(torch.zeros(2, 4))
