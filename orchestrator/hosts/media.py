"""Media shards: what hosts decode from samples, images or sound, or raw samples, left in the storage for scorers.

A media shard is a safetensors file. It is written atomically, and deleted once all of it has been measured.
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
    """The decoded samples of one shard.

    Attributes:
        samples: The F finite samples, in order of index: images (F, C, H, W), waves (F, N), or as sampled, float32.
        finite: Mask of the finite samples among all samples of the shard, (B,), bool.
        media: 'images', 'sound' or 'samples', for models that make neither.
        rate: Sample rate in Hz for sound, else None.
    """

    samples: Tensor
    finite: npt.NDArray[np.bool_]
    media: Media
    rate: int | None = None

    def write(self, storage: Storage, key: str) -> None:
        """Write the shard to ``key``, atomically."""
        facts = json.dumps({"media": self.media, "rate": self.rate})
        tensors = {"samples": self.samples.float().cpu().contiguous(), "finite": torch.from_numpy(self.finite)}
        storage.write(key, save(tensors, {"bespoke_media": facts}))

    @classmethod
    def read(cls, storage: Storage, key: str) -> MediaShard:
        """Read a shard that :meth:`write` wrote.

        Raises:
            StoreError: The shard does not exist or is damaged.
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
