"""Captions and images of MS-COCO (Lin et al. 2015), or of a dataset in the same format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.datasets._images import ImageSet, inside
from orchestrator.datasets.base import IntArray, uniform
from orchestrator.files import read_text
from orchestrator.plugins import PATH


@dataclass(frozen=True)
class CocoCaptions(ImageSet):
    """Image captions drawn uniformly from a COCO annotation file; a condition is the number of a caption.

    Attributes:
        annotations: The JSON file, e.g. ``captions_val2014.json``.
        images: Folder of the images; needed only by metrics that compare with real images.

    Raises:
        ValueError: The file or the folder does not exist, or the file holds no captions.
    """

    annotations: str = field(metadata=PATH)
    images: str | None = field(default=None, metadata=PATH)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and not Path(self.images).is_dir():
            raise ValueError(f"no folder {self.images}; set images to the folder with the images of {self.annotations}")
        if not self.captions:
            raise ValueError(f"{self.annotations} holds no captions")

    @cached_property
    def _content(self) -> dict[str, list[dict[str, Any]]]:
        path = Path(self.annotations)
        if not path.is_file():
            raise ValueError(f"no annotation file {path}; set annotations to a file such as captions_val2014.json")
        try:
            content = json.loads(read_text(path))
            for key, name in (("annotations", "caption"), ("images", "file_name")):
                _ = [entry[name] for entry in content[key]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a caption file in COCO's format, which has 'images' with a 'file_name' and "
                f"'annotations' with a 'caption': {type(error).__name__} {error}"
            ) from error
        for key, name in (("annotations", "caption"), ("images", "file_name")):
            for number, entry in enumerate(content[key]):
                if not isinstance(entry[name], str):
                    raise ValueError(
                        f"entry {number} of {key!r} in {path} has no text as {name!r}, got {entry[name]!r}; correct or "
                        f"remove it"
                    )
        return content

    @cached_property
    def captions(self) -> list[str]:
        """All captions, in the order of the file."""
        return [entry["caption"].strip() for entry in self._content["annotations"]]

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        return uniform(seed, indices, len(self.captions))

    def conditioned_on(self) -> Iterable[str]:
        return self.captions

    def real_parts(self) -> Iterable[Any]:
        return self.prepared(*self._paths(range(self.real_count()))[0])

    def texts(self, conditions: Sequence[int]) -> list[str]:
        """The captions with these numbers."""
        return [self.captions[number] for number in conditions]

    def real_count(self) -> int:
        return 0 if self.images is None else len(self._content["images"])

    def real_samples(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """These images, (len(indices), C, H, W) in [-1, 1].

        Raises:
            ValueError: No image folder is set, or an image is missing, unreadable or of another size.
        """
        return self.decoded(*self._paths(indices))

    def check_real(self) -> None:
        self.check_images(*self._paths(range(self.real_count())))

    def _paths(self, indices: Sequence[int]) -> tuple[list[Path], list[str]]:
        """Paths of these images, and their names in the file."""
        if self.images is None:
            raise ValueError("this dataset has no real images; set the option 'images' to their folder")
        names = [self._content["images"][i]["file_name"] for i in indices]
        return [inside(Path(self.images), name) for name in names], names


DATASET = CocoCaptions
