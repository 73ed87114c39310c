"""The theta artifact: a distilled solver and its provenance, as a JSON or safetensors file.

A safetensors file holds the float64 tensors times, a and b; its metadata hold the JSON object without them. Both forms
obey the same rules. A reader refuses what it does not know, since a field that it skipped might change the samples.

A theta for a range of guidance scales has a solver at each end of ``guidance_range``, and is linear in between: times,
a and b belong to the lower end, upper_times, upper_a and upper_b to the upper one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solvers.guided import GuidedSolver
from solvers.network_schedule import NetworkSchedule
from solvers.ns import MAX_NFE, InvalidThetaError, NSSolver
from solvers.theta_content import (
    BY_SCALE,
    RANGE,
    SCHEDULE,
    TENSORS,
    THETA_FORMAT,
    THETA_VERSION,
    UPPER_TENSORS,
    Refuse,
    check_header,
    guidance_of,
    json_value,
    parsed,
    provenance_of,
    safetensors_content,
    schedule_of,
    solver_of,
    values_of,
)

MAX_BYTES = 2 * 28 * (MAX_NFE * (MAX_NFE + 5) // 2 + 1) + 2**20
"""Size limit for a theta file (two of the largest solvers printed in full, plus 1 MiB); larger files are rejected
unread."""


class _SolverField:
    """The field ``solver`` of an artifact, which cannot be read if there is one per guidance scale."""

    def __get__(self, artifact: ThetaArtifact | None, owner: type[ThetaArtifact]) -> NSSolver:
        if artifact is None:
            raise AttributeError("solver")  # the field has no default
        _refuse_range(artifact)
        solver: NSSolver = artifact.__dict__["solver"]
        return solver

    def __set__(self, artifact: ThetaArtifact, numbers: NSSolver | GuidedSolver) -> None:
        artifact.__dict__["solver"] = numbers


class _ScaleField:
    """The field ``guidance_scale`` of an artifact, 1 by default, which cannot be read if there is a range."""

    def __get__(self, artifact: ThetaArtifact | None, owner: type[ThetaArtifact]) -> float:
        if artifact is None:
            return 1.0
        _refuse_range(artifact)
        scale: float = artifact.__dict__["guidance_scale"]
        return scale

    def __set__(self, artifact: ThetaArtifact, scale: float) -> None:
        artifact.__dict__["guidance_scale"] = scale


def _refuse_range(artifact: ThetaArtifact) -> None:
    """Refuse to read what a theta has only at one guidance scale."""
    if artifact.guidance_range is not None:
        low, high = artifact.guidance_range
        raise InvalidThetaError(
            f"this theta is for every guidance scale from {low:g} to {high:g}; choose one first, for example "
            f"theta.at(guidance_scale={high:g})"
        )


@dataclass(frozen=True, repr=False)
class ThetaArtifact:
    """A solver and its provenance, saved as a JSON file.

    Attributes:
        solver: theta, acting on the model's velocity itself (sigma0 and scheduler changes are folded in). It may be
            created with a ``GuidedSolver``, for a range of guidance scales; :meth:`at` then gives the solver of one.
        family: Family that produced the solver.
        start: Solver that the distillation started from; None for a solver that was not distilled.
        prediction: The quantity that the network predicts.
        scheduler: Name of the scheduler of the velocity that theta acts on.
        native_scheduler: Name of the scheduler that the network was trained with.
        guidance_scale: Guidance scale that theta was made for (1 is unguided). Like the solver, it cannot be read of a
            theta for a range.
        sigma0: Preconditioning used during distillation, already folded into the solver.
        model_digest: sha256 of the model. theta is rejected on a different model unless transfer is allowed.
        pairs_digest: Name of the pairs that theta was distilled on: the set's digest, and the number of pairs.
        validation_psnr_db: PSNR on the validation pairs, dB; for a range, the mean over guidance scales.
        packages: Versions of the packages that produced the artifact.
        schedule: What the network is evaluated at, for the export as a Python file; None if it is not known. Releases
            that do not know it refuse a file that has one.
        validation_psnr_db_by_scale: For a range: PSNR on the validation pairs at each guidance scale measured, dB.
    """

    solver: _SolverField = _SolverField()
    family: str = "ns"
    start: str | None = None
    prediction: str | None = None
    scheduler: str | None = None
    native_scheduler: str | None = None
    guidance_scale: _ScaleField = _ScaleField()
    sigma0: float = 1.0
    model_digest: str | None = None
    pairs_digest: str | None = None
    validation_psnr_db: float | None = None
    packages: dict[str, str] = field(default_factory=dict)
    schedule: NetworkSchedule | None = None
    validation_psnr_db_by_scale: dict[float, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        ends = self.guidance_range or (self.guidance_scale,)
        scales = "guidance " + " to ".join(f"{end:g}" for end in ends)
        quality = "" if self.validation_psnr_db is None else f", {self.validation_psnr_db:.2f} dB"
        return f"<ThetaArtifact {self.family}, NFE {self.nfe}, {scales}{quality}>"

    @property
    def numbers(self) -> NSSolver | GuidedSolver:
        """The solver, or the solvers of a range of guidance scales."""
        numbers: NSSolver | GuidedSolver = self.__dict__["solver"]
        return numbers

    @property
    def nfe(self) -> int:
        """Velocity evaluations per sample."""
        return self.numbers.nfe

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The ends of the range of guidance scales that theta was made for; None for a single scale."""
        return self.numbers.guidance_range if isinstance(self.numbers, GuidedSolver) else None

    def at(self, *, guidance_scale: float) -> ThetaArtifact:
        """The theta of one guidance scale in the range; a theta of a single scale has only its own.

        Raises:
            InvalidThetaError: theta was not made for this scale.
        """
        if isinstance(self.numbers, GuidedSolver):
            solver = self.numbers.at(guidance_scale)
            psnr = self.validation_psnr_db_by_scale.get(guidance_scale)
            scale = float(guidance_scale)
            return replace(
                self, solver=solver, guidance_scale=scale, validation_psnr_db=psnr, validation_psnr_db_by_scale={}
            )
        if guidance_scale != self.guidance_scale:
            raise InvalidThetaError(
                f"this theta was made for guidance_scale {self.guidance_scale:g}, not {guidance_scale:g}; use it at "
                f"{self.guidance_scale:g}, or distil one for {guidance_scale:g}"
            )
        return self

    def to_json(self) -> str:
        """The artifact as JSON text."""
        content = {
            "format": THETA_FORMAT,
            "version": THETA_VERSION,
            "nfe": self.nfe,
            "family": self.family,
            "start": self.start,
            "prediction": self.prediction,
            "scheduler": self.scheduler,
            "native_scheduler": self.native_scheduler,
            **self._scales(),
            "sigma0": self.sigma0,
            "model_digest": self.model_digest,
            "pairs_digest": self.pairs_digest,
            "validation_psnr_db": self.validation_psnr_db,
            "packages": self.packages,
            **({} if self.schedule is None else {SCHEDULE: self.schedule.to_dict()}),
            **{name: values_of(tensor) for name, tensor in self.tensors().items()},
        }
        lines = (f"  {json.dumps(key)}: {json_value(key, value)}" for key, value in content.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def _scales(self) -> dict[str, Any]:
        """The fields that say which guidance scales theta is for."""
        if self.guidance_range is None:
            return {"guidance_scale": self.guidance_scale}
        by_scale = [list(entry) for entry in sorted(self.validation_psnr_db_by_scale.items())]
        return {RANGE: list(self.guidance_range), **({BY_SCALE: by_scale} if by_scale else {})}

    def tensors(self) -> dict[str, Tensor]:
        """theta's numbers by their names in files: times (n,), a (n+1,), b (n+1, n), float64; twice for a range."""
        numbers = self.numbers
        if isinstance(numbers, NSSolver):
            return dict(zip(TENSORS, (numbers.times, numbers.a, numbers.b), strict=True))
        ends = (numbers.lower, TENSORS), (numbers.upper, UPPER_TENSORS)
        return {
            name: tensor
            for solver, names in ends
            for name, tensor in zip(names, (solver.times, solver.a, solver.b), strict=True)
        }

    @property
    def digest(self) -> str:
        """sha256 of flat theta, without provenance; for a range, of both ends and the range."""
        numbers = self.numbers
        if isinstance(numbers, NSSolver):
            flat = numbers.flat()
        else:
            ends = torch.tensor(numbers.guidance_range, dtype=torch.float64)
            flat = torch.cat([numbers.lower.flat(), numbers.upper.flat(), ends])
        return hashlib.sha256(flat.detach().to(torch.float64).numpy().tobytes()).hexdigest()

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
        content = parsed(text, "it", invalid)
        check_header(content, invalid)
        return cls._from_content(content, invalid)

    @classmethod
    def _from_content(cls, content: dict[str, Any], invalid: Refuse) -> ThetaArtifact:
        """Validate a JSON object whose header was checked."""
        lower = solver_of(content, TENSORS, invalid)
        numbers: NSSolver | GuidedSolver = lower
        guided = guidance_of(content, invalid)
        if guided:
            if SCHEDULE in content:
                raise invalid(f"it has a {SCHEDULE!r}, which belongs to the times of one scale, and a {RANGE!r}")
            try:
                numbers = GuidedSolver(lower, solver_of(content, UPPER_TENSORS, invalid), guided.pop(RANGE))
            except InvalidThetaError as error:
                raise invalid(str(error)) from error
        schedule = schedule_of(content, numbers.nfe, invalid)
        return cls(numbers, **provenance_of(content, invalid), **guided, schedule=schedule)

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
            artifact = ThetaArtifact._from_content(safetensors_content(source, invalid), invalid)
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


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else digest[:12]
