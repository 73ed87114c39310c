"""Non-stationary (NS) solvers: Algorithm 1 of the BNS paper, and the theta artifact that travels.

Knows nothing of how theta was found. ``solvers.to_ns`` makes one from any linear solver, ``solvers.distil`` from data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute

from solvers.field import VelocityField
from solvers.schedulers.base import Scheduler

THETA_FORMAT = "bespoke-theta"
THETA_VERSION = 1
MAX_NFE = 1000
"""Larger than any solver anyone distils; a limit so that a hostile file cannot ask for unbounded memory."""

MAX_NUMBER = 1e6
"""Larger than any coefficient of a usable solver."""

MAX_BYTES = 28 * (MAX_NFE * (MAX_NFE + 5) // 2 + 1) + 2**20
"""The numbers of the largest theta at full length, and a generous rest: a longer file is no theta, and is not read."""


class InvalidThetaError(ValueError):
    """A theta that is malformed, or that does not belong to the model it is used on."""


@dataclass(frozen=True)
class NSSolver:
    """An n-step non-stationary solver: every state is a linear combination of x0 and past velocities.

        x_k = a_k x0 + sum_{j<k} b_kj u_j,   u_j = u_{t_j}(x_j),   k = 0..n,   sample = x_n

    (BNS eq. 11, Algorithm 1.) Row 0 is the first state, ``a_0 x0``: 1 in the papers, and sigma(t_0) for solvers that
    start elsewhere, such as EDM's. Any Runge-Kutta, multistep, exponential or scale-time solver has this form.

    Attributes:
        times: Query times t_0..t_{n-1}, shape (n,), float64; repeats and any order are allowed.
        a: Weights of x0, shape (n+1,), float64.
        b: Weights of the velocities, shape (n+1, n), float64, strictly lower triangular (b[k, j] = 0 for j >= k).
    """

    times: Tensor
    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        n = self.nfe
        if self.times.ndim != 1 or n < 1 or self.a.shape != (n + 1,) or self.b.shape != (n + 1, n):
            raise InvalidThetaError(
                f"an NS solver of n={n} evaluations has times (n,), a (n+1,) and b (n+1, n); "
                f"got {tuple(self.times.shape)}, {tuple(self.a.shape)}, {tuple(self.b.shape)}"
            )

    @property
    def nfe(self) -> int:
        """Velocity evaluations per sample."""
        return self.times.shape[0]

    def sample(self, velocity: VelocityField, x0: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Algorithm 1: the sample x_n, of the shape and dtype of ``x0``.

        Args:
            velocity: ``u(x, t)``: any callable of a batch and a 0-d float64 time.
            x0: Noise ~ N(0, I), shape (B, ...).
            checkpoint: For gradients: see :class:`CheckpointedField`. Without gradients it changes nothing.

        Gradients flow into times, a and b where they require them, once: there are no second derivatives. Beside what
        the network keeps for its own backward pass, n states and n velocities are held.
        """
        for x in self.states(velocity, x0, checkpoint=checkpoint):
            sample = x
        return sample

    def states(self, velocity: VelocityField, x0: Tensor, *, checkpoint: bool = False) -> Iterator[Tensor]:
        """x_0, ..., x_n in turn, each of the shape and dtype of ``x0``; x_k is where the velocity is asked at t_k.

        Args: those of :meth:`sample`.
        """
        needs_graph = torch.is_grad_enabled() and (self.a.requires_grad or self.b.requires_grad)
        field = CheckpointedField(velocity) if checkpoint else velocity
        a, b = self.a.tolist(), self.b.tolist()
        velocities: list[Tensor] = []
        for k in range(self.nfe + 1):
            if needs_graph:
                x: Tensor = _Combination.apply(self.a[k], self.b[k], x0, *velocities)
            else:
                x = _combine(a[k], b[k], x0, velocities)
            yield x
            if k < self.nfe:
                velocities.append(field(x, self.times[k]))

    def flat(self) -> Tensor:
        """Every number of theta in one float64 vector: times, a, then the lower triangle of b by rows."""
        rows, columns = lower_triangle(self.nfe)
        return torch.cat([self.times, self.a, self.b[rows, columns]])

    @classmethod
    def from_flat(cls, flat: Tensor) -> NSSolver:
        """The inverse of :meth:`flat`, differentiable.

        Raises:
            InvalidThetaError: The length is that of no n.
        """
        n = nfe_of_flat(flat.shape[0])
        rows, columns = lower_triangle(n)
        b = torch.zeros(n + 1, n, dtype=flat.dtype).index_put((rows, columns), flat[2 * n + 1 :])
        return cls(times=flat[:n], a=flat[n : 2 * n + 1], b=b)

    def detach(self) -> NSSolver:
        return NSSolver(self.times.detach().clone(), self.a.detach().clone(), self.b.detach().clone())

    def save(self, path: str | Path, **provenance: Any) -> None:
        """Write the theta artifact; ``provenance`` are the optional fields of :class:`ThetaArtifact`."""
        ThetaArtifact(self, **provenance).save(path)

    @classmethod
    def load(cls, path: str | Path, *, model_digest: str | None = None, allow_transfer: bool = False) -> NSSolver:
        """The solver of a theta artifact; see :meth:`ThetaArtifact.load`."""
        artifact = ThetaArtifact.load(path)
        if model_digest is not None:
            artifact.check_model(model_digest, allow_transfer=allow_transfer)
        return artifact.solver


