"""Base class of image sets: images decoded, cropped and resized, with errors that name the image."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from orchestrator.datasets.base import Dataset
from orchestrator.progress import bar

UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Exceptions Pillow raises for bytes that are not an image, are truncated, or declare more pixels than it allows."""


@dataclass(frozen=True, kw_only=True)
class ImageSet(Dataset):
    """A dataset with images as real samples.

    Attributes:
        side: Crop every image to its centre square and resize it to this height and width; None keeps the sizes, which
            must then all be equal.
        grayscale: One channel (ITU-R 601 luma) instead of three.

    Raises:
        ValueError: The side is below 1.
    """

    side: int | None = None
    grayscale: bool = False

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise ValueError(f"side must be at least 1, got {self.side}")

    def prepared(self, *images: Any) -> Iterable[Any]:
        """Parts of the digest of real samples: how images are prepared, and the images."""
        return [self.side, self.grayscale], *images

    def decoded(self, sources: Iterable[Path | bytes], names: Sequence[str]) -> npt.NDArray[np.float32]:
        """Images, (B, C, H, W) in [-1, 1], from paths or encoded bytes; ``names`` are for error messages.

        Raises:
            ValueError: An image cannot be read, or sizes differ and ``side`` is not set.
        """
        pairs = zip(sources, names, strict=True)
        images = [decoded(source, name, self.side, self.grayscale) for source, name in pairs]
        for image, name in zip(images, names, strict=True):
            self._check_size(image.shape[:0:-1], name, images[0].shape[:0:-1], names[0])
        return np.stack(images)

    def check_images(self, sources: Iterable[Path | bytes], names: Sequence[str]) -> None:
        """Refuse what :meth:`decoded` would refuse, by the headers and ends of the files."""
        first: tuple[int, int] | None = None
        with bar(len(names), "image", "checking images") as progress:
            for source, name in zip(sources, names, strict=True):
                size = size_of_intact(source, name)
                first = first or size
                self._check_size(size, name, first, names[0])
                progress.update()

    def _check_size(self, size: tuple[int, int], name: str, first: tuple[int, int], first_name: str) -> None:
        if self.side is None and size != first:
            raise ValueError(
                f"{name} is {size[0]}x{size[1]}, but {first_name} is {first[0]}x{first[1]}; set the option 'side' to "
                f"crop and resize every image to one square"
            )


def decoded(
    source: Path | bytes, where: str, side: int | None = None, grayscale: bool = False
) -> npt.NDArray[np.float32]:
    """Decode an image to (C, H, W) in [-1, 1], float32.

    Args:
        source: Path of an image file, or the bytes of one.
        where: Name of the image in error messages.
        side: Crop to the centre square and resize it, with antialiasing, to this height and width; None keeps the size.
        grayscale: One channel (ITU-R 601 luma) instead of three.

    Raises:
        ValueError: The source is not a readable image.
    """
    image = opened(source, where, grayscale)
    if side is not None and image.size != (side, side):
        short = min(image.size)
        left, top = ((length - short) // 2 for length in image.size)
        image = image.crop((left, top, left + short, top + short))
        image = image.resize((side, side), Image.Resampling.LANCZOS if side < short else Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32)
    channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return channels / np.float32(127.5) - 1


def opened(source: Path | bytes, where: str, grayscale: bool) -> Image.Image:
    """An image with one or three channels of 8 bits; arguments and errors as for :func:`decoded`."""
    with readable(where):
        image = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
        return _in_8_bits(image).convert("L" if grayscale else "RGB")


ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
"""What stands within the last :data:`TAIL` bytes of an image that is not truncated, by Pillow's names of formats."""
TAIL = 64


def size_of_intact(source: Path | bytes, where: str) -> tuple[int, int]:
    """Width and height of an image; decodes it only if its header and its end do not show that it is whole.

    Raises:
        ValueError: The source is not a readable image.
    """
    with readable(where), open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        image = Image.open(file)
        size, whole = image.size, ENDS.get(str(image.format))
        length = file.seek(0, io.SEEK_END)
        file.seek(max(0, length - TAIL))
        if image.mode in ("I", "F") or whole is None or whole not in file.read():
            opened(source, where, grayscale=False)
        return size


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what Pillow raises into an error that names the image.

    Raises:
        ValueError: The body raised one of :data:`UNREADABLE`.
    """
    try:
        yield
    except _UnreadableImageError:
        raise
    except UNREADABLE as error:
        reason = "it is empty or of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise _UnreadableImageError(f"{where} is not a readable image: {reason}; remove or replace it") from error


class _UnreadableImageError(ValueError):
    pass


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits: Pillow's own conversion clips, which turns almost every pixel white."""
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its Pillow mode is {image.mode!r}, in which the value of white is undefined; save it with 8 or 16 bits"
        )
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))


def inside(folder: Path, name: str) -> Path:
    """The path of file ``name`` in a folder.

    Raises:
        ValueError: The file does not exist, or its path leads out of the folder.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of {folder}; files must lie inside it")
    if not path.is_file():
        raise ValueError(f"no file {name!r} in {folder}")
    return path
