"""A folder of images, with one subfolder per class if there are classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.datasets._images import ImageSet
from orchestrator.datasets.base import IntArray, uniform
from orchestrator.files import data_files, data_folders
from orchestrator.plugins import PATH

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageFolder(ImageSet):
    """Images in a folder (png, jpg, webp, bmp), read on demand; each subfolder is a class.

    Hidden files and folders, and those that systems leave behind (``__MACOSX``, ``Thumbs.db``), are ignored.

    The conditioning is the class of an image drawn uniformly, or 0 without classes.

    Attributes:
        folder: Folder of the images.

    Raises:
        ValueError: The folder does not exist, or holds no images.
    """

    folder: str = field(metadata=PATH)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not Path(self.folder).is_dir():
            raise ValueError(f"no folder {self.folder}; set folder to one that holds images")
        if not self.files:
            raise ValueError(f"no images in {self.folder}: no file ends in {', '.join(SUFFIXES)}")

    @cached_property
    def files(self) -> list[Path]:
        """Paths of all images, sorted by name."""
        return data_files(Path(self.folder), SUFFIXES)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their label numbers: sorted as text."""
        return sorted({self._place(path)[0] for path in self.files if len(self._place(path)) > 1})

    def _place(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.folder).parts

    def check(self) -> None:
        if not self.classes:
            return
        beside = [path for path in self.files if path.parent == Path(self.folder)]
        if beside:
            raise ValueError(
                f"{beside[0]} lies beside the folders of the classes {', '.join(self.classes)}, so it has no class; "
                f"move it into one of them"
            )
        for folder in data_folders(Path(self.folder)):
            if folder.name not in self.classes:
                raise ValueError(f"{folder} is a class without images; add some, or move the folder elsewhere")

    def label_count(self) -> int:
        return max(1, len(self.classes))

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        return self._labels[uniform(seed, indices, len(self.files))]

    @cached_property
    def _labels(self) -> IntArray:
        """The class of each image."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([numbers.get(self._place(path)[0], 0) for path in self.files], dtype=np.int64)

    def conditioned_on(self) -> Iterable[IntArray]:
        return (self._labels,)

    def real_parts(self) -> Iterable[Any]:
        return self.prepared(*self.files)

    def real_count(self) -> int:
        return len(self.files)

    def check_real(self) -> None:
        self.check_images(self.files, list(map(str, self.files)))

    def real_samples(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        chosen = [self.files[i] for i in indices]
        return self.decoded(chosen, list(map(str, chosen)))


DATASET = ImageFolder
