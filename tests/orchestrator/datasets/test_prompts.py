"""Prompts from a list, a text file or a Parquet file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import plugins
from orchestrator.datasets.prompts import Prompts
from orchestrator.errors import ConfigError

TEXTS = ["a cat", "two dogs at sea", "an old boat"]


def text_file(folder: Path) -> dict[str, Any]:
    """Options of a text file with TEXTS, with a blank line and spaces to be stripped."""
    (folder / "prompts.txt").write_text("a cat\n\n  two dogs at sea \nan old boat\n", encoding="utf-8")
    return {"file": str(folder / "prompts.txt")}


def parquet_file(folder: Path) -> dict[str, Any]:
    """Options of a Parquet file with TEXTS."""
    pq.write_table(pa.table({"caption": TEXTS, "width": [1, 2, 3]}), folder / "prompts.parquet")
    return {"file": str(folder / "prompts.parquet"), "column": "caption"}


@pytest.mark.parametrize(
    "source", [lambda folder: {"prompts": TEXTS}, text_file, parquet_file], ids=["list", "txt", "pq"]
)
def test_prompts_come_from_a_list_or_a_file(tmp_path: Path, source: Any) -> None:
    """Each source gives the same prompts in the same order, so each pair has the same text. Blank lines are skipped."""
    dataset = plugins.build("datasets", "prompts", source(tmp_path))
    assert dataset.texts([0, 1, 2]) == TEXTS
    expected = Prompts(prompts=tuple(TEXTS)).conditions(3, range(40)).tolist()
    assert dataset.conditions(3, range(40)).tolist() == expected
    assert set(expected) == {0, 1, 2}


def test_a_changed_file_is_rejected_by_its_sha256(tmp_path: Path) -> None:
    """With a sha256 in the configuration, stored pairs cannot be used with other prompts."""
    options = text_file(tmp_path)
    sha256 = hashlib.sha256(Path(options["file"]).read_bytes()).hexdigest()
    assert Prompts(**options, sha256=sha256).texts([0]) == ["a cat"]
    Path(options["file"]).write_text("a dog\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=rf"prompts\.txt has sha256 \w+, not {sha256}; use the file the pairs were mad"
    ):
        plugins.build("datasets", "prompts", {**options, "sha256": sha256})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, r"the list holds no prompts; add at least one"),
        ({"prompts": "a cat"}, r"prompts must be a list of texts, got 'a cat'"),
        ({"prompts": [3]}, r"prompts must be a list of texts, got \[3\]"),
        (
            {"file": "/nowhere.txt"},
            r"no prompts file at /nowhere\.txt; set file to an existing \.txt or \.parquet file",
        ),
        ({"sha256": "ab"}, r"sha256 applies to a file, but no file is set; remove it"),
    ],
)
def test_invalid_sources_of_prompts_are_rejected(options: dict[str, Any], message: str) -> None:
    """They are rejected before any actor starts."""
    with pytest.raises(ConfigError, match=message):
        plugins.build("datasets", "prompts", options)


def test_a_file_without_the_column_or_of_another_type_is_rejected(tmp_path: Path) -> None:
    """The error lists the columns that exist, or the supported file types."""
    options = parquet_file(tmp_path)
    with pytest.raises(ConfigError, match=r"has no column 'prompt'; its columns are: caption, width"):
        plugins.build("datasets", "prompts", {"file": options["file"]})
    (tmp_path / "prompts.csv").write_text("a cat", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"prompts\.csv is neither \.txt \(one prompt per line\) nor \.parquet"):
        plugins.build("datasets", "prompts", {"file": str(tmp_path / "prompts.csv")})
