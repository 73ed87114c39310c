"""Captions of MS-COCO (Lin et al. 2015) and of data sets in its format, with their images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.datasets._images import check_side, decoded, inside, stacked
from orchestrator.datasets.base import Dataset
from orchestrator.randomness import generator


@dataclass(frozen=True)
class CocoCaptions(Dataset):
    """Captions drawn uniformly from an annotation file; a condition is a caption's number.

    Attributes:
        annotations: The JSON file, e.g. ``captions_val2014.json``.
        images: The folder of its images: what distances to real images need.
        side: Every image is cut to its centre square and resized to this; None: as they are, all of one size.
        grayscale: One channel (ITU-R 601 luma) instead of three.

    Raises:
        ValueError: No such file or folder, or no captions in it.
    """

    annotations: str
    images: str | None = None
    side: int | None = None
    grayscale: bool = False

    def __post_init__(self) -> None:
        check_side(self.side)
        if self.images is not None and not Path(self.images).is_dir():
            raise ValueError(f"no folder {self.images}; give the one that holds the images of {self.annotations}")
        if not self.captions:
            raise ValueError(f"{self.annotations} holds no captions")

    @cached_property
    def _content(self) -> dict[str, list[dict[str, Any]]]:
        path = Path(self.annotations)
        if not path.is_file():
            raise ValueError(f"no annotation file {path}; give one such as captions_val2014.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for key, name in (("annotations", "caption"), ("images", "file_name")):
                _ = [entry[name] for entry in content[key]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no file of captions in COCO's format, which has 'images' with a 'file_name' and "
                f"'annotations' with a 'caption': {type(error).__name__} {error}"
            ) from error
        return content

    @cached_property
    def captions(self) -> list[str]:
        """All captions, in order."""
        return [str(entry["caption"]).strip() for entry in self._content["annotations"]]

    def conditions(self, seed: int, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        drawn = [generator(seed, i, "condition").integers(len(self.captions)) for i in indices]
        return np.array(drawn, dtype=np.int64)

    def texts(self, conditions: Sequence[int]) -> list[str]:
        """The captions of these numbers."""
        return [self.captions[number] for number in conditions]

    def real_count(self) -> int:
        return 0 if self.images is None else len(self._content["images"])

    def real_samples(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """These images, (len(indices), C, H, W) in [-1, 1].

        Raises:
            ValueError: No folder was given; an image that is not in it, cannot be read, or is of another size.
        """
        if self.images is None:
            raise ValueError("there are no real images; set the option 'images' to their folder")
        names = [str(self._content["images"][i]["file_name"]) for i in indices]
        paths = [inside(Path(self.images), name) for name in names]
        return stacked([decoded(path, str(path), self.side, self.grayscale) for path in paths], names)


DATASET = CocoCaptions
