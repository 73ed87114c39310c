"""Media shards: what hosts decode from samples, images or sound, or raw samples, left in the storage for scorers.

A media shard is a safetensors file. It is written atomically, and deleted once all of it has been measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save
from torch import Tensor

from orchestrator.errors import StoreError
from orchestrator.metrics.base import Media
from orchestrator.storage import Storage


@dataclass(frozen=True)
class MediaShard:
    """The samples of one shard, in the forms that metrics need.

    Attributes:
        forms: The F finite samples in order of index, float32: 'images' (F, C, H, W), 'sound', waves (F, N), or
            'samples', as solved.
        finite: Mask of the finite samples among all samples of the shard, (B,), bool.
        rate: Sample rate in Hz of sound, else None.
    """

    forms: Mapping[Media, Tensor]
    finite: npt.NDArray[np.bool_]
    rate: int | None = None

    def write(self, storage: Storage, key: str) -> None:
        """Write the shard to ``key``, atomically."""
        tensors: dict[str, Tensor] = {form: samples.float().contiguous() for form, samples in self.forms.items()}
        tensors["finite"] = torch.from_numpy(self.finite)
        storage.write(key, save(tensors, {"rate": json.dumps(self.rate)}))

    @classmethod
    def read(cls, storage: Storage, key: str) -> MediaShard:
        """Read a shard that :meth:`write` wrote.

        Raises:
            StoreError: The shard does not exist or is damaged.
        """
        try:
            data = storage.read(key)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            tensors = load(data)
            finite = tensors.pop("finite").numpy()
            return cls(tensors, finite, json.loads(header["__metadata__"]["rate"]))  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(
                f"samples {storage.location(key)} cannot be read: {error}; run the same command again"
            ) from error
