"""The prediction among the outputs of a network: a part of a tuple, a dictionary or an object; the first channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor


def prediction_in(output: Any, name: str | int | None, channels: int | None, count: int) -> Any:
    """The prediction in what a network returned.

    Args:
        output: What it returned.
        name: Position in a tuple or list, key of a dictionary, or attribute; None for the output itself.
        channels: Number of channels that the network returns; None if all are the prediction.
        count: Number of channels of a sample.

    Raises:
        ValueError: There is no such part, or it has another number of channels.
    """
    if name is not None:
        try:
            output = output[name] if isinstance(name, int) or isinstance(output, Mapping) else getattr(output, name)
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"output={name!r} is not in what the network returned, {shown(output)}") from error
    if channels is not None:
        if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[1] != channels:
            raise ValueError(f"output_channels is {channels}, but the network returned {shown(output)}")
        output = output[:, :count]
    return output


def remedy(output: Any, shape: Size) -> str:
    """What to do about an output that is not one tensor of this shape, as options if they suffice."""
    for name, value in _parts(output):
        if isinstance(value, Tensor) and value.shape == shape:
            return f"set the option 'output: {name}', the part of that shape"
    doubled = len(shape) > 1 and isinstance(output, Tensor) and output.shape == (shape[0], 2 * shape[1], *shape[2:])
    if doubled and isinstance(output, Tensor):
        return (
            f"if its first {shape[1]} channels are the prediction, as with a learned variance, set the option "
            f"'output_channels: {output.shape[1]}'"
        )
    return "wrap it so that it returns only its prediction"


def shown(output: Any) -> str:
    """An output for error messages: its type, and the shapes of its parts."""
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    parts = [f"{name}: {shown(value)}" for name, value in _parts(output) if isinstance(value, Tensor)]
    return type(output).__name__ + (f" ({', '.join(parts)})" if parts else "")


def _parts(output: Any) -> list[tuple[str | int, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    return list(vars(output).items()) if hasattr(output, "__dict__") and not isinstance(output, Tensor) else []
