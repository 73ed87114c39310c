"""What conditions the pairs of a model, as a notebook gives it: arrays, prompts, a dataset, or its description."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from orchestrator import plugins
from orchestrator.content import digest
from orchestrator.datasets.base import Dataset
from orchestrator.datasets.tensors import LABELS
from orchestrator.errors import UserError
from orchestrator.storage import Storage, local_root


@dataclass(frozen=True)
class Conditioning:
    """A source of conditions: a dataset, arrays of this process, or neither, which leaves it to the adapter.

    Attributes:
        described: Name and options of a dataset.
        arrays: Arrays with one row per condition, by name. They are written to the storage before they are used.
    """

    described: dict[str, Any] | None = None
    arrays: dict[str, npt.NDArray[Any]] | None = None

    @classmethod
    def of(cls, given: Any) -> Conditioning:
        """From what :class:`orchestrator.Model` takes as ``conditions``.

        Raises:
            UserError: It is nothing of that.
        """
        if given is None:
            return cls()
        if isinstance(given, Dataset):
            return cls(described=plugins.describe("datasets", given))
        if isinstance(given, Mapping) and isinstance(given.get("name"), str) and set(given) <= {"name", "options"}:
            return cls(described={"name": given["name"], "options": dict(given.get("options") or {})})
        if isinstance(given, Mapping) and given:
            return cls(arrays={str(name): _array(str(name), value) for name, value in given.items()})
        if isinstance(given, Sequence) and not isinstance(given, str) and given and _all_texts(given):
            return cls(described={"name": "prompts", "options": {"prompts": list(given)}})
        raise UserError(
            f"conditions must be a mapping of arrays with one row per condition, a list of prompts, a dataset, or "
            f"{{'name': ..., 'options': ...}} of one, got {given if isinstance(given, str) else type(given).__name__}"
        )

    def call(self, classes: int | None) -> str:
        """How a network is called by default: with the label or the only array third, or with several by name."""
        names = [name for name in self.arrays or {} if name != LABELS]
        positional = ["x", "t", *(["y"] if classes is not None else [])]
        if len(names) == 1 and classes is None:
            return ", ".join([*positional, f"c.{names[0]}"])
        return ", ".join([*positional, *(f"{name}=c.{name}" for name in names)])

    def dataset(self, storage: str) -> dict[str, Any] | None:
        """Name and options of the dataset; None for the adapter's default. Arrays are written to the storage.

        Raises:
            UserError: The arrays cannot be written there.
        """
        if self.arrays is None:
            return self.described
        if local_root(storage) is None:
            raise UserError(
                f"conditions that are arrays of this process are kept in a folder, but the storage is {storage}; "
                f"save them as .npz and give {{'name': 'tensors', 'options': {{'file': ...}}}}"
            )
        place = Storage.at(storage)
        key = f"conditions/{digest(*(part for item in sorted(self.arrays.items()) for part in item))[:16]}.npz"
        if not place.exists(key):
            data = io.BytesIO()
            np.savez(data, **self.arrays)  # type: ignore[arg-type]  # names are keywords
            place.write(key, data.getvalue())
        labels = {"labels": LABELS} if LABELS in self.arrays else {}
        return {"name": "tensors", "options": {"file": place.location(key), **labels}}


def _all_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _array(name: str, value: Any) -> npt.NDArray[Any]:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind not in "biuf" or not array.ndim:
        raise UserError(
            f"conditions: {name!r} must be an array of numbers with one row per condition, got {array.dtype} of shape "
            f"{array.shape}"
        )
    return array
