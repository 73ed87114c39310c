"""Content of theta files: which fields and tensors they have, and the checks of what they hold."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solvers.network_schedule import NetworkSchedule
from solvers.ns import MAX_NFE, InvalidThetaError, NSSolver

THETA_FORMAT = "bespoke-theta"
THETA_VERSION = 1
"""Raised when a file of the new format means something else to a reader of the old one."""

METADATA_KEY = "bespoke_theta"
"""Metadata key of a safetensors file; its value is the artifact's JSON object without the tensors."""

TENSORS = ("times", "a", "b")
UPPER_TENSORS = ("upper_times", "upper_a", "upper_b")
SCHEDULE = "schedule"
RANGE = "guidance_range"
BY_SCALE = "validation_psnr_db_by_scale"

MAX_NUMBER = 1e6
"""Limit on the size of every number in a theta artifact, above any coefficient of a usable solver."""

Refuse = Callable[[str], InvalidThetaError]
"""Makes the error for a problem of one artifact."""


def parsed(text: str, name: str, invalid: Refuse) -> dict[str, Any]:
    """The JSON object in ``text``; other JSON gives an empty one, which has no format."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # a plain ValueError for an integer of thousands of digits
        raise invalid(f"{name} is not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def check_header(content: dict[str, Any], invalid: Refuse) -> None:
    """Check format and version first: what another version means by the other fields is not known."""
    if content.get("format") != THETA_FORMAT:
        raise invalid(f"its 'format' is not {THETA_FORMAT!r}")
    version = content.get("version")
    if version != THETA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > THETA_VERSION
        remedy = "; a newer release wrote it: update this one" if newer else ""
        raise invalid(f"version {_brief(version)} is unknown; this release reads version {THETA_VERSION}{remedy}")
    of_range = {BY_SCALE, *UPPER_TENSORS} if RANGE in content else set()
    known = {"format", "version", "nfe", SCHEDULE, RANGE, *TENSORS, *_PROVENANCE_TYPES, *of_range}
    unknown = sorted(content.keys() - known)
    if unknown:
        raise invalid(
            f"it has fields that this release does not know ({', '.join(map(_brief, unknown[:4]))}) and that may "
            f"change its samples; read it with the release that wrote it, or remove them"
        )
    nfe = content.get("nfe")
    if not isinstance(nfe, int) or isinstance(nfe, bool) or not 1 <= nfe <= MAX_NFE:
        raise invalid(f"'nfe' must be an integer from 1 to {MAX_NFE}, got {_brief(nfe)}")


def safetensors_content(source: Path, invalid: Refuse) -> dict[str, Any]:
    """The artifact's JSON object in a safetensors file, with its header checked; needs the package safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            if text is None:
                raise invalid(f"its metadata has no {METADATA_KEY!r}; make one with `bespoke export`")
            content = parsed(text, f"its {METADATA_KEY!r}", invalid)
            check_header(content, invalid)
            expected = TENSORS + (UPPER_TENSORS if RANGE in content else ())
            _check_shapes(file, expected, content["nfe"], invalid)
            tensors = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise invalid(f"it is not safetensors ({error})") from error
    for name, tensor in tensors.items():
        # NaN != 0 is true, so NaN on or above the diagonal is rejected too.
        if tensor.ndim == 2 and bool((tensor.triu() != 0).any()):
            raise invalid(f"{name!r} must be strictly lower triangular: a state may use only the velocities before it")
    return content | {name: values_of(tensor) for name, tensor in tensors.items()}


def _check_shapes(file: Any, expected: tuple[str, ...], nfe: int, invalid: Refuse) -> None:
    """Check the names, shapes and dtypes that the header declares, before any tensor is read."""
    names = sorted(file.keys())
    if names != sorted(expected):
        raise invalid(f"its tensors must be {', '.join(expected)}, got {', '.join(names[:8]) or 'none'}")
    for name, shape in zip(expected, ([nfe], [nfe + 1], [nfe + 1, nfe]) * 2, strict=False):
        declared = file.get_slice(name)
        if declared.get_shape() != shape or declared.get_dtype() != "F64":
            raise invalid(
                f"{name!r} must be float64 of shape {tuple(shape)} for nfe {nfe}, got {declared.get_dtype()} of shape "
                f"{tuple(declared.get_shape())}"
            )


def json_value(key: str, value: Any) -> str:
    """JSON of one value: a single line, except b with one line per row."""
    if key in ("b", "upper_b"):
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value)


