"""Which files of a folder are data, and text as people save it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator import plugins
from orchestrator.files import data_files, data_folders, read_text

HIDDEN = (
    "._0.png",
    ".ipynb_checkpoints/0-checkpoint.png",
    "__MACOSX/cat/0.png",
    ".git/0.png",
    "cat/._0.png",
    "Thumbs.db",
)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of three images."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_systems_leave_in_folders_is_neither_an_image_nor_a_class(pets: Path, hidden: str) -> None:
    """A notebook's or a Mac's hidden files would add a class and move the labels of all others."""
    before = plugins.build("datasets", "image_folder", {"folder": str(pets)})
    (pets / hidden).parent.mkdir(exist_ok=True, parents=True)
    (pets / hidden).write_bytes(b"\x00\x05\x16\x07")
    after = plugins.build("datasets", "image_folder", {"folder": str(pets)})
    assert (after.files, after.classes) == (before.files, ["cat", "dog"])
    after.check()
    after.check_real()
    assert data_folders(pets) == [pets / "cat", pets / "dog"]


def test_a_hidden_folder_may_hold_the_data(tmp_path: Path) -> None:
    """Only names below the folder count: caches often lie in hidden folders."""
    folder = tmp_path / ".cache" / "images"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "0.PNG")
    assert data_files(folder, [".png"]) == [folder / "0.PNG"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pets: (pets / "bird").mkdir(), r"bird is a class without images; add some, or move"),
        (
            lambda pets: (pets / "cat" / "0.png").rename(pets / "x.png"),
            r"x\.png lies beside the folders of",
        ),
    ],
    ids=["empty class", "no class"],
)
def test_images_and_folders_without_a_class_are_refused(pets: Path, spoil: Callable[[Path], Any], message: str) -> None:
    """An empty folder would leave out a label number; an image beside the classes would be of the first class."""
    spoil(pets)
    with pytest.raises(ValueError, match=message):
        plugins.build("datasets", "image_folder", {"folder": str(pets)}).check()


@pytest.mark.parametrize(
    ("data", "line", "text"),
    [
        ("\ufeffa\nb".encode(), "b", "a\nb"),
        (b"a\r\nb", "b", "a\nb"),
        ("a\u2028b\nc".encode(), "c", "a\u2028b\nc"),
        ("a\x0bb\x85c\x1cd".encode(), "a\x0bb\x85c\x1cd", "a\x0bb\x85c\x1cd"),
    ],
    ids=["byte order mark", "windows", "U+2028", "control characters"],
)
def test_text_is_read_as_people_save_it(tmp_path: Path, data: bytes, line: str, text: str) -> None:
    """A byte order mark is not part of the first word, and only line feeds and carriage returns end a line."""
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == text
    assert text.split("\n")[-1] == line


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\xff", r"a\.txt is not UTF-8 text: it has the byte 0xff in line 2; save it as UTF-8"),
        ("text".encode("utf-16"), r"a\.txt is not UTF-8 text: it is UTF-16; save it as UTF-8"),
    ],
)
def test_text_in_another_encoding_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    """With the line and the remedy."""
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "a.txt")


def encoded(kind: str) -> bytes:
    """A noisy image of 40x40 pixels in a format."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: b"no image", lambda data: data[: len(data) // 2]])
def test_an_image_that_cannot_be_read_is_named_before_work_starts(
    tmp_path: Path, kind: str, spoil: Callable[[bytes], bytes]
) -> None:
    """Empty, of another kind, or truncated."""
    for i in range(3):
        (tmp_path / f"{i}.{kind.lower()}").write_bytes(encoded(kind))
    dataset = plugins.build("datasets", "image_folder", {"folder": str(tmp_path)})
    dataset.check_real()
    (tmp_path / f"1.{kind.lower()}").write_bytes(spoil(encoded(kind)))
    with pytest.raises(ValueError, match=rf"1\.{kind.lower()} is not a readable image: .*; remove or replace it"):
        dataset.check_real()


def test_images_of_several_sizes_are_named_before_work_starts(tmp_path: Path) -> None:
    """With the option that makes them equal."""
    for side in (8, 9):
        Image.new("RGB", (side, 8)).save(tmp_path / f"{side}.png")
    with pytest.raises(ValueError, match=r"9\.png is 9x8, but .*8\.png is 8x8; set the option 'side'"):
        plugins.build("datasets", "image_folder", {"folder": str(tmp_path)}).check_real()
    plugins.build("datasets", "image_folder", {"folder": str(tmp_path), "side": 4}).check_real()
