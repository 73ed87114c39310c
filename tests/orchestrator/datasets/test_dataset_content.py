"""The content of datasets: what pairs and measurements of real samples are stored under.

Each dataset lists a change of every option and of every kind of file it reads; a dataset or an option that is missing
in the list fails.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_examples import OPTIONS, write_pictures
from PIL import Image

from orchestrator import plugins
from orchestrator.datasets.base import Dataset

soundfile = pytest.importorskip("soundfile")

Options = dict[str, Any]
CONDITIONING, REAL = "conditioning", "real samples"


def _prompts(folder: Path) -> Options:
    (folder / "prompts.txt").write_text("a red fox\na blue whale\n", encoding="utf-8")
    return {"file": str(folder / "prompts.txt")}


def _cifar10(folder: Path) -> Options:
    pictures = [path.read_bytes() for path in write_pictures(folder / "source", side=32)]
    for split, shown in (("train", pictures[:4]), ("test", pictures[4:])):
        pq.write_table(pa.table({"image": shown, "label": range(len(shown))}), folder / f"cifar10-{split}.parquet")
    return {"folder": str(folder)}


def _spoken_digits(folder: Path) -> Options:
    rows = []
    for number, (speaker, take) in enumerate([("ann", 0), ("ann", 1), ("bob", 2), ("bob", 7), ("cid", 8)]):
        sound = io.BytesIO()
        soundfile.write(sound, 0.5 * np.sin(np.arange(3000) * 0.1 * (number + 1)), 8000, format="WAV")
        rows.append({"audio": sound.getvalue(), "digit": number, "speaker": speaker, "take": take})
    pq.write_table(pa.Table.from_pylist(rows), folder / "fsdd.parquet")
    return {"folder": str(folder)}


EXAMPLES: dict[str, Callable[[Path], Options]] = {
    **OPTIONS,
    "prompts": _prompts,
    "cifar10": _cifar10,
    "spoken_digits": _spoken_digits,
}


def _option(name: str, value: Any) -> Callable[[Path, Options], Options]:
    return lambda folder, options: {**options, name: value}


def _renamed(name: str) -> Callable[[Path, Options], Options]:
    """The file or folder that an option names has another name."""

    def change(folder: Path, options: Options) -> Options:
        path = Path(options[name])
        target = path.rename(folder / f"renamed{path.suffix}")
        return {**options, name: str(target)}

    return change


def _file(old: str, new: str, **changed: Any) -> Callable[[Path, Options], Options]:
    """A file is renamed, and options with it."""

    def change(folder: Path, options: Options) -> Options:
        (folder / old).rename(folder / new)
        return {**options, **changed}

    return change


def _written(name: str, old: str, new: str) -> Callable[[Path, Options], Options]:
    """Part of a text file is replaced."""

    def change(folder: Path, options: Options) -> Options:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
        return options

    return change


def _column(file: str, column: str, row: int, value: Any) -> Callable[[Path, Options], Options]:
    """One value of a Parquet file is replaced."""

    def change(folder: Path, options: Options) -> Options:
        rows = pq.read_table(folder / file).to_pylist()
        rows[row][column] = value
        pq.write_table(pa.Table.from_pylist(rows), folder / file, row_group_size=2)
        return options

    return change


def _picture(name: str, size: int = 8) -> Callable[[Path, Options], Options]:
    """One picture is replaced by another of the same name."""

    def change(folder: Path, options: Options) -> Options:
        assert (folder / name).is_file()
        Image.new("RGB", (size, size), (9, 9, 9)).save(folder / name)
        return options

    return change


def _encoded(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (9, 9, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def _recording(folder: Path, options: Options) -> Options:
    """A recording is replaced by another of the same length."""
    soundfile.write(folder / "one.wav", 0.4 * np.sin(np.arange(800) * 0.3), 8000)
    return options


def _other_columns(**names: str) -> Callable[[Path, Options], Options]:
    """Columns of the audio manifest are renamed, in the file and in the options."""

    def change(folder: Path, options: Options) -> Options:
        _written("manifest.csv", "path,transcript", ",".join(names.get(c, c) for c in ("path", "transcript")))(
            folder, options
        )
        return {**options, **names}

    return change


def _speakers(folder: Path, options: Options) -> Options:
    """Both recordings of the manifest have the same speaker, and so each other's voice."""
    rows = (folder / "manifest.csv").read_text(encoding="utf-8").splitlines()
    text = "\n".join([f"{rows[0]},who", *(f"{row},ann" for row in rows[1:])])
    (folder / "manifest.csv").write_text(text, encoding="utf-8")
    return {**options, "speaker": "who"}


