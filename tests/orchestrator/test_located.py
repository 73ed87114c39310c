"""Paths of a configuration are absolute before they are sent: workers have another current folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from orchestrator import plugins
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.errors import ConfigError

NO_PATHS = {
    "audio_folder": {"manifest", "path", "transcript", "speaker", "sha256"},  # in the folder; columns of the manifest
    "coordinate_rmse": {"groups"},
    "custom": {"alpha_function", "sigma_function"},
    "diffusers": {"dtype", "variant"},
    "discrete_vp": {"betas"},
    "edm": {"factory"},
    "image_parquet": {"image_column", "label_column", "text_column"},
    "ld3": {"inner", "inner_options"},
    "prompts": {"prompts", "column", "sha256"},
    "scale_time": {"inner", "inner_options", "scheduler", "scheduler_options"},
    "spoken_digits": {"speaker"},
    "tensors": {
        "function",
        "kwargs",
        "arrays",
        "shared",
        "padding",
        "padding_masks",
        "samples",
        "labels",
        "split",
        "mask",
    },
    "torchscript": {"dtype"},
    "torch_module": {"factory", "kwargs", "weights_key", "weights_prefix"},  # kwargs are sent as they are
    "whisper": {"language"},
}
"""Options of type str, or with such values, that name no file, by plugin."""

NAMES = {"prediction", "time", "null", "method", "call", "native_scheduler", "features", "encoder", "recogniser"}
"""Options of several plugins that are names."""

SPECIAL = "50% a%20b?c#d ü \"e' ;f&g=1[h]{i}$j\nk"


def _options(wanted: str) -> list[Any]:
    """(kind, plugin, field) of every option whose metadata has this key."""
    return [
        pytest.param(kind, name, option, id=f"{name}.{option.name}")
        for kind in plugins.KINDS
        for name, plugin in plugins.every(kind)
        if dataclasses.is_dataclass(plugin)
        for option in dataclasses.fields(plugin)
        if wanted in option.metadata
    ]


def test_every_option_with_text_is_known_as_a_path_or_not() -> None:
    """A new option that is neither marked nor listed here fails."""
    for kind in plugins.KINDS:
        for name, plugin in plugins.every(kind):
            for option in dataclasses.fields(plugin) if dataclasses.is_dataclass(plugin) else ():
                textual = any(word in str(option.type) for word in ("str", "dict", "Mapping", "Any", "Path"))
                if option.init and textual and not option.metadata and "Prediction" not in str(option.type):
                    assert option.name in NO_PATHS.get(name, set()) | NAMES, f"{kind} {name}: {option.name}"


def test_every_path_of_a_list_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a network may lie in several folders; what is not a list of texts is left to the check."""
    monkeypatch.chdir(tmp_path)
    paths = plugins.located("models", "torch_module", {"path": ["a", "/b", "./c"]})["path"]
    assert paths == [str(tmp_path / "a"), "/b", str(tmp_path / "c")]
    assert plugins.located("models", "torch_module", {"path": ["a", 3]})["path"] == ["a", 3]
    with pytest.raises(ConfigError, match="option 'path' of model adapter 'torch_module' is empty"):
        plugins.located("models", "torch_module", {"path": ["a", ""]})


@pytest.mark.parametrize(("kind", "name", "option"), _options("is_path"))
def test_a_relative_path_becomes_absolute(
    kind: str, name: str, option: dataclasses.Field[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the current folder. All characters mean themselves, but for ``~`` in front."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = f"{SPECIAL}.safetensors"
    (tmp_path / given).mkdir()
    for written in (given, f"./{given}", f"~/{given}"):
        assert plugins.located(kind, name, {option.name: written}) | {} == plugins.located(kind, name, {}) | {
            option.name: str(tmp_path / given)
        }


@pytest.mark.parametrize(("kind", "name", "option"), _options("is_path"))
def test_an_empty_path_is_refused_by_name(kind: str, name: str, option: dataclasses.Field[Any]) -> None:
    """It is what a variable gives that is not set; it would mean the current folder."""
    with pytest.raises(ConfigError, match=f"option '{option.name}' of .* '{name}' is empty.*give a path"):
        plugins.located(kind, name, {option.name: ""})


def test_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the hub without such a folder here, and those of the package even if there is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits_fm_ot").mkdir()
    for kind, name, options in (
        ("models", "zoo", {"weights": "digits_fm_ot"}),
        ("models", "diffusers", {"pipeline": "google/ddpm-cifar10-32"}),
        ("metrics", "fid", {"reference": "digits"}),
        ("recognisers", "whisper", {"weights": "openai/whisper-tiny"}),
    ):
        assert plugins.located(kind, name, options) == options


@pytest.mark.parametrize(("kind", "name", "option"), _options("kind"))
def test_the_options_of_a_plugin_in_an_option_are_located_too(
    kind: str, name: str, option: dataclasses.Field[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders, feature extractors, recognisers, encoders, and the dataset of a reference."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    inner = option.metadata["kind"]
    plugin, key = next(
        (other, field.name)
        for other, built in plugins.every(inner)
        if dataclasses.is_dataclass(built)
        for field in dataclasses.fields(built)
        if "is_path" in field.metadata
    )
    naming = option.metadata["name"]
    given: dict[str, Any] = (
        {option.name: {key: "w"}} if naming else {option.name: {"name": plugin, "options": {key: "w"}}}
    )
    located = plugins.located(kind, name, given | ({naming: plugin} if naming else {}))[option.name]
    assert (located if naming else located["options"])[key] == str(tmp_path / "w")


def test_every_section_of_a_configuration_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model, the conditioning, the objective, and an evaluation's datasets and metrics."""
    monkeypatch.chdir(tmp_path)
    config = ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "model": {"name": "torch_module", "options": {"factory": "n:N", "path": "net"}},
            "conditioning": {"name": "prompts", "options": {"file": "p.txt"}},
            "nfe": [2],
            "learned": [
                {
                    "family": "bns",
                    "objective": {
                        "name": "perceptual",
                        "options": {"features": "lpips", "options": {"weights": "l.pt"}},
                    },
                }
            ],
            "evaluation": {
                "datasets": {"photos": {"name": "image_folder", "options": {"folder": "photos"}}},
                "metrics": [{"name": "fid", "options": {"reference": "stats.npz"}}],
            },
        }
    )
    assert config.model.options["path"] == str(tmp_path / "net")
    assert config.conditioning.options["file"] == str(tmp_path / "p.txt")
    assert config.learned[0].objective.options["options"]["weights"] == str(tmp_path / "l.pt")
    assert config.evaluation.datasets["photos"].options["folder"] == str(tmp_path / "photos")
    assert config.evaluation.metrics[0].options["reference"] == str(tmp_path / "stats.npz")
