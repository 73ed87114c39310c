"""Reads theta artifacts in safetensors form: float64 tensors times, a and b; provenance in the header's metadata."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from solvers.ns import MAX_NFE, InvalidThetaError

METADATA_KEY = "bespoke_theta"
"""Metadata key in the header; its value is the theta artifact's JSON object without times, a and b."""

TENSORS = ("times", "a", "b")

MAX_BYTES = 8 * (MAX_NFE + (MAX_NFE + 1) ** 2) + 2**20
"""Size limit for a theta file (the largest solver plus 1 MiB for the header); larger files are rejected unopened."""


def read_json(source: Path) -> str:
    """Return the JSON text of the theta artifact in a safetensors file; needs the package safetensors.

    The caller validates the JSON, so that both file formats obey the same rules.

    Raises:
        FileNotFoundError: The file does not exist.
        InvalidThetaError: The file is not a theta artifact in safetensors form.
    """
    from safetensors import SafetensorError, safe_open

    def invalid(problem: str) -> InvalidThetaError:
        return InvalidThetaError(f"{source} is not a usable theta artifact: {problem}")

    try:
        if not source.is_file():
            raise FileNotFoundError(f"no theta artifact at {source}")
        size = source.stat().st_size
    except FileNotFoundError:
        raise
    except OSError as error:
        raise invalid(f"it cannot be read ({error})") from error
    if size > MAX_BYTES:
        raise invalid(f"it has {size:,} bytes, but the largest theta has {MAX_BYTES:,}")
    try:
        with safe_open(source, framework="pt") as file:
            content = _provenance(file, invalid)
            _check_shapes(file, content.get("nfe"), invalid)
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except SafetensorError as error:
        raise invalid(f"it is not safetensors ({error})") from error
    except OSError as error:
        raise invalid(f"it cannot be read ({error})") from error
    b = tensors["b"]
    # NaN != 0 is true, so NaN on or above the diagonal is rejected too.
    if bool((b.triu() != 0).any()):
        raise invalid("'b' must be strictly lower triangular: a state may use only the velocities before it")
    numbers = {
        "times": tensors["times"].tolist(),
        "a": tensors["a"].tolist(),
        "b": [row[:k] for k, row in enumerate(b.tolist())],
    }
    try:
        return json.dumps(content | numbers)
    except RecursionError:
        raise invalid(f"its {METADATA_KEY!r} is nested too deeply") from None


def _provenance(file: Any, invalid: Any) -> dict[str, Any]:
    text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        raise invalid(f"its metadata has no {METADATA_KEY!r}; make one with `bespoke export`")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"its {METADATA_KEY!r} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise invalid(f"its {METADATA_KEY!r} is not a JSON object")
    return content


def _check_shapes(file: Any, nfe: Any, invalid: Any) -> None:
    """Check the names, shapes and dtypes that the header declares, before any tensor is read."""
    if not isinstance(nfe, int) or isinstance(nfe, bool) or not 1 <= nfe <= MAX_NFE:
        raise invalid(f"'nfe' must be an integer from 1 to {MAX_NFE}, got {reprlib.repr(nfe)}")
    names = sorted(file.keys())
    if names != sorted(TENSORS):
        raise invalid(f"its tensors must be {', '.join(TENSORS)}, got {', '.join(names[:8]) or 'none'}")
    for name, shape in zip(TENSORS, ([nfe], [nfe + 1], [nfe + 1, nfe]), strict=True):
        declared = file.get_slice(name)
        if declared.get_shape() != shape or declared.get_dtype() != "F64":
            raise invalid(
                f"{name!r} must be float64 of shape {tuple(shape)} for nfe {nfe}, got {declared.get_dtype()} of shape "
                f"{tuple(declared.get_shape())}"
            )