def _image_column(folder: Path, options: Options) -> Options:
    rows = pq.read_table(folder / "pictures.parquet").to_pylist()
    table = pa.Table.from_pylist([{**row, "other": row["image"]} for row in rows])
    pq.write_table(table, folder / "pictures.parquet", row_group_size=2)
    return {**options, "image_column": "other"}


def _as_texts(folder: Path, options: Options) -> Options:
    return {**options, "label_column": None, "text_column": "text"}


def _prompt_column(folder: Path, options: Options) -> Options:
    """The same prompts in a Parquet file, in a column of another name."""
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").split("\n")[:-1]
    pq.write_table(pa.table({"text": prompts}), folder / "prompts.parquet")
    return {"file": str(folder / "prompts.parquet"), "column": "text"}


def _moved(folder: Path, options: Options) -> Options:
    """Everything lies in another folder."""
    shutil.copytree(folder, folder / "elsewhere")
    return json.loads(json.dumps(options).replace(str(folder), str(folder / "elsewhere")))


def _function(folder: Path, options: Options, name: str) -> Options:
    """The same arrays, from a function."""
    code = f"""
from pathlib import Path

from orchestrator.datasets._arrays import read_file


def arrays(sign=1):
    read = dict(read_file(Path({options["file"]!r}), None))
    lists = read["values"]
    return {{**read, "values": type(lists)(sign * lists.entries, lists.lengths)}}
"""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    rest = {key: value for key, value in options.items() if key != "file"}
    return {**rest, "function": f"{name}:arrays", "path": str(folder)}


def _as_function(folder: Path, options: Options) -> Options:
    return _function(folder, options, "rows_of_a_test")


def _function_elsewhere(folder: Path, options: Options) -> Options:
    (folder / "code").mkdir()
    return _function(folder / "code", options, "rows_of_a_test_elsewhere")


def _function_with_kwargs(folder: Path, options: Options) -> Options:
    return {**_function(folder, options, "rows_of_a_test_with_kwargs"), "kwargs": {"sign": -1}}


def _shared(folder: Path, options: Options) -> Options:
    """Another file, in which all rows share an array."""
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    np.savez(folder / "rows.npz", obs=np.array([row["obs"] for row in rows]), constant=np.zeros(len(rows)))
    return {"file": str(folder / "rows.npz"), "shared": ["constant"]}


def _sha256(option_file: Callable[[Options], Path]) -> Callable[[Path, Options], Options]:
    return lambda folder, options: {**options, "sha256": hashlib.sha256(option_file(options).read_bytes()).hexdigest()}


Change = tuple[str, Callable[[Path, Options], Options], set[str]]
"""What is changed (an option's name, or a file), how, and what it decides."""

PREPARATION: list[Change] = [("side", _option("side", 4), {REAL}), ("grayscale", _option("grayscale", True), {REAL})]

