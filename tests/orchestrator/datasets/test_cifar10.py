"""CIFAR-10: images are read from Parquet files; conditioning needs no files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.datasets.cifar10 import CLASSES, Cifar10


def _encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """The pixels as an encoded image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _write_split(folder: Path, **columns: list[Any]) -> None:
    """Write the columns as the Parquet file of the training split."""
    pq.write_table(pa.table(columns), folder / "cifar10-train.parquet")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two images: random noise, and white with a black 2x2 square in one corner."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    square = np.full((32, 32, 3), 255, dtype=np.uint8)
    square[:2, :2] = 0
    _write_split(tmp_path, image=[_encode(noise), _encode(square)], label=[3, 9])
    return tmp_path


def test_images_are_scaled_to_minus_one_to_one(photos: Path) -> None:
    """Channels come first, and 0..255 maps to -1..1."""
    samples, labels = Cifar10(str(photos)).reference()
    assert (samples.shape, samples.dtype, labels.tolist()) == ((2, 3, 32, 32), np.float32, [3, 9])
    assert samples[1, :, 0, 0].tolist() == [-1, -1, -1]
    assert samples[1, :, 5, 5].tolist() == [1, 1, 1]


def test_smaller_images_average_blocks_of_pixels(photos: Path) -> None:
    """At half the side, each pixel is the mean of four, without ringing. Grayscale has one channel."""
    samples, _ = Cifar10(str(photos), side=16, grayscale=True).reference()
    assert samples.shape == (2, 1, 16, 16)
    assert samples[1, 0, 0, 0] == -1
    assert (samples[1].ravel()[1:] == 1).all()
    single_pixel, _ = Cifar10(str(photos), side=1, grayscale=True).reference()
    np.testing.assert_allclose(single_pixel.ravel(), samples.mean(axis=(1, 2, 3)), atol=1e-5)


def test_conditioning_needs_no_files() -> None:
    """Labels depend only on (seed, index) and are uniform over the classes."""
    dataset = Cifar10("no-such-folder")
    labels = dataset.conditions(0, range(2000))
    assert labels.tolist() == [int(dataset.conditions(0, [i])[0]) for i in range(2000)]
    assert np.bincount(labels, minlength=len(CLASSES)).min() > 150


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, r"split must be train or test, got 'validation'"),
        ({"side": 12}, r"side must divide 32, got 12"),
        ({"side": 0}, r"side must divide 32, got 0"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    """They are rejected before any file is read."""
    with pytest.raises(ValueError, match=message):
        Cifar10(**options)


def test_a_missing_file_is_reported_with_the_option_to_set(tmp_path: Path) -> None:
    """The package does not contain the images."""
    with pytest.raises(ValueError, match=r"no file .*cifar10-test\.parquet; set the dataset's option 'folder'"):
        Cifar10(str(tmp_path), split="test").reference()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [b"no image"], "label": [0]},
            r"row 0 of .*cifar10-train.parquet is not a readable image",
        ),
        (
            {"image": [_encode(np.zeros((8, 8, 3), dtype=np.uint8))], "label": [0]},
            r"of size \(8, 8\); CIFAR-10 images",
        ),
        ({"picture": [b""], "label": [0]}, r"has no column 'image'; its columns are: picture, label"),
    ],
)
def test_a_file_with_other_content_is_rejected(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    """The message says what is wrong with it."""
    _write_split(tmp_path, **columns)
    with pytest.raises(ValueError, match=message):
        Cifar10(str(tmp_path)).reference()
