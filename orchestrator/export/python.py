"""``python``: exports theta as one short Python file without dependencies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.export.base import Exporter, ExportError, check_artifact, write_file
from solvers.network_schedule import NetworkSchedule
from solvers.theta import ThetaArtifact

TEMPLATE = '''\
"""{title}

    from {module} import sample{also}
    x1 = sample(velocity, x0)

``velocity(x, t)`` is dx/dt of the sampling ODE for a batch x and a Python float t, with t=0 noise and t=1 data.
{belongs}
x0 is noise ~ N(0, I). x0 and the velocities may be arrays of torch, numpy or any other library with + and *.
{usage}"""

MODEL_DIGEST = {model_digest!r}
GUIDANCE_SCALE = {guidance_scale!r}
SCHEDULER = {scheduler!r}

# x_k = A[k] x0 + sum_j B[k][j] u_j with u_j = velocity(x_j, TIMES[j]); the sample is the last x (BNS, Algorithm 1).
TIMES = {times}
A = {a}
B = {b}


def sample(velocity, x0):
    """Solve the ODE from noise ``x0`` in len(TIMES) evaluations of ``velocity``; keeps the shape and dtype of x0."""
    return _solve(lambda x, k: velocity(x, TIMES[k]), x0)


def _solve(velocity, x0):
    velocities = []
    x = A[0] * x0
    for k in range(len(TIMES)):
        velocities.append(velocity(x, k))
        x = A[k + 1] * x0
        for weight, u in zip(B[k + 1], velocities):
            x = x + weight * u
    return x
'''

RANGE_TEMPLATE = '''\
"""{title}

    from {module} import sample
    x1 = sample(velocity, x0, guidance_scale)

``velocity(x, t)`` is dx/dt of the sampling ODE at this guidance scale, for a batch x and a Python float t, with t=0
noise and t=1 data.
{belongs}
x0 is noise ~ N(0, I). x0 and the velocities may be arrays of torch, numpy or any other library with + and *.
"""

MODEL_DIGEST = {model_digest!r}
GUIDANCE_RANGE = {guidance_range}
SCHEDULER = {scheduler!r}

# x_k = A[k] x0 + sum_j B[k][j] u_j with u_j = velocity(x_j, TIMES[j]); the sample is the last x (BNS, Algorithm 1).
# Every number is a pair: its values at the two ends of GUIDANCE_RANGE, between which it is linear.
TIMES = {times}
A = {a}
B = {b}


def sample(velocity, x0, guidance_scale):
    """Solve the ODE from noise ``x0`` in len(TIMES) evaluations of ``velocity``; keeps the shape and dtype of x0.

    Raises ValueError if ``guidance_scale``, which ``velocity`` must be guided at, is outside GUIDANCE_RANGE.
    """
    low, high = GUIDANCE_RANGE
    if not low <= guidance_scale <= high:
        raise ValueError(f"guidance_scale {{guidance_scale}} is outside the range of this solver, {{low}} to {{high}}")
    share = (guidance_scale - low) / (high - low)

    def at_scale(ends):
        return ends[0] + share * (ends[1] - ends[0])

    velocities = []
    x = at_scale(A[0]) * x0
    for k in range(len(TIMES)):
        velocities.append(velocity(x, at_scale(TIMES[k])))
        x = at_scale(A[k + 1]) * x0
        for ends, u in zip(B[k + 1], velocities):
            x = x + at_scale(ends) * u
    return x
'''

USAGE = """
With the network itself:

    x1 = sample_network(lambda x, t: {call}, x0)

``network(x, t)`` returns the network's {prediction}, for a batch x
and the network's own time t, a Python number{takes}.
"""

GUIDED = """
Guidance combines its outputs with and without the condition: lambda x, t: f_null(x, t) + GUIDANCE_SCALE * (
f_cond(x, t) - f_null(x, t)).
"""

NETWORK = '''
# At TIMES[k] the network gets y = x / SCALE[k] = ALPHA[k] data + SIGMA[k] noise, and its own time NETWORK_TIMES[k].
PREDICTION = {prediction!r}
{tables}

def velocity_from(output, x, k):
    """dx/dt at TIMES[k] from ``output``, the network's prediction at x / SCALE[k] and NETWORK_TIMES[k]."""
{formula}

