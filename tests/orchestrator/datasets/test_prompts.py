"""Prompts, from wherever they are kept."""

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


def in_text(folder: Path) -> dict[str, Any]:
    (folder / "prompts.txt").write_text("a cat\n\n  two dogs at sea \nan old boat\n", encoding="utf-8")
    return {"file": str(folder / "prompts.txt")}


def in_parquet(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"caption": TEXTS, "width": [1, 2, 3]}), folder / "prompts.parquet")
    return {"file": str(folder / "prompts.parquet"), "column": "caption"}


@pytest.mark.parametrize("source", [lambda folder: {"prompts": TEXTS}, in_text, in_parquet], ids=["list", "txt", "pq"])
def test_prompts_come_from_a_list_or_a_file(tmp_path: Path, source: Any) -> None:
    """The same prompts in the same order, so that the same pair has the same text; blank lines are none."""
    dataset = plugins.build("datasets", "prompts", source(tmp_path))
    assert dataset.texts([0, 1, 2]) == TEXTS
    expected = Prompts(prompts=tuple(TEXTS)).conditions(3, range(40)).tolist()
    assert dataset.conditions(3, range(40)).tolist() == expected
    assert set(expected) == {0, 1, 2}


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    """Where its sha256 is part of the configuration, stored pairs never belong to other prompts."""
    options = in_text(tmp_path)
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
        ({"prompts": "a cat"}, r"prompts must be a list of strings, got 'a cat'"),
        ({"prompts": [3]}, r"prompts must be a list of strings, got \[3\]"),
        (
            {"file": "/nowhere.txt"},
            r"no prompts file at /nowhere\.txt; set file to an existing \.txt or \.parquet file",
        ),
        ({"sha256": "ab"}, r"sha256 applies to a file, but no file is set; remove it"),
    ],
)
def test_prompts_that_cannot_be_had_are_refused(options: dict[str, Any], message: str) -> None:
    """Before any actor starts."""
    with pytest.raises(ConfigError, match=message):
        plugins.build("datasets", "prompts", options)


def test_a_file_without_the_column_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    """With the columns that there are."""
    options = in_parquet(tmp_path)
    with pytest.raises(ConfigError, match=r"has no column 'prompt'; its columns are: caption, width"):
        plugins.build("datasets", "prompts", {"file": options["file"]})
    (tmp_path / "prompts.csv").write_text("a cat", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"prompts\.csv is neither \.txt \(one prompt per line\) nor \.parquet"):
        plugins.build("datasets", "prompts", {"file": str(tmp_path / "prompts.csv")})
