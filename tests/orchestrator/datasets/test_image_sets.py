"""Image folders, Parquet files and COCO captions: images are read lazily, and errors name the file or row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_examples import coco_captions, image_folder, image_parquet, plain, write_pictures
from PIL import Image

from orchestrator.datasets._images import decoded
from orchestrator.datasets.coco_captions import CocoCaptions
from orchestrator.datasets.image_folder import ImageFolder
from orchestrator.datasets.image_parquet import ImageParquet


def test_images_of_a_folder_are_sorted_by_name(tmp_path: Path) -> None:
    """The order does not depend on the file system."""
    write_pictures(tmp_path)
    samples = ImageFolder(str(tmp_path)).real_samples([2, 0])
    np.testing.assert_array_equal(samples, np.broadcast_to([plain(2), plain(0)], (2, 3, 8, 8)))


def test_subfolders_are_classes(tmp_path: Path) -> None:
    """Conditioning draws an image and takes its class, so classes are weighted by their number of images."""
    dataset = ImageFolder(**image_folder(tmp_path))
    assert dataset.classes == ["cats", "dogs"]
    labels = dataset.conditions(0, range(400))
    assert 150 < labels.sum() < 250


def test_images_are_cropped_to_the_centre_and_resized(tmp_path: Path) -> None:
    """A wide picture loses its sides; grayscale has one channel."""
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, 4:12] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (sample,) = ImageFolder(str(tmp_path), side=4, grayscale=True).real_samples([0])
    assert sample.shape == (1, 4, 4)
    np.testing.assert_array_equal(sample, np.ones_like(sample))


def test_images_of_several_sizes_require_a_side(tmp_path: Path) -> None:
    """The error names two images whose sizes differ."""
    write_pictures(tmp_path, 1)
    Image.new("RGB", (4, 8)).save(tmp_path / "z.png")
    with pytest.raises(ValueError, match=r"z\.png is 4x8, but .*0\.png is 8x8; set the option 'side'"):
        ImageFolder(str(tmp_path)).real_samples([0, 1])


def test_an_unreadable_image_is_reported_when_it_is_read(tmp_path: Path) -> None:
    """The error is raised on reading, not at the start: there may be a million files."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png is not a readable image"):
        ImageFolder(str(tmp_path)).real_samples([0])


def test_a_damaged_image_is_reported_whatever_pillow_raises(tmp_path: Path) -> None:
    """Broken PNG chunks, and a header that claims more pixels than fit into memory."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    first, *rest = (tmp_path / "a.png").read_bytes().split(b"IDAT")
    assert len(rest) > 1
    broken_chunks = b"IDAT".join([first, rest[0]]) + b"\xfb\xb9\x0b\x00".join([b"", *rest[1:]])
    Image.new("RGB", (8, 8)).save(tmp_path / "b.bmp")
    huge = bytearray((tmp_path / "b.bmp").read_bytes())
    huge[18:26] = (60_000).to_bytes(4, "little") * 2
    for name, content in (("a.png", broken_chunks), ("b.bmp", bytes(huge))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not a readable image: (broken|Image size)"):
            decoded(tmp_path / name, name)


@pytest.mark.parametrize("grayscale", [True, False])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, grayscale: bool) -> None:
    """Medical images and depth maps use 16 bits; Pillow's own conversion turns nearly all of them white."""
    levels = np.array([[0, 128 * 257], [64 * 257 + 100, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    pixels = (decoded(tmp_path / "a.png", "a.png", grayscale=grayscale) + 1) * 127.5
    np.testing.assert_allclose(pixels, np.broadcast_to([[0, 128], [64, 255]], pixels.shape), atol=1e-4)


def test_float_pixels_without_a_known_range_are_rejected(tmp_path: Path) -> None:
    """The file does not say how bright 1.0 or 70,000 is."""
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(
        ValueError, match=r"a\.tiff is not a readable image: .* mode is 'F', in which .*; save it with 8"
    ):
        decoded(tmp_path / "a.tiff", "a.tiff")


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_images_is_rejected(tmp_path: Path, name: str) -> None:
    """The error is raised when the dataset is built."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty|no folder .*missing"):
        ImageFolder(str(tmp_path / name))


def test_a_parquet_file_is_read_by_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows in three groups: reading them in order loads each group once and keeps one in memory."""
    dataset = ImageParquet(**image_parquet(tmp_path))
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kw: (read.append(i), original(self, i, **kw))[1]
    )
    samples = dataset.real_samples(range(6))
    np.testing.assert_array_equal(samples[:, :, :1, :1], [plain(i) for i in range(6)])
    assert read == [0, 1, 2]


def test_a_parquet_file_is_used_with_labels_or_texts(tmp_path: Path) -> None:
    """Labels condition class-conditional models; texts make the file a dataset of prompts."""
    options = image_parquet(tmp_path)
    labelled = ImageParquet(**options)
    assert set(labelled.conditions(0, range(100)).tolist()) == set(range(6))
    assert not hasattr(labelled, "texts")
    captioned = ImageParquet(**options | {"label_column": None, "text_column": "text"})
    assert captioned.texts([4, 0]) == ["picture 4", "picture 0"]
    with pytest.raises(ValueError, match="uses either labels or texts"):
        ImageParquet(**options | {"text_column": "text"})


def test_a_parquet_file_with_other_content_is_rejected(tmp_path: Path) -> None:
    """The error lists the columns that exist, or names the row whose cell is not an image."""
    options = image_parquet(tmp_path)
    with pytest.raises(ValueError, match="has no column 'img'; its columns are: image, label, text"):
        ImageParquet(**options | {"image_column": "img"})
    with pytest.raises(ValueError, match=r"row 3 of .* holds str instead of an encoded image"):
        ImageParquet(**options | {"image_column": "text"}).real_samples([3])
    with pytest.raises(ValueError, match="no Parquet file at"):
        ImageParquet(str(tmp_path / "none"))
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="holds no rows"):
        ImageParquet(str(tmp_path / "empty.parquet"))


def test_coco_prompts_are_captions_and_real_samples_are_images(tmp_path: Path) -> None:
    """MS-COCO has several captions per image: prompts are captions, real samples are images."""
    dataset = CocoCaptions(**coco_captions(tmp_path))
    assert set(dataset.conditions(0, range(300)).tolist()) == set(range(12))
    assert dataset.texts([11, 0]) == ["caption 11", "caption 0"]
    assert dataset.real_count() == 6
    np.testing.assert_array_equal(dataset.real_samples([5])[:, :, :1, :1], [plain(5)])
    assert CocoCaptions(dataset.annotations).real_count() == 0


def test_a_file_name_outside_the_image_folder_is_rejected(tmp_path: Path) -> None:
    """Annotation files come from third parties and must not make the dataset read other files."""
    options = coco_captions(tmp_path)
    content = json.loads(Path(options["annotations"]).read_text(encoding="utf-8"))
    for name, problem in (("../captions.json", "leads out of"), ("/etc/passwd", "leads out of"), ("7.png", "no file")):
        content["images"][0]["file_name"] = name
        Path(options["annotations"]).write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=problem):
            CocoCaptions(**options).real_samples([0])


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"images": []}', '{"images": [{}], "annotations": []}', '{"images": [], "annotations": []}']
)
def test_a_file_that_is_not_an_annotation_file_is_rejected(tmp_path: Path, text: str) -> None:
    """The error describes the expected format, or says that there are no captions."""
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not a caption file in COCO's format|holds no captions"):
        CocoCaptions(str(tmp_path / "a.json"))
