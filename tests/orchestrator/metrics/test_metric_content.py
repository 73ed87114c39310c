"""What measurements are stored under: the content of networks, and not the names or places of their files.

Each metric lists a change of every option and of every file; a metric or an option that is missing in the list fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from orchestrator import plugins
from orchestrator.metrics.measurements import MetricSpec

Options = dict[str, Any]
Change = Callable[[Path, Options], Options]


def _network(folder: Path) -> str:
    """A folder that looks like a published network; nothing in it is loaded."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        (folder / name).write_text(f"the {name} of {folder.name}", encoding="utf-8")
    return str(folder)


def _clip(folder: Path) -> Options:
    return {"weights": _network(folder / "ViT"), "processor": _network(folder / "processor")}


def _inception(folder: Path) -> Options:
    (folder / "inception.pth").write_bytes(b"weights")
    return {"features": "inception", "features_options": {"weights": str(folder / "inception.pth")}}


def _lpips(folder: Path) -> Options:
    pytest.importorskip("lpips")
    (folder / "trunk.pth").write_bytes(b"weights")
    return {"weights": str(folder / "trunk.pth")}


EXAMPLES: dict[str, Callable[[Path], Options]] = {
    "coordinate_rmse": lambda folder: {"axis": 1},
    "frechet": lambda folder: {},
    "sliced_wasserstein": lambda folder: {},
    "lpips": _lpips,
    "clip_score": _clip,
    "pick_score": _clip,
    "fid": _inception,
    "kid": _inception,
    "wer": lambda folder: {
        "recogniser": "whisper",
        "recogniser_options": {"weights": _network(folder / "whisper"), "language": "en"},
    },
    "speaker_similarity": lambda folder: {
        "encoder": "wavlm",
        "encoder_options": {"weights": _network(folder / "wavlm")},
    },
}


def _option(name: str, value: Any) -> Change:
    return lambda folder, options: {**options, name: value}


def _written(name: str) -> Change:
    def change(folder: Path, options: Options) -> Options:
        assert (folder / name).is_file()
        (folder / name).write_bytes(b"another")
        return options

    return change


def _renamed(old: str, new: str) -> Change:
    """A file or folder, and all options that name it."""

    def change(folder: Path, options: Options) -> Options:
        (folder / old).rename(folder / new)
        return {name: _replaced(value, str(folder / old), str(folder / new)) for name, value in options.items()}

    return change


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(item, old, new) for name, item in value.items()}
    return value.replace(old, new) if isinstance(value, str) else value


def _inner(name: str, value: Any) -> Change:
    """An option of the recogniser."""
    return lambda folder, options: {**options, "recogniser_options": {**options["recogniser_options"], name: value}}


def _hidden(folder: Path, options: Options) -> Options:
    (folder / "ViT" / ".cache").mkdir()
    (folder / "ViT" / ".cache" / "model.lock").write_bytes(b"")
    return options


CLIP: list[tuple[str, Change, bool]] = [
    ("weights", _renamed("ViT", "ViT-L-14@336px"), False),
    ("processor", _renamed("processor", "another"), False),
    ("hidden files", _hidden, False),
    ("the network", _written("ViT/model.safetensors"), True),
    ("its configuration", _written("ViT/config.json"), True),
    ("the processor's tokenizer", _written("processor/tokenizer.json"), True),
]
FEATURES: list[tuple[str, Change, bool]] = [
    ("features", lambda folder, options: {"features": "digits_cnn"}, True),
    ("features_options", _renamed("inception.pth", "moved.pth"), False),
    ("reference", _option("reference", {"name": "digits"}), False),
    ("the weights", _written("inception.pth"), True),
]
RAW: list[tuple[str, Change, bool]] = [
    ("features", lambda folder, options: _inception(folder), True),
    ("features_options", _option("features_options", {}), False),
    ("reference", _option("reference", "ground_truth"), False),
]
CHANGES: dict[str, list[tuple[str, Change, bool]]] = {
    "psnr": [],
    "psnr_uint8": [],
    "rmse": [],
    "snr": [],
    "lpips": [
        ("trunk", _option("trunk", "vgg"), True),
        ("weights", _renamed("trunk.pth", "moved.pth"), False),
        ("the weights", _written("trunk.pth"), True),
    ],
    "coordinate_rmse": [
        ("axis", _option("axis", 0), True),
        ("groups", _option("groups", {"both": [0, 1]}), True),
    ],
    "frechet": RAW,
    "sliced_wasserstein": [
        *RAW,
        ("projections", _option("projections", 7), False),
        ("seed", _option("seed", 1), False),
    ],
    "clip_score": CLIP,
    "pick_score": CLIP,
    "fid": FEATURES,
    "kid": [*FEATURES, ("block", _option("block", 7), False)],
    "wer": [
        ("recogniser", lambda folder, options: {"recogniser": "digits"}, True),
        ("recogniser_options", _renamed("whisper", "whisper-large"), False),
        (
            "the language",
            lambda folder, options: {
                **options,
                "recogniser_options": options["recogniser_options"] | {"language": "de"},
            },
            True,
        ),
        (
            "the normaliser",
            _inner("normaliser", "basic"),
            True,
        ),
        ("the network", _written("whisper/model.safetensors"), True),
        ("the feature extractor", _written("whisper/preprocessor_config.json"), True),
    ],
    "speaker_similarity": [
        ("encoder", lambda folder, options: {"encoder": "digits_speakers"}, True),
        ("encoder_options", _renamed("wavlm", "wavlm-base"), False),
        ("the network", _written("wavlm/model.safetensors"), True),
    ],
}
"""Whether each change is one of the measurements."""


def test_every_option_of_every_metric_is_changed_here() -> None:
    """A new metric or option needs a line that says whether measurements depend on it."""
    options = {name: {f.name for f in fields(plugin) if f.init} for name, plugin in plugins.every("metrics")}
    changed = {name: {what for what, _, _ in changes} for name, changes in CHANGES.items()}
    assert not {f"{name}.{option}" for name, names in options.items() for option in names - changed[name]}


@pytest.mark.parametrize(
    ("name", "change", "decides"),
    [
        pytest.param(name, change, decides, id=f"{name}: {what}")
        for name, changes in CHANGES.items()
        for what, change, decides in changes
    ],
)
def test_the_identity_changes_exactly_with_what_is_measured(
    name: str, change: Change, decides: bool, tmp_path: Path
) -> None:
    """Content of networks and options of measuring count; places, names and options of summaries do not."""
    options = EXAMPLES[name](tmp_path)
    before = MetricSpec(name, options).identity
    assert (MetricSpec(name, change(tmp_path, options)).identity != before) == decides


def test_metrics_of_the_same_features_share_measurements(tmp_path: Path) -> None:
    """FID and KID, with defaults given or left out."""
    options = _inception(tmp_path)
    assert MetricSpec("fid", options).identity == MetricSpec("kid", {**options, "block": 100}).identity


@pytest.mark.parametrize("trunk", ["alex", "squeeze"])
def test_perceptual_features_depend_on_trunk_and_calibration(trunk: str, tmp_path: Path) -> None:
    """Both files count."""
    pytest.importorskip("lpips")
    (tmp_path / "trunk.pth").write_bytes(b"weights")
    features = {"trunk": trunk, "weights": str(tmp_path / "trunk.pth")}
    before = plugins.build("features", "lpips", features).content
    (tmp_path / "trunk.pth").write_bytes(b"another")
    assert plugins.build("features", "lpips", features).content != before
    vgg = plugins.build("features", "lpips", features | {"trunk": "vgg"}).content
    assert vgg != plugins.build("features", "lpips", features).content
