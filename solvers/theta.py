"""The theta artifact: a distilled solver and its provenance, as a JSON or safetensors file.

A safetensors file holds the float64 tensors times, a and b; its metadata hold the JSON object without them. Both forms
obey the same rules. A reader refuses what it does not know, since a field that it skipped might change the samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
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
SCHEDULE = "schedule"

MAX_NUMBER = 1e6
"""Limit on the size of every number in a theta artifact, above any coefficient of a usable solver."""

MAX_BYTES = 28 * (MAX_NFE * (MAX_NFE + 5) // 2 + 1) + 2**20
"""Size limit for a theta file (the largest solver printed in full, plus 1 MiB); larger files are rejected unread."""

Refuse = Callable[[str], InvalidThetaError]
"""Makes the error for a problem of one artifact."""


@dataclass(frozen=True)
class ThetaArtifact:
    """A solver and its provenance, saved as a JSON file.

    Attributes:
        solver: theta, acting on the model's velocity itself (sigma0 and scheduler changes are folded in).
        family: Family that produced the solver.
        start: Solver that the distillation started from; None for a solver that was not distilled.
        prediction: The quantity that the network predicts.
        scheduler: Name of the scheduler of the velocity that theta acts on.
        native_scheduler: Name of the scheduler that the network was trained with.
        guidance_scale: Guidance scale that theta was made for (1 is unguided).
        sigma0: Preconditioning used during distillation, already folded into the solver.
        model_digest: sha256 of the model. theta is rejected on a different model unless transfer is allowed.
        pairs_digest: Name of the pairs that theta was distilled on: the set's digest, and the number of pairs.
        validation_psnr_db: PSNR on the validation pairs, dB.
        packages: Versions of the packages that produced the artifact.
        schedule: What the network is evaluated at, for the export as a Python file; None if it is not known. Releases
            that do not know it refuse a file that has one.
    """

    solver: NSSolver
    family: str = "ns"
    start: str | None = None
    prediction: str | None = None
    scheduler: str | None = None
    native_scheduler: str | None = None
    guidance_scale: float = 1.0
    sigma0: float = 1.0
    model_digest: str | None = None
    pairs_digest: str | None = None
    validation_psnr_db: float | None = None
    packages: dict[str, str] = field(default_factory=dict)
    schedule: NetworkSchedule | None = None

    def to_json(self) -> str:
        """The artifact as JSON text."""
        solver = self.solver
        content = {
            "format": THETA_FORMAT,
            "version": THETA_VERSION,
            "nfe": solver.nfe,
            "family": self.family,
            "start": self.start,
            "prediction": self.prediction,
            "scheduler": self.scheduler,
            "native_scheduler": self.native_scheduler,
            "guidance_scale": self.guidance_scale,
            "sigma0": self.sigma0,
            "model_digest": self.model_digest,
            "pairs_digest": self.pairs_digest,
            "validation_psnr_db": self.validation_psnr_db,
            "packages": self.packages,
            **({} if self.schedule is None else {SCHEDULE: self.schedule.to_dict()}),
            "times": solver.times.tolist(),
            "a": solver.a.tolist(),
            "b": [row[:k] for k, row in enumerate(solver.b.tolist())],
        }
        lines = (f"  {json.dumps(key)}: {_json_value(key, value)}" for key, value in content.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @property
    def digest(self) -> str:
        """sha256 of flat theta, without provenance."""
        return hashlib.sha256(self.solver.flat().detach().to(torch.float64).numpy().tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the artifact atomically: the file is either complete or absent.

        Raises:
            InvalidThetaError: The artifact does not pass :meth:`from_json`, for example because a number is not finite.
        """
        text = self.to_json()
        ThetaArtifact.from_json(text, origin="theta to be saved")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def from_json(cls, text: str, *, origin: str = "theta") -> ThetaArtifact:
        """Parse and validate JSON text.

        Args:
            text: The JSON text.
            origin: Name of the text in error messages.

        Raises:
            InvalidThetaError: The text is not a theta artifact, or its numbers are not those of a solver.
        """

        invalid = _refusal(origin)
        content = _parsed(text, "it", invalid)
        _check_header(content, invalid)
        return cls._from_content(content, invalid)

    @classmethod
    def _from_content(cls, content: dict[str, Any], invalid: Refuse) -> ThetaArtifact:
        """Validate a JSON object whose header was checked."""
        nfe = content["nfe"]
        times = _numbers(content.get("times"), nfe, "times", invalid)
        a = _numbers(content.get("a"), nfe + 1, "a", invalid)
        rows = content.get("b")
        if not isinstance(rows, list) or len(rows) != nfe + 1:
            raise invalid(f"'b' must have {nfe + 1} rows")
        b = torch.zeros(nfe + 1, nfe, dtype=torch.float64)
        for k, row in enumerate(rows):
            b[k, :k] = _numbers(row, k, f"b[{k}]", invalid)
        outside = [t for t in times.tolist() if not 0 <= t <= 1]
        if outside:
            raise invalid(f"'times' must lie in [0, 1], got {outside[0]:g}")
        return cls(NSSolver(times, a, b), **_provenance(content, invalid), schedule=_schedule(content, nfe, invalid))

    def check_model(self, model_digest: str, *, allow_transfer: bool = False) -> None:
        """Check that this theta was made for the model.

        Raises:
            InvalidThetaError: The digests differ and ``allow_transfer`` is false.
        """
        if self.model_digest != model_digest and not allow_transfer:
            raise InvalidThetaError(
                f"this theta was made for model {_short(self.model_digest)}, not for {_short(model_digest)}: "
                f"its samples would be wrong; pass --allow-transfer (allow_transfer=True) to use it anyway"
            )


