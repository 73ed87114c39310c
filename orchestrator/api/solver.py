"""``Solver``: a theta with the model that it was made for. It samples, is compared, and leaves for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import solvers.theta
from orchestrator import plugins
from orchestrator.api.comparing import Compared, Comparison, compared, drawn, fixed_solvers
from orchestrator.api.display import Picture, html_table
from orchestrator.api.model import STORAGE, Model
from orchestrator.api.sampling import sampled
from orchestrator.errors import UserError
from orchestrator.metrics.base import shown_db
from orchestrator.reports.drawing.theta import draw_theta
from solvers.families import GridSolver
from solvers.ns import NSSolver
from solvers.theta import ThetaArtifact

if TYPE_CHECKING:
    from orchestrator.results.bill import Bill
    from sweeps.distil.outcome import Distilled

FAMILIES = ("euler", "midpoint", "dpmpp_2m")
"""Fixed solvers that a theta is compared with by default, as far as they exist at its NFE."""


class Solver:
    """A theta, and the model that it was made for.

    Attributes:
        theta: The solver's numbers and their provenance.
        model: The model; None if it is not known, as of a file.
        distilled: How it was distilled; None if it was not in this process.
        bill: What the distillation cost, with that of other NFEs in the same call; None if it is not known.
        storage: Storage root of its pairs.
    """

    def __init__(
        self,
        theta: ThetaArtifact,
        model: Model | None = None,
        *,
        distilled: Distilled | None = None,
        bill: Bill | None = None,
        storage: str = STORAGE,
        yaml_comment: str = "",
    ):
        self.theta, self.model, self.distilled, self.bill, self.storage = theta, model, distilled, bill, storage
        self._yaml_comment = yaml_comment

    @property
    def nfe(self) -> int:
        """Velocity evaluations per sample."""
        return self.theta.nfe

    @property
    def psnr_db(self) -> float | None:
        """PSNR on the validation pairs, dB; None if it was never measured."""
        return self.theta.validation_psnr_db if self.distilled is None else self.distilled.psnr_db

    @property
    def gain_db(self) -> float | None:
        """PSNR above that of the best fixed solver of its race, dB; None for a file."""
        return None if self.distilled is None else self.distilled.gain_db

    @property
    def comparison(self) -> Comparison:
        """PSNR of theta, of the best fixed solver and of the start, on the validation pairs of its distillation.

        Raises:
            UserError: It was not distilled in this process.
        """
        found = self.distilled
        if found is None:
            raise UserError("this theta comes from a file, which holds no comparison; measure one with compare(model)")
        rows = [
            Compared("theta", self.nfe, found.psnr_db),
            Compared(f"{found.best_fixed.label}, best fixed solver", self.nfe, found.best_fixed_psnr_db),
            Compared(f"{found.start.label}, start", self.nfe, found.start_psnr_db),
        ]
        return Comparison("PSNR on the validation pairs", sorted(rows, key=lambda row: -row.psnr_db))

    # ---- sampling ------------------------------------------------------------------------------------------------

    def sample(
        self,
        model: Model | None = None,
        n: int = 16,
        *,
        conditions: Any = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        x0: Tensor | None = None,
        decode: bool = True,
        batch_size: int = 64,
        allow_transfer: bool = False,
    ) -> Tensor:
        """Samples of the model.

        Args:
            model: The model; None: the one that it was distilled for.
            n: Number of samples.
            conditions: A label, or one per sample; a mapping of arrays with n rows; or prompts, one per sample. None:
                drawn from what conditions the model's pairs.
            guidance_scale: Guidance scale, if theta was made for a range of them; None: theta's own.
            seed: Seed of the noise and of drawn conditions.
            x0: Noise, (n, *shape); None: drawn.
            decode: Whether latents are decoded.
            batch_size: Samples per call of the network.
            allow_transfer: Whether to accept a model that theta was not made for.

        Returns:
            float32 on the CPU, (n, ...).

        Raises:
            UserError, ValueError: Theta does not belong to the model, or the conditions do not fit.
        """
        return sampled(
            self._model(model),
            self._at(guidance_scale),
            n,
            conditions=conditions,
            seed=seed,
            x0=x0,
            decode=decode,
            batch_size=batch_size,
            allow_transfer=allow_transfer,
            storage=self.storage,
        )

    # ---- comparing -----------------------------------------------------------------------------------------------

    def compare(
        self,
        model: Model | None = None,
        against: Sequence[str | Solver] | None = None,
        *,
        n: int = 128,
        guidance_scale: float | None = None,
        pictures: int = 8,
        storage: str | Path | None = None,
        allow_transfer: bool = False,
    ) -> Comparison:
        """PSNR and samples of theta and of other solvers on the same n unseen pairs.

        Ground truth is made once for a model and kept in the storage.

        Args:
            model: The model; None: the one that it was distilled for.
            against: Names of fixed solvers, on even steps and at theta's NFE; or other solvers. None: the best fixed
                one of its distillation, and euler, midpoint and dpmpp_2m.
            n: Number of pairs.
            guidance_scale: Guidance scale, if theta was made for a range of them.
            pictures: Samples per solver to show.
            storage: Storage root; None: that of its distillation.
            allow_transfer: Whether to accept a model that theta was not made for.

        Raises:
            UserError, ValueError: Theta does not belong to the model, or a solver does not exist at its NFE.
        """
        rivals: dict[str, NSSolver | GridSolver] = {}
        if against is None:
            if self.distilled is not None:
                best = self.distilled.best_fixed
                rivals[f"{best.label}, {best.grid.label}"] = best.solver(self.nfe, 1.0)
            rivals |= fixed_solvers(FAMILIES, self.nfe, skip=True)
        for one in against or ():
            if isinstance(one, Solver):
                rivals[f"theta {len(rivals) + 2}"] = one._at(guidance_scale).solver
            else:
                rivals |= fixed_solvers([one], self.nfe)
        return compared(
            self._model(model),
            self._at(guidance_scale),
            rivals,
            n=n,
            pictures=pictures,
            storage=str(storage or self.storage),
            allow_transfer=allow_transfer,
        )

    # ---- leaving -------------------------------------------------------------------------------------------------

    def at(self, *, guidance_scale: float) -> Solver:
        """The solver of one guidance scale, of a theta that was made for a range of them.

        Raises:
            ValueError: Theta was not made for this scale.
        """
        twin = Solver(self.theta.at(guidance_scale=guidance_scale), self.model, storage=self.storage)
        twin.distilled, twin.bill, twin._yaml_comment = self.distilled, self.bill, self._yaml_comment
        if self.distilled is not None and self.theta.guidance_range is not None:
            twin.distilled = None  # its numbers are means over the range
        return twin

    def save(self, path: str | Path) -> Path:
        """Write theta to a file, which :func:`load_theta` reads.

        Args:
            path: A .json file, or a .safetensors file.

        Raises:
            UserError: The file has another suffix, or cannot be written.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            return self.export("safetensors", path)[0]
        if path.suffix != ".json":
            raise UserError(f"a theta is a .json or a .safetensors file, got {str(path)!r}; correct the suffix")
        self.theta.save(path)
        return path

    def export(self, to: str, path: str | Path) -> list[Path]:
        """Write theta for another program.

        Args:
            to: 'python' (one file without dependencies), 'diffusers' (a scheduler in a pipeline's folder),
                'safetensors', or another of ``bespoke list exporters``.
            path: The file, or the folder of a scheduler, e.g. my-pipeline/bns.

        Returns:
            The files written.

        Raises:
            UserError: The destination does not suit the format.
        """
        written: list[Path] = plugins.load("exporters", to)().export(self.theta, Path(path))
        return written

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The configuration of the model, with the command that distils the same theta on a cluster in a comment.

        Args:
            path: File to write; None: only return the text.

        Raises:
            UserError: The model lives only in this process, or is not known.
        """
        ends = self.theta.guidance_range or (self.theta.guidance_scale,)
        owner = self._model(None)
        return owner.to_yaml(path, comment=self._yaml_comment, nfe=[self.nfe], guidance_scale=list(ends))

    def plot(self, guidance_scale: float | None = None) -> Picture:
        """The learned times and coefficients; beside the times, those of the best fixed solver if it is known."""
        theta, others = self._at(guidance_scale), {}
        if self.distilled is not None and self.model is not None:
            best, scheduler = self.distilled.best_fixed, self.model.loaded.scheduler
            others[best.label] = best.solver(self.nfe, 1.0).to_ns(scheduler)
        return drawn(draw_theta(theta.solver, others))

    def _at(self, guidance_scale: float | None) -> ThetaArtifact:
        return self.theta if guidance_scale is None else self.theta.at(guidance_scale=guidance_scale)

    def _model(self, model: Model | None) -> Model:
        owner = model or self.model
        if owner is None:
            raise UserError("this theta comes from a file, which does not hold its model; give the model, as in "
                            "solver.sample(model, n=16)")  # fmt: skip
        return owner

    # ---- being shown ---------------------------------------------------------------------------------------------

    def _lines(self) -> list[tuple[str, str]]:
        theta = self.theta
        ends = theta.guidance_range or (theta.guidance_scale,)
        lines = [("NFE", str(self.nfe)), ("family", theta.family)]
        if ends != (1.0,):
            lines.append(("guidance", " to ".join(f"{end:g}" for end in ends)))
        if self.psnr_db is not None:
            lines.append(("PSNR", f"{shown_db(self.psnr_db, 2)} dB on validation pairs"))
        if self.distilled is not None:
            found = self.distilled
            fixed = f"{found.best_fixed.label} ({shown_db(found.best_fixed_psnr_db, 2)} dB)"
            lines.append(("gain", f"{found.gain_db:+.2f} dB over {fixed}"))
        if self.bill is not None and (cost := self.bill.total().cost) is not None:
            lines.append(("cost", f"{cost.evaluations:,} velocity evaluations"))
        return lines

    def __repr__(self) -> str:
        owner = "a file" if self.model is None else self.model.name
        return f"Solver({owner}: {', '.join(f'{name} {value}' for name, value in self._lines())})"

    def _repr_html_(self) -> str:
        title = "Solver" if self.model is None else f"Solver for {self.model.name}"
        parts = [html_table(self._lines(), title=title)]
        parts += [self.plot(end).html() for end in self.theta.guidance_range or (None,)]
        if self.bill is not None:
            lines = [*self.bill.items(), self.bill.total()]
            headings = ("cost", "evaluations", "forward passes", "backward passes", "wall time", "reused")
            parts.append(html_table([(line.item, *line.texts) for line in lines], headings))
        return "\n".join(parts)


def load_theta(path: str | Path, model: Model | None = None) -> Solver:
    """Read a theta file, as a solver.

    Args:
        path: A .json or .safetensors file.
        model: The model that it was made for, if it is to be sampled or compared without naming one.

    Raises:
        UserError: The file does not exist.
        InvalidThetaError: The file is not a theta, or it was made for another model.
    """
    try:
        theta = solvers.theta.load_theta(path, model_digest=None if model is None else model.digest)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    return Solver(theta, model)
