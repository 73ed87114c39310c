"""What people look at or listen to, shard by shard: how samples get from the hosts that make them to scorers.

A media shard is a safetensors file that is written whole, and deleted once everything in it has been measured.
"""

from __future__ import annotations

import json
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
    """Samples of one shard in the form that metrics see.

    Attributes:
        samples: Of the finite samples alone, in order of index: (F, C, H, W) images or (F, N) waves, float32.
        finite: Which samples of the shard these are, (B,), bool.
        media: 'images' or 'sound'.
        rate: Of sound: samples a second.
    """

    samples: Tensor
    finite: npt.NDArray[np.bool_]
    media: Media
    rate: int | None = None

    def write(self, storage: Storage, key: str) -> None:
        """Publish it under ``key``, whole."""
        facts = json.dumps({"media": self.media, "rate": self.rate})
        tensors = {"samples": self.samples.float().cpu().contiguous(), "finite": torch.from_numpy(self.finite)}
        storage.write(key, save(tensors, {"bespoke_media": facts}))

    @classmethod
    def read(cls, storage: Storage, key: str) -> MediaShard:
        """The inverse of :meth:`write`.

        Raises:
            StoreError: There is no such shard, or it is damaged.
        """
        try:
            data = storage.read(key)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            facts = json.loads(header["__metadata__"]["bespoke_media"])
            tensors = load(data)
            return cls(tensors["samples"], tensors["finite"].numpy(), facts["media"], facts["rate"])
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(
                f"samples {storage.location(key)} cannot be read: {error}; run the same command again"
            ) from error