def lower_triangle(nfe: int) -> tuple[Tensor, Tensor]:
    """Row and column indices of the free entries of b, by rows: (1,0), (2,0), (2,1), ..."""
    rows, columns = torch.tril_indices(nfe + 1, nfe, offset=-1)
    return rows, columns


def nfe_of_flat(length: int) -> int:
    """The n whose theta has ``length`` numbers: n times, n+1 a, n(n+1)/2 b."""
    n = round((-5 + math.sqrt(25 + 8 * (length - 1))) / 2)
    if n < 1 or n * (n + 5) // 2 + 1 != length:
        raise InvalidThetaError(f"{length} numbers are no theta: n evaluations have n(n+5)/2 + 1 of them")
    return n


class CheckpointedField:
    """A velocity field that keeps only its inputs for the backward pass, and is evaluated again there.

    Activation checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost") with one segment per
    velocity: what a solver holds for its gradient is then n states and n velocities, and the activations of a single
    evaluation while they are needed, for one more forward per evaluation. The gradient is the same.

    Args:
        field: Deterministic: its second evaluation must equal the first. What counts its evaluations counts both.
    """

    def __init__(self, field: VelocityField):
        self.field = field

    @property
    def scheduler(self) -> Scheduler:
        """That of the field itself."""
        return self.field.scheduler

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """u_t(x), as the field itself."""
        if not torch.is_grad_enabled():
            return self.field(x, t)
        return recompute(self.field, x, t, use_reentrant=False, preserve_rng_state=False)


def _combine(a: float, b: list[float], x0: Tensor, velocities: Sequence[Tensor]) -> Tensor:
    """a x0 + sum_j b_j u_j in place: no stacked copy of the velocities."""
    x = x0 * a
    for weight, velocity in zip(b, velocities, strict=False):
        if weight:
            x.add_(velocity, alpha=weight)
    return x


