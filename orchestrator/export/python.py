"""``python``: exports theta as one short Python file without dependencies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.export.base import Exporter, ExportError, check_artifact, write_file
from solvers.theta import ThetaArtifact

TEMPLATE = '''\
"""{title}

    from {module} import sample
    x1 = sample(velocity, x0)

``velocity(x, t)`` is dx/dt of the sampling ODE for a batch x and a Python float t, with t=0 noise and t=1 data.
{belongs}
x0 is noise ~ N(0, I). x0 and the velocities may be arrays of torch, numpy or any other library with + and *.
"""

MODEL_DIGEST = {model_digest!r}
GUIDANCE_SCALE = {guidance_scale!r}
SCHEDULER = {scheduler!r}

# x_k = A[k] x0 + sum_j B[k][j] u_j with u_j = velocity(x_j, TIMES[j]); the sample is the last x (BNS, Algorithm 1).
TIMES = {times}
A = {a}
B = {b}


def sample(velocity, x0):
    """Solve the ODE from noise ``x0`` in len(TIMES) evaluations of ``velocity``; keeps the shape and dtype of x0."""
    velocities = []
    x = A[0] * x0
    for t, a, row in zip(TIMES, A[1:], B[1:]):
        velocities.append(velocity(x, t))
        x = a * x0
        for weight, u in zip(row, velocities):
            x = x + weight * u
    return x
'''


@dataclass(frozen=True)
class PythonFile(Exporter):
    """Exports theta as one Python file that holds its values; it runs with torch or numpy, without this package."""

    name = "python"

    def export(self, artifact: ThetaArtifact, destination: Path) -> list[Path]:
        """Write the file, whose name must be a valid Python module name. See :meth:`Exporter.export`."""
        if not destination.stem.isidentifier():
            importable = re.sub(r"\W", "_", destination.stem)
            raise ExportError(
                f"Python cannot import a file named {destination.name!r}; name it with letters, digits and "
                f"underscores, e.g. {importable}.py"
            )
        artifact = check_artifact(artifact)
        return write_file(destination, ".py", _source(artifact, destination.stem).encode("utf-8"))


def _source(artifact: ThetaArtifact, module: str) -> str:
    solver = artifact.solver
    # Text from the artifact enters the file only through repr or ascii, so that a hostile name cannot become code.
    family = ascii(artifact.family)[1:-1].replace('"', "'")
    return TEMPLATE.format(
        title=f"Distilled solver of {solver.nfe} velocity evaluations (family {family}).",
        module=module,
        belongs=_belongs(artifact),
        model_digest=artifact.model_digest,
        guidance_scale=float(artifact.guidance_scale),
        scheduler=artifact.scheduler,
        times=_tuple(solver.times.tolist()),
        a=_tuple(solver.a.tolist()),
        b="(\n" + "".join(f"    {_tuple(row[:k])},\n" for k, row in enumerate(solver.b.tolist())) + ")",
    )


def _belongs(artifact: ThetaArtifact) -> str:
    guided = "without guidance" if artifact.guidance_scale == 1 else "guided at GUIDANCE_SCALE"
    path = "on the path named SCHEDULER" if artifact.scheduler else "on the path that the solver was distilled for"
    return f"It must be the velocity of the model MODEL_DIGEST, {guided}, {path};\nwith any other, samples are wrong."


def _tuple(values: Iterable[float]) -> str:
    """A tuple literal that reads back to exactly the same float64 values."""
    return "(" + "".join(f"{value!r}, " for value in values).rstrip() + ")"


EXPORTER = PythonFile