def values_of(tensor: Tensor) -> list[Any]:
    """A tensor of theta as in JSON: of b, only the entries below the diagonal."""
    values: list[Any] = tensor.tolist()
    return [row[:k] for k, row in enumerate(values)] if tensor.ndim == 2 else values


def solver_of(content: dict[str, Any], names: tuple[str, ...], invalid: Refuse) -> NSSolver:
    """The solver in the fields of these names, its times, a and b."""
    nfe, (name_times, name_a, name_b) = content["nfe"], names
    times = _numbers(content.get(name_times), nfe, name_times, invalid)
    a = _numbers(content.get(name_a), nfe + 1, name_a, invalid)
    rows = content.get(name_b)
    if not isinstance(rows, list) or len(rows) != nfe + 1:
        raise invalid(f"{name_b!r} must have {nfe + 1} rows")
    b = torch.zeros(nfe + 1, nfe, dtype=torch.float64)
    for k, row in enumerate(rows):
        b[k, :k] = _numbers(row, k, f"{name_b}[{k}]", invalid)
    outside = [t for t in times.tolist() if not 0 <= t <= 1]
    if outside:
        raise invalid(f"{name_times!r} must lie in [0, 1], got {outside[0]:g}")
    return NSSolver(times, a, b)


def guidance_of(content: dict[str, Any], invalid: Refuse) -> dict[str, Any]:
    """The range of guidance scales and the validation PSNRs in it; empty for a theta of one scale."""
    if RANGE not in content:
        return {}
    if "guidance_scale" in content:
        raise invalid(f"it has both 'guidance_scale' and {RANGE!r}; a theta is for one scale, or for a range")
    low, high = _numbers(content[RANGE], 2, RANGE, invalid).tolist()
    by_scale = content.get(BY_SCALE, [])
    if not isinstance(by_scale, list):
        raise invalid(f"{BY_SCALE!r} must be a list of scales and their PSNR, got {_brief(by_scale)}")
    psnr = [_numbers(entry, 2, BY_SCALE, invalid).tolist() for entry in by_scale]
    return {RANGE: (low, high), BY_SCALE: dict(psnr)}


def _numbers(values: Any, length: int, name: str, invalid: Refuse) -> Tensor:
    if not isinstance(values, list) or len(values) != length:
        got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise invalid(f"{name!r} must be a list of {length} numbers, got {got}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"{name!r} holds {_brief(value)}, which is not a number")
        if not abs(value) <= MAX_NUMBER:  # the comparison is false for NaN too
            raise invalid(f"{name!r} holds {_brief(value)}; every number must be finite and at most 1e6 in size")
    return torch.tensor(values, dtype=torch.float64)


_PROVENANCE_TYPES: dict[str, tuple[type, ...]] = {
    "family": (str,),
    "start": (str, type(None)),
    "prediction": (str, type(None)),
    "scheduler": (str, type(None)),
    "native_scheduler": (str, type(None)),
    "guidance_scale": (int, float),
    "sigma0": (int, float),
    "model_digest": (str, type(None)),
    "pairs_digest": (str, type(None)),
    "validation_psnr_db": (int, float, type(None)),
    "packages": (dict,),
}


def provenance_of(content: dict[str, Any], invalid: Refuse) -> dict[str, Any]:
    provenance: dict[str, Any] = {}
    for key, types in _PROVENANCE_TYPES.items():
        if key not in content:
            continue
        value = content[key]
        if not isinstance(value, types) or isinstance(value, bool):
            raise invalid(f"{key!r} is {_brief(value)}, expected {' or '.join(t.__name__ for t in types)}")
        if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
            raise invalid(f"{key!r} must be finite, got {_brief(value)}")
        provenance[key] = value
    if not provenance.get("sigma0", 1) > 0:
        raise invalid(f"'sigma0' must be positive, got {provenance['sigma0']!r}")
    if not all(isinstance(version, str) for version in provenance.get("packages", {}).values()):
        raise invalid("'packages' must map names to versions as text")
    return provenance


def schedule_of(content: dict[str, Any], nfe: int, invalid: Refuse) -> NetworkSchedule | None:
    if SCHEDULE not in content:
        return None
    try:
        return NetworkSchedule.from_dict(content[SCHEDULE], nfe)
    except ValueError as error:
        raise invalid(str(error)) from error


def _brief(value: Any) -> str:
    """A value from a file, shortened for an error message."""
    return reprlib.repr(value)
