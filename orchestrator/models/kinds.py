"""Kinds of samples: what a person looks at. A kind decides figures and players, never numbers."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

Kind = Literal["image", "sound", "vectors", "series", "trajectory", "points", "video"]
"""Kind of a model's samples.

'image': (C, H, W) or (H, W). 'sound': whatever a model of sound samples, such as mel frames or latents. 'vectors': any
shape, each sample a point in space. 'series': (T, D) or (C, T), the longer axis is time, or (T,). 'trajectory': a
series of positions, (T, D), or (D, T) with 2 or 3 coordinates. 'points': a set of N points, (N, D) or (D, N). 'video':
(C, T, H, W) or (T, H, W).
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

AXES: dict[Kind, tuple[int, ...]] = {
    "image": (2, 3),
    "series": (1, 2),
    "trajectory": (2,),
    "points": (2,),
    "video": (3, 4),
}
"""Numbers of axes that a sample of each kind may have; other kinds take any."""


def guess_kind(shape: tuple[int, ...], rate: int | None = None, *, decoded: bool = False) -> Kind:
    """The kind of samples that nobody declared.

    Args:
        shape: Shape of one sample, before decoding.
        rate: Sample rate of decoded sound in Hz; None if the model does not make sound.
        decoded: Whether a decoder turns samples into something else: images, unless there is a rate.
    """
    if rate is not None:
        return "sound"
    if decoded or len(shape) == 3:
        return "image"
    return {2: "series", 4: "video"}.get(len(shape), "vectors")  # type: ignore[return-value]


def check_kind(kind: Any, shape: tuple[int, ...], *, decoded: bool) -> None:
    """Refuse a kind that does not exist, or that samples of this shape cannot be.

    Args:
        kind: The declared kind; None: it is guessed.
        shape: Shape of one sample, before decoding.
        decoded: Whether a decoder turns samples into something else, whose shape is not known here.

    Raises:
        ValueError: The message names the kind and those that fit.
    """
    if kind is None:
        return
    fitting = [name for name in KINDS if decoded or len(shape) in AXES.get(name, (len(shape),))]
    if not decoded:
        fitting.remove("sound")  # a network alone makes no sound
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}; without it, the shape decides")
    if kind not in fitting:
        why = "has no decoder" if kind == "sound" else f"has samples of shape {shape}"
        raise ValueError(f"kind {kind!r} does not fit a model that {why}; choose one of {', '.join(fitting)}")


def range_of_data(data_range: Any, data_min: Any, data_max: Any) -> float:
    """Largest minus smallest value of the data: declared, or from both ends; 2 by default.

    Raises:
        ValueError: A number is invalid, one end is missing, or the three contradict each other.
    """
    if (data_min is None) != (data_max is None):
        raise ValueError(f"data_min and data_max belong together, got {data_min!r} and {data_max!r}; give both")
    for option, end in (("data_min", data_min), ("data_max", data_max)):
        if end is not None and not _is_number(end):
            raise ValueError(f"{option} must be a number, got {end!r}")
    if data_range is not None and not (_is_number(data_range) and data_range > 0):
        raise ValueError(f"data_range must be a positive number, got {data_range!r}")
    if data_min is None:
        return 2.0 if data_range is None else data_range
    if not data_max > data_min:
        raise ValueError(f"data_max must be above data_min, got {data_max!r} and {data_min!r}")
    if data_range is not None and not math.isclose(data_range, data_max - data_min, rel_tol=1e-6):
        raise ValueError(
            f"data_range={data_range:g} contradicts data_min={data_min:g} and data_max={data_max:g}, which are "
            f"{data_max - data_min:g} apart; leave data_range out"
        )
    return float(data_max - data_min) if data_range is None else data_range


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
