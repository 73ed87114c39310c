"""The Whisper and WavLM adapters on tiny random networks, saved in the libraries' own file formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import plugins
from orchestrator.audio.mel import RATE, resampled
from orchestrator.audio.recognisers.whisper import Whisper
from orchestrator.audio.speaker_encoders.wavlm import WavLM
from orchestrator.errors import ConfigError

transformers = pytest.importorskip("transformers")

LISTENER_RATE = 16000


def tones(count: int, seconds: float = 0.6, rate: int = RATE) -> list[np.ndarray]:
    times = np.arange(int(seconds * rate)) / rate
    return [(0.5 * np.sin(2 * np.pi * (150 + 90 * i) * times)).astype(np.float32) for i in range(count)]


def byte_vocabulary() -> dict[str, int]:
    """Whisper's vocabulary with one token for each of the 256 bytes, and its special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = [*bytes_to_unicode().values(), "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>"]
    names += ["<|translate|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    return {name: number for number, name in enumerate(names)}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Whisper of one layer."""
    folder = tmp_path_factory.mktemp("models") / "whisper-tiny-random"
    vocabulary = byte_vocabulary()
    tokenizer = transformers.WhisperTokenizer(
        vocab=vocabulary, merges=[], normalizer_file=None, language="en", task="transcribe"
    )
    special = [name for name in vocabulary if name.startswith("<|")]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    extractor = transformers.WhisperFeatureExtractor(feature_size=16)
    end, start = vocabulary["<|endoftext|>"], vocabulary["<|startoftranscript|>"]
    torch.manual_seed(0)
    net = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=len(vocabulary),
            num_mel_bins=16,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_target_positions=16,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            decoder_start_token_id=start,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        )
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.normal_(std=0.5)
    settings = net.generation_config
    settings._from_model_config = False  # otherwise it is rebuilt from the network's configuration
    settings.is_multilingual = True
    settings.lang_to_id = {"<|en|>": vocabulary["<|en|>"]}
    settings.task_to_id = {name: vocabulary[f"<|{name}|>"] for name in ("transcribe", "translate")}
    settings.no_timestamps_token_id = vocabulary["<|notimestamps|>"]
    settings.max_length = 12
    net.save_pretrained(folder)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete WavLM of one layer, with its x-vector head."""
    folder = tmp_path_factory.mktemp("models") / "tiny-random"
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        tdnn_dim=(8, 8, 8),
        tdnn_kernel=(5, 3, 1),
        tdnn_dilation=(1, 2, 1),
        xvector_output_dim=12,
    )
    transformers.WavLMForXVector(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def test_whisper_transcribes_as_the_library_does(whisper: Path) -> None:
    """Sound is resampled to Whisper's rate, and the text of a sample does not depend on the rest of the batch."""
    recogniser = plugins.build("recognisers", "whisper", {"weights": str(whisper)})
    recogniser.check()
    waves = tones(3)
    heard = recogniser.transcribe(waves, RATE)
    processor = transformers.WhisperProcessor.from_pretrained(whisper)
    net = transformers.WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    for wave, text in zip(waves, heard, strict=True):
        inputs = processor(resampled(wave, RATE, LISTENER_RATE), sampling_rate=LISTENER_RATE, return_tensors="pt")
        tokens = net.generate(inputs.input_features, language="en", task="transcribe")
        assert text == processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        assert recogniser.transcribe([wave], RATE) == [text]
    assert any(heard)
    assert recogniser.name == "whisper-tiny-random"


def test_whisper_is_not_run_on_silence(whisper: Path) -> None:
    """Whisper invents words for silence, so the network is not run on it."""
    assert Whisper(str(whisper)).transcribe([np.zeros(800, np.float32), np.zeros(0, np.float32)], RATE) == ["", ""]


@pytest.mark.parametrize(
    ("normaliser", "said", "heard"),
    [
        ("english", "It's two o'clock, Mister Smith!", "it is 2 o'clock mr smith"),
        ("basic", "Seven, ONE.", "seven one"),
        ("digits", "one two three", "1, 2, 3."),
        ("digits", "seven one", "71"),
    ],
)
def test_words_do_not_depend_on_the_spelling(whisper: Path, normaliser: Any, said: str, heard: str) -> None:
    """Differences of case, punctuation and, depending on the normaliser, ways of writing numbers are ignored."""
    recogniser = Whisper(str(whisper), normaliser=normaliser)
    assert recogniser.words(said) == recogniser.words(heard) != []


def test_wavlm_embeds_as_the_library_does(wavlm: Path) -> None:
    """Embeddings have unit length. Waves are embedded one at a time, because padding a batch would change them."""
    encoder = plugins.build("speaker_encoders", "wavlm", {"weights": str(wavlm)})
    encoder.check()
    waves = [*tones(2), tones(1, seconds=0.9)[0]]
    voices = encoder.embed(waves, RATE)
    assert voices.shape == (3, 12)
    torch.testing.assert_close(voices.norm(dim=1), torch.ones(3))
    net = transformers.WavLMForXVector.from_pretrained(wavlm).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(wavlm)
    heard = extractor(resampled(waves[1], RATE, LISTENER_RATE), sampling_rate=LISTENER_RATE, return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(net(heard.input_values).embeddings[0], dim=0)
    torch.testing.assert_close(voices[1], expected)
    assert torch.equal(torch.cat([encoder.embed([wave], RATE) for wave in waves]), voices)
    assert encoder.name == "wavlm-tiny-random"
    assert encoder.embed([np.zeros(800, np.float32)], RATE).isnan().all()


def test_to_returns_a_copy_on_another_device(wavlm: Path) -> None:
    """`to` returns a copy on the other device and leaves the original where it is."""
    encoder = WavLM(str(wavlm))
    moved = encoder.to("meta")
    assert moved.loaded()[1].device.type == "meta"
    assert encoder.loaded()[1].device.type == "cpu"


@pytest.mark.parametrize(("kind", "name"), [("recognisers", "whisper"), ("speaker_encoders", "wavlm")])
def test_missing_weights_are_refused_with_the_cache_path_and_a_command(kind: str, name: str) -> None:
    """At configuration time, if the weights are neither a folder nor in the cache. Nothing is downloaded."""
    from huggingface_hub import constants

    with pytest.raises(ConfigError) as caught:
        plugins.build(kind, name, {"weights": "nobody/nothing"}).check()
    message = str(caught.value)
    assert "needs the weights 'nobody/nothing', which are neither a folder here nor in the cache" in message
    assert str(constants.HF_HUB_CACHE) in message
    assert "fetch them with `hf download nobody/nothing`, or set the option to a folder" in message


def test_weights_of_another_network_are_refused(wavlm: Path, whisper: Path, tmp_path: Path) -> None:
    """A WavLM without a trained speaker head is refused too: it would get a random one."""
    with pytest.raises(ConfigError, match=r"holds a network WavLMForXVector, not WhisperForConditionalGeneration"):
        Whisper(str(wavlm)).check()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wavlm"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is incomplete: no feature extractor \(preprocessor_config\.json or "):
        WavLM(str(tmp_path)).check()
    (tmp_path / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is incomplete: no network \(model\.safetensors or "):
        WavLM(str(tmp_path)).check()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"holds a network unknown, not WavLMForXVector"):
        WavLM(str(tmp_path)).check()


def test_an_unknown_normaliser_is_refused() -> None:
    """The message lists the known ones."""
    with pytest.raises(ConfigError, match=r"normaliser must be one of english, basic, digits, got 'german'"):
        plugins.build("recognisers", "whisper", {"normaliser": "german"})