def sample_network(network, x0):
    """The sample from noise ``x0``, with {forwards}len(TIMES) evaluations of ``network(x, t)``."""

    def velocity(x, k):
        y = x / SCALE[k]
        output = network(y, NETWORK_TIMES[k])
{interpolation}        return velocity_from(output, x, k)

    return _solve(velocity, x0)
'''

INTERPOLATION = """\
        # The network takes whole timesteps; its outputs at two neighbouring ones are interpolated.
        output = output + SHARE[k] * (network(y, TIMES_ABOVE[k]) - output)
"""

FORMULAS = {
    "epsilon": ("(y - SIGMA[k] * output) / ALPHA[k]", "output"),
    "sample": ("output", "(y - ALPHA[k] * output) / SIGMA[k]"),
    "v_prediction": ("ALPHA[k] * y - SIGMA[k] * output", "SIGMA[k] * y + ALPHA[k] * output"),
    "score": ("(y + SIGMA[k] ** 2 * output) / ALPHA[k]", "-SIGMA[k] * output"),
    "noise_minus_data": (
        "(y - SIGMA[k] * output) / (ALPHA[k] + SIGMA[k])",
        "(y + ALPHA[k] * output) / (ALPHA[k] + SIGMA[k])",
    ),
    "velocity": (
        "(SIGMA[k] * output - NATIVE_D_SIGMA[k] * y) / determinant",
        "(NATIVE_D_ALPHA[k] * y - ALPHA[k] * output) / determinant",
    ),
}
"""Data and noise by prediction, as ``solvers.prediction.endpoints`` computes them."""

WORDS = {
    "epsilon": "noise prediction",
    "sample": "data prediction",
    "v_prediction": "v prediction, alpha noise - sigma data",
    "velocity": "velocity, the derivative towards the data",
    "score": "score, -noise / sigma",
    "noise_minus_data": "prediction of noise - data",
}


@dataclass(frozen=True)
class PythonFile(Exporter):
    """Exports theta as one Python file that holds its values; it runs with torch or numpy, without this package.

    It holds the schedule of the network too, if theta does: the file then samples with the network itself. The file of
    a theta for a range of guidance scales takes the scale as an argument of ``sample``.
    """

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
        source = _source if artifact.guidance_range is None else _source_of_range
        return write_file(destination, ".py", source(artifact, destination.stem).encode("utf-8"))


def _title(artifact: ThetaArtifact) -> str:
    # Text from the artifact enters the file only through repr or ascii, so that a hostile name cannot become code.
    family = ascii(artifact.family)[1:-1].replace('"', "'")
    return f"Distilled solver of {artifact.nfe} velocity evaluations (family {family})."


def _source_of_range(artifact: ThetaArtifact, module: str) -> str:
    """The file of a theta for a range of guidance scales."""
    assert artifact.guidance_range is not None
    ends = [artifact.at(guidance_scale=scale).solver for scale in artifact.guidance_range]
    times, a = (zip(*(getattr(solver, name).tolist() for solver in ends), strict=True) for name in ("times", "a"))
    rows = zip(*(solver.b.tolist() for solver in ends), strict=True)
    b = "".join(f"    {_pairs(zip(*(row[:k] for row in pair), strict=True))},\n" for k, pair in enumerate(rows))
    return RANGE_TEMPLATE.format(
        title=_title(artifact),
        module=module,
        belongs=_belongs(artifact),
        model_digest=artifact.model_digest,
        guidance_range=_tuple(artifact.guidance_range),
        scheduler=artifact.scheduler,
        times=_pairs(times),
        a=_pairs(a),
        b=f"(\n{b})",
    )


def _source(artifact: ThetaArtifact, module: str) -> str:
    solver = artifact.solver
    carries = artifact.schedule is not None and artifact.prediction in FORMULAS
    text = TEMPLATE.format(
        title=_title(artifact),
        module=module,
        also=", sample_network" if carries else "",
        usage=_usage(artifact) if carries else "",
        belongs=_belongs(artifact),
        model_digest=artifact.model_digest,
        guidance_scale=float(artifact.guidance_scale),
        scheduler=artifact.scheduler,
        times=_tuple(solver.times.tolist()),
        a=_tuple(solver.a.tolist()),
        b="(\n" + "".join(f"    {_tuple(row[:k])},\n" for k, row in enumerate(solver.b.tolist())) + ")",
    )
    return text + _network(artifact) if carries else text


def _usage(artifact: ThetaArtifact) -> str:
    assert artifact.schedule is not None
    whole = artifact.schedule.share is not None
    usage = USAGE.format(
        call="net(x, torch.full((len(x),), t))",
        prediction=WORDS[str(artifact.prediction)],
        takes=" (a whole one)" if whole else "",
    )
    return usage + (GUIDED if artifact.guidance_scale != 1 else "")


def _network(artifact: ThetaArtifact) -> str:
    """The part of the file that samples with the network itself."""
    schedule, prediction = artifact.schedule, str(artifact.prediction)
    assert schedule is not None
    direct = prediction == "velocity" and _is_direct(schedule)
    tables = {"NETWORK_TIMES": schedule.time, "SCALE": schedule.scale}
    if not direct:
        tables |= {"ALPHA": schedule.alpha, "SIGMA": schedule.sigma}
        tables |= {"D_ALPHA": schedule.path_d_alpha, "D_SIGMA": schedule.path_d_sigma}
    if prediction == "velocity" and not direct:
        tables |= {"NATIVE_D_ALPHA": schedule.d_alpha, "NATIVE_D_SIGMA": schedule.d_sigma}
    if schedule.time_above is not None and schedule.share is not None:
        tables |= {"TIMES_ABOVE": schedule.time_above, "SHARE": schedule.share}
    return "\n" + NETWORK.format(
        prediction=prediction,
        tables="".join(f"{name} = {_tuple(column)}\n" for name, column in tables.items()),
        formula="    return output\n" if direct else _formula(prediction),
        forwards="" if schedule.share is None else "twice ",
        interpolation="" if schedule.share is None else INTERPOLATION,
    )


def _is_direct(schedule: NetworkSchedule) -> bool:
    """Whether the network's own path is that of the velocity."""
    own = (schedule.d_alpha, schedule.d_sigma) == (schedule.path_d_alpha, schedule.path_d_sigma)
    return own and set(schedule.scale) == {1.0}


def _formula(prediction: str) -> str:
    data, noise = FORMULAS[prediction]
    lines = ["y = x / SCALE[k]"]
    if prediction == "velocity":
        lines.append("determinant = SIGMA[k] * NATIVE_D_ALPHA[k] - ALPHA[k] * NATIVE_D_SIGMA[k]")
    lines += [f"data = {data}", f"noise = {noise}", "return D_ALPHA[k] * data + D_SIGMA[k] * noise"]
    return "".join(f"    {line}\n" for line in lines)


def _belongs(artifact: ThetaArtifact) -> str:
    if artifact.guidance_range is not None:
        guided = "guided at guidance_scale, in GUIDANCE_RANGE"
    else:
        guided = "without guidance" if artifact.guidance_scale == 1 else "guided at GUIDANCE_SCALE"
    path = "on the path named SCHEDULER" if artifact.scheduler else "on the path that the solver was distilled for"
    return f"It must be the velocity of the model MODEL_DIGEST, {guided}, {path};\nwith any other, samples are wrong."


def _tuple(values: Iterable[float]) -> str:
    """A tuple literal that reads back to exactly the same float64 values."""
    return "(" + "".join(f"{value!r}, " for value in values).rstrip() + ")"


def _pairs(pairs: Iterable[tuple[float, ...]]) -> str:
    """A tuple literal of the values of each number at the two ends of a range."""
    return "(" + "".join(f"{_tuple(pair)}, " for pair in pairs).rstrip() + ")"


EXPORTER = PythonFile