class _Combination(torch.autograd.Function):
    """:func:`_combine` with gradients in a, b, x0 and the u_j; keeps references to x0 and the u_j, and no copy.

    Inputs: a (0-d), b (n,) of which the first entries are used, x0, and the velocities so far, of the shape of x0.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, x0: Tensor, *velocities: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, x0, *velocities)
        return _combine(float(a), b.tolist(), x0, velocities)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # As plain tensors: a solver may be run on ones that watch it for what is not linear, and products are not.
        a, b, x0, *velocities = (saved.as_subclass(Tensor) for saved in ctx.saved_tensors)
        gradient = gradient.as_subclass(Tensor)
        # Sums over a whole batch: never in less than float32.
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        needs_a, needs_b, *needs_terms = ctx.needs_input_grad
        of_a = (wide * x0).sum().to(a) if needs_a else None
        of_b = None
        if needs_b:
            of_b = torch.zeros_like(b)
            if velocities:
                of_b[: len(velocities)] = torch.stack([(wide * velocity).sum() for velocity in velocities]).to(b)
        weights = [float(a), *b.tolist()]
        terms = [
            gradient * weight if needed and weight else None
            for weight, needed in zip(weights, needs_terms, strict=False)
        ]
        return of_a, of_b, *terms


@dataclass(frozen=True)
class ThetaArtifact:
    """A solver and where it came from: the JSON file that a user takes home.

    Attributes:
        solver: theta, acting on the model's velocity itself (sigma0 and scheduler changes are folded in).
        family: Family that produced it.
        start: Solver the distillation started from; None for a solver that was not distilled.
        prediction: What the network predicts.
        scheduler: Name of the scheduler of the velocity that theta acts on.
        native_scheduler: Name of the scheduler the network was trained with.
        guidance_scale: Guidance that theta was made for (1 is unguided).
        sigma0: Preconditioning used during distillation, already folded into the numbers.
        model_digest: sha256 of the model; theta is refused on another unless transfer is asked for.
        pairs_digest: Digest of the ground-truth pairs it was distilled on.
        validation_psnr_db: PSNR on the validation pairs, dB.
        packages: Versions of the packages that made it.
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

    def to_json(self) -> str:
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
            "times": solver.times.tolist(),
            "a": solver.a.tolist(),
            "b": [row[:k] for k, row in enumerate(solver.b.tolist())],
        }
        lines = (f"  {json.dumps(key)}: {_json_value(key, value)}" for key, value in content.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @property
    def digest(self) -> str:
        """sha256 of the numbers of theta alone."""
        return hashlib.sha256(self.solver.flat().detach().to(torch.float64).numpy().tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the artifact atomically: it is complete under its name, or not there.

        Raises:
            InvalidThetaError: theta holds a number that is not finite.
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
    def load(cls, path: str | Path) -> ThetaArtifact:
        """Read and check a theta artifact.

        Raises:
            FileNotFoundError: There is no such file.
            InvalidThetaError: The file is no theta artifact, or its numbers are not those of a solver.
        """
        source = Path(path)
        try:
            if not source.is_file():
                raise FileNotFoundError(f"no theta artifact at {source}")
            with source.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InvalidThetaError(f"{source} is not a usable theta artifact: it cannot be read ({error})") from error
        if len(data) > MAX_BYTES:
            raise InvalidThetaError(
                f"{source} is not a usable theta artifact: it has more than the {MAX_BYTES:,} bytes of the largest"
            )
        return cls.from_json(data.decode("utf-8", errors="replace"), origin=str(source))

    @classmethod
    def from_json(cls, text: str, *, origin: str = "theta") -> ThetaArtifact:
        """Parse and validate; ``origin`` names the text in errors."""

        def invalid(problem: str) -> InvalidThetaError:
            return InvalidThetaError(f"{origin} is not a usable theta artifact: {problem}")

        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError alone for an integer of thousands of digits
            raise invalid(f"it is not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != THETA_FORMAT:
            raise invalid(f"its 'format' is not {THETA_FORMAT!r}")
        version = content.get("version")
        if version != THETA_VERSION or isinstance(version, bool):
            raise invalid(f"version {_brief(version)} is unknown, this release reads version {THETA_VERSION}")
        nfe = content.get("nfe")
        if not isinstance(nfe, int) or isinstance(nfe, bool) or not 1 <= nfe <= MAX_NFE:
            raise invalid(f"'nfe' must be an integer from 1 to {MAX_NFE}, got {_brief(nfe)}")
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
        return cls(NSSolver(times, a, b), **_provenance(content, invalid))

    def check_model(self, model_digest: str, *, allow_transfer: bool = False) -> None:
        """Refuse this theta on another model than it was made for.

        Raises:
            InvalidThetaError: The digests differ and ``allow_transfer`` is false.
        """
        if self.model_digest != model_digest and not allow_transfer:
            raise InvalidThetaError(
                f"this theta was made for model {_short(self.model_digest)}, not for {_short(model_digest)}: "
                f"its samples would be off; pass --allow-transfer (allow_transfer=True) to use it all the same"
            )


def _json_value(key: str, value: Any) -> str:
    """One line a number list, and one line a row of b: long enough to read, short enough to scan."""
    if key == "b":
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value)


def _numbers(values: Any, length: int, name: str, invalid: Any) -> Tensor:
    if not isinstance(values, list) or len(values) != length:
        got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise invalid(f"{name!r} must be a list of {length} numbers, got {got}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"{name!r} holds {_brief(value)}, which is not a number")
        if not abs(value) <= MAX_NUMBER:  # also false for NaN
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


def _provenance(content: dict[str, Any], invalid: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, types in _PROVENANCE_TYPES.items():
        if key not in content:
            continue
        value = content[key]
        if not isinstance(value, types) or isinstance(value, bool):
            raise invalid(f"{key!r} is {_brief(value)}, expected {' or '.join(t.__name__ for t in types)}")
        if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
            raise invalid(f"{key!r} must be finite, got {_brief(value)}")
        found[key] = value
    if not found.get("sigma0", 1) > 0:
        raise invalid(f"'sigma0' must be positive, got {found['sigma0']!r}")
    if not all(isinstance(version, str) for version in found.get("packages", {}).values()):
        raise invalid("'packages' must map names to versions as text")
    return found


def _brief(value: Any) -> str:
    """A value of a file for an error message: whatever its length or depth."""
    return reprlib.repr(value)


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else digest[:12]
