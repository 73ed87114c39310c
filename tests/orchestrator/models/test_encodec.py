"""EnCodec as a decoder: the very sound that the library itself decodes, from its real file format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.models.decoders.encodec import Encodec
from orchestrator.models.torch_module import TorchModule

transformers = pytest.importorskip("transformers")


class Halving(torch.nn.Module):
    """A velocity network of latents."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.gain * x


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny EnCodec model of random weights: 8 numbers a frame of 4 samples."""
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        hidden_size=8,
        num_filters=4,
        upsampling_ratios=[2, 2],
        codebook_size=8,
        codebook_dim=8,
        num_lstm_layers=1,
        sampling_rate=8000,
        target_bandwidths=[6.0],
    )
    path = tmp_path_factory.mktemp("encodec")
    transformers.EncodecModel(config).save_pretrained(path)
    return path


def test_latents_decode_as_the_library_decodes_them(folder: Path) -> None:
    """Those of a sound, before quantisation, through the saved model."""
    decoder = plugins.build("decoders", "encodec", {"model": str(folder)})
    net = transformers.EncodecModel.from_pretrained(folder).eval()
    sound = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = net.encoder(sound)
        expected = net.decoder(latents)
    found = decoder(latents)
    assert found.shape == sound.shape
    torch.testing.assert_close(found, expected)
    assert decoder.rate == 8000


def test_normalised_latents_are_given_back_their_scale(folder: Path) -> None:
    """Models sample latents of mean 0 and deviation 1."""
    latents = torch.randn(1, 8, 10, generator=torch.Generator().manual_seed(1))
    plain, scaled = Encodec(str(folder)), Encodec(str(folder), mean=0.3, std=2.0)
    torch.testing.assert_close(scaled((latents - 0.3) / 2.0), plain(latents))


def test_a_model_of_latents_decodes_with_it(folder: Path) -> None:
    """As an option of any torch module; digest and velocity are those without it."""
    options = {
        "factory": "test_encodec:Halving",
        "path": str(Path(__file__).parent),
        "shape": [8, 10],
        "prediction": "velocity",
        "native_scheduler": "cond_ot",
    }
    plain, decoding = (
        TorchModule(**{**options, **extra})
        for extra in ({}, {"decoder": {"name": "encodec", "options": {"model": str(folder)}}})
    )
    latents = torch.randn(2, 8, 10)
    assert decoding.digest == plain.digest
    assert torch.equal(plain.decode(latents), latents)
    torch.testing.assert_close(decoding.decode(latents), Encodec(str(folder))(latents))


def test_latents_of_another_width_are_refused(folder: Path) -> None:
    """With both shapes."""
    with pytest.raises(ValueError, match=r"EnCodec decodes latents of shape \(B, 8, frames\), got \(2, 5, 10\)"):
        Encodec(str(folder))(torch.zeros(2, 5, 10))


def test_what_is_no_encodec_model_is_refused(tmp_path: Path) -> None:
    """An empty folder, and a model of another kind."""
    with pytest.raises(ConfigError, match=r"is not an EnCodec model folder"):
        Encodec(str(tmp_path))
    transformers.T5Config(d_model=8).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a model of type 't5', not 'encodec'"):
        Encodec(str(tmp_path))


def test_a_deviation_must_be_positive() -> None:
    """Nothing could be decoded otherwise."""
    with pytest.raises(ConfigError, match=r"decoder 'encodec': std must be positive, got 0"):
        plugins.build("decoders", "encodec", {"model": "nowhere", "std": 0})
