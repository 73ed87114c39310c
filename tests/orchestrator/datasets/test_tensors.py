"""Named arrays from files and functions: types, padding, splits, and errors that name the array and the row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from orchestrator import plugins
from orchestrator.datasets.base import SPLITS
from orchestrator.datasets.tensors import Tensors
from orchestrator.errors import ConfigError

ROWS = np.array([2, 0])


def build(**options: Any) -> Tensors:
    """The dataset, checked as before a run."""
    dataset: Tensors = plugins.build("datasets", "tensors", options)
    dataset.check()
    dataset.check_real()
    return dataset


def written(folder: Path, **arrays: Any) -> dict[str, Any]:
    """A .npz file with these arrays; options of the dataset."""
    np.savez(folder / "rows.npz", **arrays)
    return {"file": str(folder / "rows.npz")}


def test_every_source_gives_the_same_arrays(tmp_path: Path) -> None:
    """Of .npz, safetensors, Parquet and a function: floats keep their type, integers become int64, booleans stay."""
    obs, ids = np.arange(60, dtype=np.float32).reshape(20, 3), np.arange(20, dtype=np.int16)
    keep = np.arange(40).reshape(20, 2) % 3 > 0
    np.savez(tmp_path / "a.npz", obs=obs, ids=ids, keep=keep)
    save_file(
        {"obs": torch.from_numpy(obs), "ids": torch.from_numpy(ids), "keep": torch.from_numpy(keep)},
        tmp_path / "a.safetensors",
    )
    table = {"obs": list(obs), "ids": ids, "keep": pa.FixedShapeTensorArray.from_numpy_ndarray(keep.astype(np.uint8))}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=7)
    code = "import numpy as np\ndef arrays(file):\n    return dict(np.load(file))\n"
    (tmp_path / "arrays_of_a_test.py").write_text(code, encoding="utf-8")
    function = {
        "function": "arrays_of_a_test:arrays",
        "path": str(tmp_path),
        "kwargs": {"file": str(tmp_path / "a.npz")},
    }
    for options in ({"file": str(tmp_path / f"a{end}")} for end in (".npz", ".safetensors", ".parquet")):
        found = build(**options).tensors(ROWS, ["obs", "ids", "keep"]).tensors
        assert torch.equal(found["obs"], torch.from_numpy(obs[ROWS]))
        assert found["ids"].dtype == torch.int64
        assert torch.equal(found["keep"].bool(), torch.from_numpy(keep[ROWS]))
    assert build(**function).content == build(file=str(tmp_path / "a.npz")).content


def test_lists_are_padded_with_a_value_and_a_mask(tmp_path: Path) -> None:
    """Lists of numbers and of vectors, to the longest; a row with no entry is all padding."""
    lists = {"ids": [[4], [1, 2, 3], []] * 8, "points": [[[1.0, 2.0]], [], [[3.0, 4.0], [5.0, 6.0]]] * 8}
    pq.write_table(pa.table(lists), tmp_path / "a.parquet")
    dataset = build(file=str(tmp_path / "a.parquet"), padding={"ids": 9}, padding_masks={"ids": "present"})
    found = dataset.tensors(np.array([0, 1, 2]), ["ids", "present", "points"]).tensors
    assert found["ids"].tolist() == [[4, 9, 9], [1, 2, 3], [9, 9, 9]]
    assert found["present"].tolist() == [[True, False, False], [True, True, True], [False, False, False]]
    assert found["points"].tolist() == [[[1, 2], [0, 0]], [[0, 0], [0, 0]], [[3, 4], [5, 6]]]


def test_rows_are_split_by_shares_or_by_an_array(tmp_path: Path) -> None:
    """Every row belongs to one part, and conditions are drawn from the rows of the part alone."""
    names = np.array(["train", "test", "validation", "train"] * 10)
    options = written(tmp_path, obs=np.zeros((40, 2)), named=names, numbered=np.array([0, 2, 1, 0] * 10))
    for split in ({"train": 0.5, "validation": 0.25, "test": 0.25}, "named", "numbered"):
        drawn = [set(build(**options, split=split, part=p).conditions(3, range(500)).tolist()) for p in SPLITS]
        assert sorted(row for rows in drawn for row in rows) == list(range(40))
        assert [len(rows) for rows in drawn] == [20, 10, 10]
        if isinstance(split, str):
            assert {names[row] for row in drawn[0]} == {"train"}


def test_labels_of_rows_are_what_a_model_with_classes_takes(tmp_path: Path) -> None:
    """A model without named conditions gets the labels of the drawn rows."""
    options = written(tmp_path, digit=np.arange(20) % 7, image=np.zeros((20, 1, 8, 8), np.float32))
    dataset = build(**options, labels="digit", samples="image")
    model = plugins.build("models", "zoo", {"weights": "digits_fm_ot"})
    model.check_conditioning({"weights": "digits_fm_ot"}, dataset)
    rows = dataset.conditions(0, range(5))
    assert model.encode_conditions(torch.from_numpy(rows), dataset).tolist() == (rows % 7).tolist()
    assert dataset.real_samples([0, 3]).shape == (2, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"Tensors does not provide; set conditioning.options.labels"):
        model.check_conditioning({"weights": "digits_fm_ot"}, build(**options))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"labels": "digits"},
            r"labels: .*rows.npz has no array 'digits'; its arrays are: obs, gap, half, flag, short",
        ),
        ({"arrays": ["obs", "short"]}, r"differ in their number of rows: obs 20, short 3; list those without"),
        ({"arrays": ["obs", "gap"]}, r"row 4 of 'gap' of .* holds a number that is not finite; correct or remove"),
        ({"arrays": ["obs", "half"], "labels": "half"}, r"row 1 of .* has label 0.5 in 'half'; labels are whole"),
        ({"arrays": ["obs", "half"], "mask": "half"}, r"mask: 'half' of .* must hold 0 and 1 only"),
        ({"arrays": ["obs", "half"], "split": "half"}, r"split: 'half' must hold train, validation, test, or 0, 1, 2"),
        ({"arrays": ["obs"], "split": {"train": 0.9}}, r"split must give the shares of train, validation and test"),
        ({"arrays": ["obs"], "padding": {"obs": 0}}, r"padding names 'obs', which is an array, not lists; remove it"),
        (
            {"arrays": ["obs"], "split": {"train": 0.98, "validation": 0.01, "test": 0.01}},
            r"split leaves no row for validation pairs: .* has 20 rows",
        ),
        ({"arrays": ["obs"], "function": "numpy:zeros"}, r"the arrays come from a file or from a function; set one"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """The message names the array, the row and the value."""
    gap = np.ones(20)
    gap[4] = np.nan
    given = {"obs": np.ones((20, 2)), "gap": gap, "half": np.arange(20) / 2, "flag": gap > 0, "short": np.ones(3)}
    with pytest.raises((ConfigError, ValueError), match=problem):
        build(**written(tmp_path, **given), **options)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.npz", b"no archive", r"a.npz is not a .npz file; write it with numpy.savez"),
        ("a.safetensors", b"no tensors", r"a.safetensors is not safetensors"),
        ("a.parquet", b"no table", r"a.parquet is not a Parquet file"),
        ("a.csv", b"1,2", r"file must end in .npz, .safetensors, .parquet"),
    ],
)
def test_files_of_another_kind_are_refused(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    """Whatever they are called."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigError, ValueError), match=problem):
        build(file=str(tmp_path / name))


