"""Kinds of samples: guessed from the shape, declared, and refused where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.models.kinds import Kind, guess_kind
from orchestrator.models.torch_module import TorchModule

FLOW = {"factory": "own_networks:Unset", "shape": [1, 2, 3], "prediction": "velocity", "native_scheduler": "cond_ot"}


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2,), "vectors"),
        ((16, 2), "series"),
        ((1, 32), "series"),
        ((1, 8, 8), "image"),
        ((2, 8, 8), "image"),
        ((3, 4, 8, 8), "video"),
        ((2, 2, 2, 2, 2), "vectors"),
    ],
)
def test_the_shape_decides_the_kind(shape: tuple[int, ...], kind: Kind) -> None:
    """Without a declaration, what is shown follows from the number of axes."""
    assert guess_kind(shape) == kind


def test_what_is_decoded_decides_the_kind_before_the_shape() -> None:
    """Latents of a decoder become sound if it has a rate, else images, whatever their shape."""
    assert guess_kind((128, 40), 24_000, decoded=True) == "sound"
    assert guess_kind((32, 64), decoded=True) == "image"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, ("image", 2.0, (-1.0, 1.0))),
        ({"data_range": 1}, ("image", 1, (-0.5, 0.5))),
        ({"data_min": 0, "data_max": 1}, ("image", 1.0, (0.0, 1.0))),
        ({"data_min": 0, "data_max": 1, "data_range": 1, "kind": "vectors"}, ("vectors", 1, (0.0, 1.0))),
    ],
)
def test_both_ends_of_the_data_give_its_range(options: dict[str, Any], shown: tuple[Any, ...]) -> None:
    """The range, for PSNR, follows from its ends; without them it is 2, and pictures show it around 0."""
    model = TorchModule(**FLOW | options)
    assert (model.shown_kind, model.data_range, model.shown_range) == shown


def test_presentation_is_not_part_of_the_digest() -> None:
    """Pairs made before somebody declares how samples are shown remain usable; another range of data is another."""
    plain = TorchModule(**FLOW | {"data_range": 1.0})
    assert TorchModule(**FLOW | {"data_min": 0, "data_max": 1, "kind": "video"}).digest == plain.digest
    assert TorchModule(**FLOW).digest != plain.digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "picture"}, r"kind must be one of image, .*video, got 'picture'"),
        (
            {"kind": "points"},
            r"kind 'points' does not fit a model that has samples of shape \(1, 2, 3\); choose one of ",
        ),
        ({"kind": "sound"}, r"kind 'sound' does not fit a model that has no decoder; choose one of image, vectors"),
        ({"data_min": 0}, r"data_min and data_max belong together, got 0 and None; give both"),
        ({"data_min": 1, "data_max": 0}, r"data_max must be above data_min"),
        ({"data_min": "0", "data_max": 1}, r"data_min must be a number, got '0'"),
        ({"data_min": 0, "data_max": 1, "data_range": 2}, r"data_range=2 contradicts data_min=0 and data_max=1"),
        ({"data_min": 0, "data_max": 1, "decoder": {"name": "encodec"}}, r"no effect with a decoder"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is loaded, with the values and the remedy."""
    with pytest.raises(ConfigError, match=message):
        TorchModule(**FLOW | options)
