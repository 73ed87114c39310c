"""EnCodec as a decoder: it decodes the same audio as the library, from the library's file format."""

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
    """A velocity network on latents."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.gain * x


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny EnCodec model with random weights: 8 numbers per frame of 4 samples."""
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


def test_latents_are_decoded_as_by_the_library(model_folder: Path) -> None:
    """Unquantised latents of a sound, with the saved model."""
    decoder = plugins.build("decoders", "encodec", {"model": str(model_folder)})
    net = transformers.EncodecModel.from_pretrained(model_folder).eval()
    audio = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = net.encoder(audio)
        expected = net.decoder(latents)
    decoded = decoder(latents)
    assert decoded.shape == audio.shape
    torch.testing.assert_close(decoded, expected)
    assert decoder.rate == 8000


def test_normalised_latents_are_rescaled_before_decoding(model_folder: Path) -> None:
    """Models sample latents of mean 0 and standard deviation 1."""
    latents = torch.randn(1, 8, 10, generator=torch.Generator().manual_seed(1))
    plain, scaled = Encodec(str(model_folder)), Encodec(str(model_folder), mean=0.3, std=2.0)
    torch.testing.assert_close(scaled((latents - 0.3) / 2.0), plain(latents))


def test_a_torch_module_can_decode_with_encodec(model_folder: Path) -> None:
    """It is an option of any torch module. It is part of the digest: decoded samples are what people look at."""
    options = {
        "factory": "test_encodec:Halving",
        "path": str(Path(__file__).parent),
        "shape": [8, 10],
        "prediction": "velocity",
        "native_scheduler": "cond_ot",
    }
    plain, decoding = (
        TorchModule(**{**options, **extra})
        for extra in ({}, {"decoder": {"name": "encodec", "options": {"model": str(model_folder)}}})
    )
    latents = torch.randn(2, 8, 10)
    assert decoding.digest != plain.digest
    assert (plain.shown_kind, decoding.shown_kind) == ("series", "sound")
    assert torch.equal(plain.decode(latents), latents)
    torch.testing.assert_close(decoding.decode(latents), Encodec(str(model_folder))(latents))


def test_a_kind_that_the_decoder_does_not_make_is_refused(model_folder: Path) -> None:
    """A decoder with a sample rate makes sound, whatever the shape of its latents."""
    options = {
        "factory": "test_encodec:Halving",
        "path": str(Path(__file__).parent),
        "shape": [8, 10],
        "prediction": "velocity",
        "native_scheduler": "cond_ot",
        "decoder": {"name": "encodec", "options": {"model": str(model_folder)}},
    }
    TorchModule.check(options | {"kind": "sound"})
    with pytest.raises(ConfigError, match=r"kind 'series' does not fit decoder 'encodec', which makes sound; leave"):
        TorchModule.check(options | {"kind": "series"})


def test_latents_of_another_width_are_rejected(model_folder: Path) -> None:
    """The message contains both shapes."""
    with pytest.raises(ValueError, match=r"EnCodec decodes latents of shape \(B, 8, frames\), got \(2, 5, 10\)"):
        Encodec(str(model_folder))(torch.zeros(2, 5, 10))


def test_a_folder_without_an_encodec_model_is_rejected(tmp_path: Path) -> None:
    """An empty folder, and a model of another type."""
    with pytest.raises(ConfigError, match=r"is not an EnCodec model folder"):
        Encodec(str(tmp_path))
    transformers.T5Config(d_model=8).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a model of type 't5', not 'encodec'"):
        Encodec(str(tmp_path))


def test_the_standard_deviation_must_be_positive() -> None:
    """Any other value would make the latents meaningless."""
    with pytest.raises(ConfigError, match=r"decoder 'encodec': std must be positive, got 0"):
        plugins.build("decoders", "encodec", {"model": "nowhere", "std": 0})
