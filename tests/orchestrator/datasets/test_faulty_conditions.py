"""Conditions that are missing or out of range are refused before work starts, by file, row and value."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator import plugins


def built(name: str, options: dict[str, Any]) -> Any:
    """A dataset that passed both of its checks."""
    dataset = plugins.build("datasets", name, options)
    dataset.check()
    dataset.check_real()
    return dataset


def parquet(folder: Path, **columns: list[Any]) -> str:
    """A file of images with these columns."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [buffer.getvalue()] * rows} | columns), folder / "i.parquet")
    return str(folder / "i.parquet")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, None, 2], r"row 1 of .*i\.parquet has no label: column 'x' is null; correct or remove the row"),
        ([1.0, 0.2], r"row 1 of .*i\.parquet has 0\.2 in column 'x', which is not a class label: labels are whole"),
        ([1.0, float("nan")], r"row 1 of .*i\.parquet has nan in column 'x'"),
        ([3, -1], r"row 1 of .*i\.parquet has -1 in column 'x'"),
        ([True, False], r"column 'x' of .*i\.parquet holds bool, not class labels; choose another column"),
        (["cat", "dog"], r"column 'x' of .*i\.parquet holds string, not class labels"),
    ],
)
def test_labels_that_are_not_labels_are_refused(tmp_path: Path, labels: list[Any], message: str) -> None:
    """A fraction would be rounded in silence, a negative label would count from the end of a network's table."""
    with pytest.raises(ValueError, match=message):
        built("image_parquet", {"path": parquet(tmp_path, x=labels), "label_column": "x"})


def test_whole_numbers_stored_as_floats_are_labels(tmp_path: Path) -> None:
    """Programs that know no missing integers store them so."""
    dataset = built("image_parquet", {"path": parquet(tmp_path, x=[4.0, 4.0]), "label_column": "x"})
    assert dataset.conditions(0, [0, 1]).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], r"row 1 of .*i\.parquet has no text: column 'x' is null; correct or remove the row"),
        ([1, 2], r"column 'x' of .*i\.parquet holds int64, not texts; choose another column"),
    ],
)
@pytest.mark.parametrize("name", ["image_parquet", "prompts"])
def test_texts_that_are_missing_are_refused(tmp_path: Path, name: str, texts: list[Any], message: str) -> None:
    """A null would become the prompt "None", or would shift the numbers of all later prompts."""
    path = parquet(tmp_path, x=texts)
    options = {"file": path, "column": "x"} if name == "prompts" else {"path": path, "text_column": "x"}
    with pytest.raises(ValueError if name == "image_parquet" else Exception, match=message):
        built(name, options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"images": [{"file_name": "a.png"}], "annotations": [{"caption": "a"}, {"caption": None}]},
            r"entry 1 of 'annotations' in .*c\.json has no text as 'caption', got None; correct or remove it",
        ),
        (
            {"images": [{"file_name": 3}], "annotations": [{"caption": "a"}]},
            r"entry 0 of 'images' in .*c\.json has no text as 'file_name', got 3",
        ),
    ],
)
def test_captions_that_are_missing_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    """A null would become the prompt "None"."""
    (tmp_path / "c.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(Exception, match=message):
        built("coco_captions", {"annotations": str(tmp_path / "c.json")})


WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "prompts": lambda folder: {"file": str(folder / "p.txt")},
    "coco_captions": lambda folder: {"annotations": str(folder / "c.json")},
    "audio_folder": lambda folder: {"folder": str(folder), "manifest": "m.csv"},
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_text_file_may_begin_with_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    """As Windows editors and Excel write it; U+2028 does not end a prompt."""
    captions = {"images": [], "annotations": [{"caption": "a\u2028b"}]}
    for file, text in (
        ("p.txt", "a\u2028b\n"),
        ("c.json", json.dumps(captions, ensure_ascii=False)),
        ("m.csv", "path,transcript\nw.wav,a\u2028b\n"),
    ):
        (tmp_path / file).write_text("\ufeff" + text, encoding="utf-8")
    (tmp_path / "w.wav").touch()
    assert plugins.build("datasets", name, WRITERS[name](tmp_path)).texts([0]) == ["a\u2028b"]


def test_an_unquoted_separator_in_a_manifest_is_refused(tmp_path: Path) -> None:
    """It would cut the transcript."""
    (tmp_path / "manifest.csv").write_text("path,transcript\nw.wav,one, two\n", encoding="utf-8")
    with pytest.raises(Exception, match=r"row 1 of .*manifest\.csv has more fields than the header; put texts with a"):
        built("audio_folder", {"folder": str(tmp_path)})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prompts", {"file": "x.parquet"}),
        ("image_parquet", {"path": "x.parquet"}),
        ("audio_folder", {"folder": ".", "manifest": "x.parquet"}),
    ],
)
def test_a_file_that_is_not_parquet_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    """Such as a text file with that ending."""
    monkeypatch.chdir(tmp_path)
    Path("x.parquet").write_text("no parquet", encoding="utf-8")
    with pytest.raises(Exception, match=r"x\.parquet is not a Parquet file: .*; replace it"):
        built(name, options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "labels",
            {"classes": 4},
            r"draws from 4 classes, but the model has 3; set conditioning\.options\.classes to 3",
        ),
        ("digits", {}, r"draws from 10 classes, but the model has 3; choose a dataset with as many"),
        ("prompts", {}, r"the model is conditioned on class labels, which Prompts does not provide"),
        ("image_parquet", {"label_column": "x"}, r"row 1 of .*i\.parquet has label 3 in column 'x', but the model has"),
    ],
)
def test_labels_that_the_model_does_not_have_are_refused(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    """Before a host starts; the numbers of prompts are not labels."""
    path = {"path": parquet(tmp_path, x=[2, 3])} if name == "image_parquet" else {}
    dataset = built(name, options | path)
    with pytest.raises(ValueError, match=message):
        dataset.check_labels(3, "the model")
    if name != "prompts":
        dataset.check_labels(10, "the model")