CHANGES: dict[str, list[Change]] = {
    "digits": [],
    "labels": [
        ("classes", _option("classes", 3), {CONDITIONING}),
        ("first", _option("first", 1), {CONDITIONING}),
    ],
    "prompts": [
        ("prompts", lambda folder, options: {"prompts": ["a cat"]}, {CONDITIONING}),
        ("file", _renamed("file"), set()),
        ("column", _prompt_column, set()),
        ("sha256", _sha256(lambda options: Path(options["file"])), set()),
        ("a prompt", _written("prompts.txt", "fox", "dog"), {CONDITIONING}),
        ("the order of prompts", _written("prompts.txt", "a red fox\na blue", "a blue whale\na red"), {CONDITIONING}),
    ],
    "coco_captions": [
        *PREPARATION,
        ("annotations", _renamed("annotations"), set()),
        ("images", _renamed("images"), set()),
        ("a caption", _written("captions.json", "caption 3", "another"), {CONDITIONING}),
        ("an image", _picture("val2014/2.png"), {REAL}),
    ],
    "image_folder": [
        *PREPARATION,
        ("folder", _renamed("folder"), set()),
        ("an image", _picture("pictures/cats/1.png"), {REAL}),
        (
            "the class of an image",
            lambda folder, options: [(folder / "pictures/cats/1.png").rename(folder / "pictures/dogs/1.png"), options][
                1
            ],
            {CONDITIONING, REAL},  # and with it the order of the images
        ),
    ],
    "image_parquet": [
        *PREPARATION,
        ("path", _renamed("path"), set()),
        ("image_column", _image_column, {REAL}),
        ("label_column", _option("label_column", None), {CONDITIONING}),
        ("text_column", _as_texts, {CONDITIONING}),
        ("a label", _column("pictures.parquet", "label", 2, 0), {CONDITIONING, REAL}),  # one file holds both
        ("an image", _column("pictures.parquet", "image", 2, {"bytes": _encoded(8), "path": None}), {REAL}),
    ],
    "cifar10": [
        ("folder", _moved, set()),
        ("split", _option("split", "test"), {REAL}),
        ("side", _option("side", 8), {REAL}),
        ("grayscale", _option("grayscale", True), {REAL}),
        ("an image", _column("cifar10-train.parquet", "image", 0, _encoded(32)), {REAL}),
    ],
    "audio_folder": [
        ("folder", _moved, set()),
        (
            "manifest",
            lambda folder, options: [
                (folder / "manifest.csv").rename(folder / "m.csv"),
                {**options, "manifest": "m.csv"},
            ][1],
            set(),
        ),
        ("path", _other_columns(path="file"), set()),
        ("transcript", _other_columns(transcript="words"), set()),
        ("speaker", _speakers, {CONDITIONING}),
        ("sha256", _sha256(lambda options: Path(options["folder"]) / "manifest.csv"), set()),
        ("a transcript", _written("manifest.csv", ",two", ",three"), {CONDITIONING}),
        ("a recording", _recording, {CONDITIONING, REAL}),
    ],
    "tensors": [
        ("file", _renamed("file"), set()),
        ("function", _as_function, set()),
        ("path", _function_elsewhere, set()),
        ("kwargs", _function_with_kwargs, {CONDITIONING, REAL}),
        ("arrays", _option("arrays", ["values", "label", "ids", "split"]), {CONDITIONING}),
        ("shared", _shared, {CONDITIONING, REAL}),
        ("padding", _option("padding", {"ids": -1}), {CONDITIONING}),
        ("padding_masks", _option("padding_masks", {"ids": "present"}), {CONDITIONING}),
        ("samples", _option("samples", "other"), {REAL}),
        ("labels", _option("labels", None), {CONDITIONING, REAL}),
        ("mask", _option("mask", "keep"), {CONDITIONING}),
        ("split", _option("split", "split"), {CONDITIONING}),
        ("part", _option("part", "test"), {CONDITIONING}),
        ("an observation", _column("rows.parquet", "obs", 3, [0.0] * 5), {CONDITIONING}),
        ("a real sample", _column("rows.parquet", "values", 3, [[[0.0] * 2] * 4]), {CONDITIONING, REAL}),
    ],
    "spoken_digits": [
        ("folder", _moved, set()),
        ("split", _option("split", "train"), {CONDITIONING}),
        ("speaker", _option("speaker", "bob"), {CONDITIONING}),
        ("a recording's digit", _column("fsdd.parquet", "digit", 0, 9), {CONDITIONING}),
    ],
}


def _example(name: str, folder: Path) -> Options:
    return EXAMPLES[name](folder) if name in EXAMPLES else {}


def _decides(name: str, options: Options) -> dict[str, str | None]:
    dataset: Dataset = plugins.build("datasets", name, options)
    return {CONDITIONING: dataset.content, REAL: dataset.real_content if dataset.real_count() else None}


def test_every_option_of_every_dataset_is_changed_here() -> None:
    """A new dataset or option needs a line that says what it decides."""
    options = {name: {f.name for f in fields(plugin)} for name, plugin in plugins.every("datasets")}
    changed = {name: {what for what, _, _ in changes} for name, changes in CHANGES.items()}
    assert not {f"{name}.{option}" for name, names in options.items() for option in names - changed[name]}


@pytest.mark.parametrize(
    ("name", "change"),
    [pytest.param(name, change, id=f"{name}: {change[0]}") for name, changes in CHANGES.items() for change in changes],
)
def test_content_changes_exactly_with_what_it_covers(name: str, change: Change, tmp_path: Path) -> None:
    """What decides conditions changes the content, what decides real samples the real content, and a place neither."""
    _, apply, expected = change
    options = _example(name, tmp_path)
    before = _decides(name, options)
    after = _decides(name, apply(tmp_path, options))
    assert {what for what in before if before[what] != after[what]} == expected


@pytest.mark.parametrize("name", EXAMPLES)
def test_files_that_were_moved_and_touched_have_the_same_content(name: str, tmp_path: Path) -> None:
    """Neither the place nor the time of a file counts, nor what the system leaves beside it."""
    options = _example(name, tmp_path)
    before = _decides(name, options)
    moved = _moved(tmp_path, options)
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
        if path.is_dir():
            (path / ".hidden.png").write_bytes(b"no image")
    assert _decides(name, moved) == before