def test_python_objects_empty_cells_and_texts_are_refused(tmp_path: Path) -> None:
    """Objects could run code; an empty cell has no value; a text cannot be a condition."""
    np.savez(tmp_path / "a.npz", obs=np.array([{}, []], dtype=object))
    with pytest.raises((ConfigError, ValueError), match="holds Python objects, which could run code"):
        build(file=str(tmp_path / "a.npz"))
    pq.write_table(pa.table({"obs": [1.0, None, 2.0]}), tmp_path / "a.parquet")
    with pytest.raises((ConfigError, ValueError), match=re.escape("row 1 of") + ".* is empty in column 'obs'"):
        build(file=str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": ["a", "b"] * 10}), tmp_path / "b.parquet")
    assert "text" not in build(file=str(tmp_path / "b.parquet")).layout


def test_a_function_that_fails_shows_its_own_line(tmp_path: Path) -> None:
    """As do functions that return something else."""
    code = "def fails(size):\n    return [0][size]\ndef number():\n    return 3\n"
    (tmp_path / "functions_of_a_test.py").write_text(code, encoding="utf-8")
    options = {"path": str(tmp_path)}
    with pytest.raises((ConfigError, ValueError), match=r"functions_of_a_test.py, line 2, in fails: IndexError"):
        build(function="functions_of_a_test:fails", kwargs={"size": 5}, **options)
    with pytest.raises((ConfigError, ValueError), match="must return a dictionary of arrays by name, got int"):
        build(function="functions_of_a_test:number", **options)


def test_arrays_that_other_options_name_are_read_without_being_listed(tmp_path: Path) -> None:
    """``arrays`` lists what the network takes; the rest of the file is left alone."""
    rows = np.arange(10.0)
    np.savez(tmp_path / "all.npz", obs=rows, real=rows + 1, counts=rows * 0 + 1, kind=np.arange(10) % 3, rest=rows)
    dataset = Tensors(
        file=str(tmp_path / "all.npz"), arrays=("obs",), samples="real", mask="counts", labels="kind", split="kind"
    )
    assert {"obs", "real", "counts", "kind"} <= set(dataset.layout)
    assert "rest" not in dataset.layout
    np.testing.assert_array_equal(dataset.real_samples([0, 1]), [1, 2])
