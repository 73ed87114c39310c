"""What results of an objective are stored under: its options, and the content of its network's weights."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from orchestrator import plugins

CHANGED: dict[str, dict[str, object]] = {
    "rmse_bound": {"lipschitz": 3.0},
    "trajectory": {"path_weight": 0.25},
    "perceptual": {"features": "cifar10_gray16_cnn"},
}
"""Another value of each option; the perceptual objective's ``options`` are changed below."""


def test_every_option_of_every_objective_changes_the_content() -> None:
    """A new objective or option needs a line above."""
    for name, plugin in plugins.every("objectives"):
        options = {f.name for f in fields(plugin)}
        assert options - {"options"} == set(CHANGED.get(name, {})), name
        for option, value in CHANGED.get(name, {}).items():
            assert plugins.build("objectives", name, {option: value}).content != plugin().content


def test_the_content_of_the_perceptual_objective_covers_features_and_weights(tmp_path: Path) -> None:
    """The bytes of the weights count, and their place does not."""

    def content(features: str, **options: str) -> str:
        return str(plugins.build("objectives", "perceptual", {"features": features, "options": options}).content)

    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    before = content("inception", weights=str(first))
    assert content("inception", weights=str(second)) == before
    second.write_bytes(b"another")
    assert content("inception", weights=str(second)) != before
    assert content("digits_cnn") not in (before, content("cifar10_gray16_cnn"))