def load_theta(path: str | Path, *, model_digest: str | None = None, allow_transfer: bool = False) -> ThetaArtifact:
    """Read and validate a theta artifact.

    Args:
        path: A JSON file, or a safetensors file with suffix .safetensors.
        model_digest: Digest of the model that theta will be used on; not checked if None.
        allow_transfer: Accept a theta that was made for a different model.

    Raises:
        FileNotFoundError: The file does not exist.
        InvalidThetaError: The file is not a theta artifact of this version, its numbers are not those of a solver, or
            it was made for a different model.
    """
    source = Path(path)
    invalid = _refusal(str(source))
    try:
        if not source.is_file():
            raise FileNotFoundError(f"no theta artifact at {source}")
        size = source.stat().st_size
        if size > MAX_BYTES:
            raise invalid(f"it has {size:,} bytes, but the largest theta has {MAX_BYTES:,}")
        if source.suffix == ".safetensors":
            artifact = ThetaArtifact._from_content(_safetensors_content(source, invalid), invalid)
        else:
            text = source.read_bytes().decode("utf-8", errors="replace")
            artifact = ThetaArtifact.from_json(text, origin=str(source))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise invalid(f"it cannot be read ({error})") from error
    if model_digest is not None:
        artifact.check_model(model_digest, allow_transfer=allow_transfer)
    return artifact


def _refusal(origin: str) -> Refuse:
    return lambda problem: InvalidThetaError(f"{origin} is not a usable theta artifact: {problem}")


def _parsed(text: str, name: str, invalid: Refuse) -> dict[str, Any]:
    """The JSON object in ``text``; other JSON gives an empty one, which has no format."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # a plain ValueError for an integer of thousands of digits
        raise invalid(f"{name} is not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _check_header(content: dict[str, Any], invalid: Refuse) -> None:
    """Check format and version first: what another version means by the other fields is not known."""
    if content.get("format") != THETA_FORMAT:
        raise invalid(f"its 'format' is not {THETA_FORMAT!r}")
    version = content.get("version")
    if version != THETA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > THETA_VERSION
        remedy = "; a newer release wrote it: update this one" if newer else ""
        raise invalid(f"version {_brief(version)} is unknown; this release reads version {THETA_VERSION}{remedy}")
    unknown = sorted(content.keys() - {"format", "version", "nfe", SCHEDULE, *TENSORS, *_PROVENANCE_TYPES})
    if unknown:
        raise invalid(
            f"it has fields that this release does not know ({', '.join(map(_brief, unknown[:4]))}) and that may "
            f"change its samples; read it with the release that wrote it, or remove them"
        )
    nfe = content.get("nfe")
    if not isinstance(nfe, int) or isinstance(nfe, bool) or not 1 <= nfe <= MAX_NFE:
        raise invalid(f"'nfe' must be an integer from 1 to {MAX_NFE}, got {_brief(nfe)}")


def _safetensors_content(source: Path, invalid: Refuse) -> dict[str, Any]:
    """The artifact's JSON object in a safetensors file, with its header checked; needs the package safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            if text is None:
                raise invalid(f"its metadata has no {METADATA_KEY!r}; make one with `bespoke export`")
            content = _parsed(text, f"its {METADATA_KEY!r}", invalid)
            _check_header(content, invalid)
            _check_shapes(file, content["nfe"], invalid)
            times, a, b = (file.get_tensor(name) for name in TENSORS)
    except SafetensorError as error:
        raise invalid(f"it is not safetensors ({error})") from error
    # NaN != 0 is true, so NaN on or above the diagonal is rejected too.
    if bool((b.triu() != 0).any()):
        raise invalid("'b' must be strictly lower triangular: a state may use only the velocities before it")
    rows = [row[:k] for k, row in enumerate(b.tolist())]
    return content | {"times": times.tolist(), "a": a.tolist(), "b": rows}


def _check_shapes(file: Any, nfe: int, invalid: Refuse) -> None:
    """Check the names, shapes and dtypes that the header declares, before any tensor is read."""
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


def _json_value(key: str, value: Any) -> str:
    """JSON of one value: a single line, except b with one line per row."""
    if key == "b":
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value)


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


def _provenance(content: dict[str, Any], invalid: Refuse) -> dict[str, Any]:
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


def _schedule(content: dict[str, Any], nfe: int, invalid: Refuse) -> NetworkSchedule | None:
    if SCHEDULE not in content:
        return None
    try:
        return NetworkSchedule.from_dict(content[SCHEDULE], nfe)
    except ValueError as error:
        raise invalid(str(error)) from error


def _brief(value: Any) -> str:
    """A value from a file, shortened for an error message."""
    return reprlib.repr(value)


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else digest[:12]
