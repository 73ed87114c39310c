"""A small example of every dataset that needs files, for the contract tests of datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.datasets.base import Dataset

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (20, 40, 60))


def write_pictures(folder: Path, count: int = 6, side: int = 8) -> list[Path]:
    """Write single-colour pictures named 0.png, 1.png, …, each in another colour."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, colour in zip(paths, COLOURS, strict=False):
        Image.new("RGB", (side, side), colour).save(path)
    return paths


def image_folder(folder: Path) -> dict[str, Any]:
    """Two classes of three pictures."""
    for path in write_pictures(folder / "pictures"):
        subfolder = folder / "pictures" / ("cats" if int(path.stem) % 2 else "dogs")
        subfolder.mkdir(exist_ok=True)
        path.rename(subfolder / path.name)
    return {"folder": str(folder / "pictures")}


def image_parquet(folder: Path) -> dict[str, Any]:
    """Six pictures in row groups of two, with labels and texts."""
    encoded = [path.read_bytes() for path in write_pictures(folder / "source")]
    table = pa.table(
        {
            "image": [{"bytes": data, "path": None} for data in encoded],
            "label": list(range(6)),
            "text": [f"picture {number}" for number in range(6)],
        }
    )
    pq.write_table(table, folder / "pictures.parquet", row_group_size=2)
    return {"path": str(folder / "pictures.parquet"), "label_column": "label"}


def coco_captions(folder: Path) -> dict[str, Any]:
    """Six pictures with two captions each."""
    paths = write_pictures(folder / "val2014")
    content = {
        "images": [{"id": i, "file_name": path.name} for i, path in enumerate(paths)],
        "annotations": [{"image_id": i // 2, "caption": f"caption {i}"} for i in range(12)],
    }
    (folder / "captions.json").write_text(json.dumps(content), encoding="utf-8")
    return {"annotations": str(folder / "captions.json"), "images": str(folder / "val2014")}


def audio_folder(folder: Path) -> dict[str, Any]:
    """Two short tones with a manifest."""
    soundfile = pytest.importorskip("soundfile")
    rows = ["path,transcript"]
    for number, name in enumerate(("one", "two"), start=1):
        soundfile.write(folder / f"{name}.wav", 0.5 * np.sin(np.arange(800) * 0.1 * number), 8000)
        rows.append(f"{name}.wav,{name}")
    (folder / "manifest.csv").write_text("\n".join(rows), encoding="utf-8")
    return {"folder": str(folder)}


def tensors(folder: Path) -> dict[str, Any]:
    """Twenty rows of every kind of column: samples, labels, an observation, ids of different lengths, a split."""
    random = np.random.default_rng(0)
    rows = [
        {
            "values": random.uniform(-1, 1, (1, 4, 2)).tolist(),
            "other": random.uniform(-1, 1, (1, 4, 2)).tolist(),
            "keep": (random.random((1, 4, 2)) < 0.9).tolist(),
            "label": number % 3,
            "obs": random.standard_normal(5).tolist(),
            "ids": random.integers(1, 9, 1 + number % 4).tolist(),
            "split": ("train", "train", "validation", "test")[number % 4],
        }
        for number in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return {"file": str(folder / "rows.parquet"), "samples": "values", "labels": "label", "part": "train"}


OPTIONS = {
    "audio_folder": audio_folder,
    "image_folder": image_folder,
    "image_parquet": image_parquet,
    "coco_captions": coco_captions,
    "tensors": tensors,
}


def example(plugin: type[Dataset], folder: Path) -> Dataset:
    """A dataset of this type; any files it needs are written to ``folder``."""
    make = OPTIONS.get(plugin.__module__.rpartition(".")[2])
    return plugin(**make(folder)) if make else plugin()


def plain(colour: int) -> np.ndarray:
    """The sample of a picture from :func:`write_pictures`, shape (3, 1, 1), to be broadcast over its pixels."""
    return np.array(COLOURS[colour], dtype=np.float32)[:, None, None] / 127.5 - 1
