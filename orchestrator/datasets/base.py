"""Interface of datasets: conditioning for pair i and, optionally, a reference set of real samples.

Some metrics need further methods, which a dataset implements if it can:

- ``texts(conditions)``: the prompt of each sample, list of str;
- ``transcripts(conditions)``: the words each sample must say, list of str;
- ``spoken(conditions)``: start and end, in seconds, of the part of each sample to be spoken, list of pairs;
- ``voices(conditions)``: for each sample, a wave of the voice to speak in and its sample rate in Hz.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from orchestrator.content import digest
from orchestrator.randomness import generator

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.pairs.conditions import Conditions

IntArray = npt.NDArray[np.int64]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def uniform(seed: int, indices: Sequence[int], count: int) -> IntArray:
    """One of 0..count-1 for each index, (len(indices),); a draw depends only on (seed, index)."""
    return np.array([generator(seed, i, "condition").integers(count) for i in indices], dtype=np.int64)


class LabelledSamples(NamedTuple):
    """Real samples, float32 (N, ...), and their labels, int64 (N,)."""

    samples: npt.NDArray[np.float32]
    labels: IntArray


class Layout(NamedTuple):
    """Type and shape of one row of a named array: bool, int64, float32 or float64."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Dataset(ABC):
    """Base class of conditioning sources. The dataclass fields of a subclass are its options.

    Attributes:
        named: Whether conditions are numbers of rows of named arrays (:attr:`layout`), which are looked up whenever
            pairs are made or loaded. Pairs then store the numbers.
        real_form: Form of real samples: 'images' (C, H, W) in [-1, 1]; 'sound', waves (N,) in [-1, 1]; 'samples' of any
            shape, as the model makes them, in its data range.
    """

    named: ClassVar[bool] = False
    real_form: ClassVar[Literal["images", "sound", "samples"]] = "images"

    @abstractmethod
    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        """The conditioning of these pairs, shape (len(indices), ...); it depends only on (seed, index)."""

    def check(self) -> None:
        """Refuse conditioning that cannot be used, before any work starts; this default draws one condition.

        Raises:
            ValueError: A condition is missing or out of range; names the file, the row and the value.
        """
        self.conditions(0, [0])

    def label_count(self) -> int | None:
        """Number of classes of the labels: the largest label plus 1; None if unknown, or if conditions are texts."""
        return None

    def check_labels(self, classes: int, model: str) -> None:
        """Refuse labels that a model does not have, before any work starts.

        Args:
            classes: Number of the model's classes.
            model: The model, for error messages.

        Raises:
            ValueError: Conditions are texts, or a label is not below ``classes``.
        """
        if hasattr(self, "texts") or hasattr(self, "transcripts"):
            raise ValueError(
                f"{model} is conditioned on class labels, which {type(self).__name__} does not provide; choose another "
                f"dataset, such as 'labels'"
            )
        count = self.label_count()
        if count is not None and count > classes:
            raise ValueError(self.label_problem(count, classes, model))

    def label_problem(self, count: int, classes: int, model: str) -> str:
        """The error for labels of ``count`` classes and a model with fewer."""
        return f"conditioning draws from {count} classes, but {model} has {classes}; choose a dataset with as many"

    def check_real(self) -> None:  # noqa: B027 (optional: real samples may ship with the package)
        """Refuse real samples that cannot be read, before any work starts: by their headers and ends, which is fast.

        Raises:
            ValueError: A sample is missing or damaged, or of another size than the others; names it.
        """

    def split_options(self, split: Split) -> dict[str, Any]:
        """Options by which the dataset draws from rows of one split only; empty if it has no splits."""
        return {}

    @property
    def layout(self) -> Mapping[str, Layout]:
        """Type and shape of a row of each named array; those of the labels, if there are any, under ``y``."""
        return {}

    def tensors(self, rows: IntArray, names: Iterable[str]) -> Conditions:
        """Named arrays of these rows, for a dataset that is :attr:`named`."""
        raise NotImplementedError(f"{type(self).__name__} has no named arrays")

    def mask_of(self, rows: IntArray, shape: tuple[int, ...]) -> Tensor | None:
        """Which entries of samples of this shape count in losses and metrics, bool, (len(rows), ...); None: all.

        Raises:
            ValueError: The dataset's mask does not fit samples of this shape.
        """
        return None

    def labels_of(self, conditions: IntArray) -> IntArray:
        """Class labels of these conditions: by default the conditions themselves."""
        return conditions

    @abstractmethod
    def conditioned_on(self) -> Iterable[Any]:
        """Everything that conditions, and the texts, spans and voices of conditions, depend on.

        Parts are those of :func:`orchestrator.content.digest`. Content counts, and not the place of a file.
        """

    @property
    def content(self) -> str:
        """sha256 of :meth:`conditioned_on`; part of the digest of pairs."""
        return digest(type(self).__name__, *self.conditioned_on())

    def real_parts(self) -> Iterable[Any]:
        """Everything that real samples depend on, as in :meth:`conditioned_on`. Override it with :meth:`real_samples`.

        Raises:
            ValueError: The dataset has no real samples.
        """
        reference = self.reference()
        if reference is None:
            raise ValueError(f"{type(self).__name__} has no real samples")
        return reference

    @property
    def real_content(self) -> str:
        """sha256 of :meth:`real_parts`; measurements of real samples are stored under it."""
        return digest(type(self).__name__, *self.real_parts())

    def reference(self) -> LabelledSamples | None:
        """The real samples of this dataset, or None if it has none."""
        return None

    def real_count(self) -> int:
        """Number of real samples to compare with; 0 if there are none."""
        reference = self.reference()
        return 0 if reference is None else len(reference.samples)

    def real_samples(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """These real samples, (len(indices), ...), in the :attr:`real_form`; override it if they exceed the memory."""
        reference = self.reference()
        if reference is None:
            raise ValueError(f"{type(self).__name__} has no real samples")
        return reference.samples[list(indices)]
