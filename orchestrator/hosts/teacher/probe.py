"""Measures a teacher: short trajectories of a batch, and the network as a denoiser of its own samples.

For a denoiser trained by squared error, x1-hat(x_t) = E[x1 | x_t]. Three facts follow for samples that are noised again
with fresh noise, whatever the data: no linear estimator is better; the error is uncorrelated with the output and with
x_t; and the output varies no more than the samples explain. They hold for the network without guidance. Nearly
everything that can be wrong with a description (sign, schedule, time, scale, prediction) breaks one of them.

All statistics leave out the entries that the dataset's mask leaves out: the network was not trained on them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orchestrator.hosts.network_check import measure_network
from orchestrator.hosts.teacher.evidence import Evidence, Knot, Level
from orchestrator.models.base import ModelAdapter
from orchestrator.pairs.conditions import Condition, Conditions
from orchestrator.pairs.ground_truth import NotFiniteError, solve
from orchestrator.randomness import noise
from solvers.field import VelocityField
from solvers.losses import counted
from solvers.prediction import endpoints_from_velocity

BUDGET = 200
"""Most evaluations of an examination, each of one batch."""

SAMPLES_PER_BATCH = 16
"""Samples of a batch, if a sample has at least 64 numbers."""

NUMBERS, MOST = 1024, 256
"""Smaller samples come in larger batches, of so many numbers and at most so many samples: statistics need numbers, and
a network of few inputs takes little time for many samples."""

STEPS = {"plain": 40, "guided": 30}
"""Steps of the trajectories, one evaluation each."""

SIGNALS = (0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0)
"""Signal-to-noise ratios alpha s / sigma at which the network denoises its own samples."""

TRUTH_SHARE = 16
"""One sample in so many has its ground truth made twice."""

CHANCE, CHANCE_SQUARE = 2.0, 6.0
"""Standard errors by which a mean must exceed what chance explains, and expectations by which a share of squares must:
of two terms, six expectations are as rare as 0.3%."""

DISTINCT = 0.02
"""Least spread of the samples, as a share of their RMS, at which they are denoised: short trajectories end up to a
hundredth of the data beside it."""

BASES, NEAR, FAR = (0.2, 0.4, 0.6, 0.8), 1e-4, 0.02
"""Shares of the native domain at which the network's time is looked at, and the shares by which it is moved there."""

QUANTILES = 2**20
"""Most numbers from which quantiles of the final samples are taken."""

NOISE_FLOOR = 1e-5
"""Changes of an output below this may be rounding."""


class _NotFiniteVelocityError(Exception):
    """A velocity is not finite."""


class _SpentError(Exception):
    """The budget is spent."""


def batch_size(dimensions: int) -> int:
    """Samples of an examination's batch, for samples of so many numbers."""
    return max(SAMPLES_PER_BATCH, min(MOST, NUMBERS // dimensions))


@dataclass
class _Meter:
    """Counts evaluations and refuses velocities that are not finite.

    Attributes:
        samples: Samples of a whole batch.
        spent: Evaluations, in batches.
        forwards: Passes of the network, each of one sample.
        not_finite: Time of the first velocity that was not finite.
    """

    samples: int
    spent: float = 0.0
    forwards: int = 0
    not_finite: float | None = None

    def count(self, samples: int, forwards: int) -> None:
        self.spent += samples / self.samples
        self.forwards += samples * forwards


class _Metered:
    """A velocity field whose evaluations are counted; see :class:`_Meter`."""

    def __init__(self, field: VelocityField, meter: _Meter, forwards: int, limit: float = math.inf):
        self.field, self.meter, self.forwards, self.limit = field, meter, forwards, limit
        self.scheduler = field.scheduler

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.meter.spent + len(x) / self.meter.samples > self.limit:
            raise _SpentError
        self.meter.count(len(x), self.forwards)
        velocity = self.field(x, t)
        if not bool(torch.isfinite(velocity).all()):
            self.meter.not_finite = float(t)
            raise _NotFiniteVelocityError
        return velocity


class _Trajectory(NamedTuple):
    """Trajectories of a batch: their knots, the final samples, and the data that the first velocity implies."""

    knots: tuple[Knot, ...]
    x1: Tensor
    first: Tensor


class Probe:
    """Measures one teacher. Nothing is trained and nothing is stored.

    Args:
        model: The model.
        condition: Conditions of a batch of :func:`batch_size` samples, on the model's device.
        guidance_scale: Guidance scale.
        seed: Seed of the noise, (seed, i) for sample i.
        rtol, atol: Tolerances of ground truth.
        mask: Which entries count, bool, (B, ...) broadcastable to the samples; None: all.
    """

    def __init__(
        self,
        model: ModelAdapter,
        condition: Condition,
        guidance_scale: float,
        seed: int,
        rtol: float,
        atol: float,
        mask: Tensor | None = None,
    ):
        self.model, self.condition, self.scale = model, condition, guidance_scale
        self.seed, self.rtol, self.atol = seed, rtol, atol
        self.samples, self.mask = len(condition), mask
        self.meter = _Meter(self.samples)

    def run(self) -> Evidence:
        """Measure everything that can be measured."""
        model, begin = self.model, time.monotonic()
        evidence = Evidence(
            guidance_scale=self.scale,
            samples=self.samples,
            dimensions=math.prod(model.shape),
            data_range=model.data_range,
            precise=model.network_dtype in (torch.float32, torch.float64),
            is_denoiser=self.scale == 1 or model.forwards_per_evaluation(self.scale) > 1,
        )
        with torch.no_grad():
            for measure in (self._network, self._paths, self._time, self._conditions, self._truth):
                try:
                    evidence = measure(evidence)
                except _NotFiniteVelocityError:
                    break
        return replace(
            evidence,
            not_finite=self.meter.not_finite,
            evaluations=self.meter.spent,
            forwards=self.meter.forwards,
            seconds=time.monotonic() - begin,
        )

    # ---- parts of the examination -----------------------------------------------------------------------------

    def _network(self, evidence: Evidence) -> Evidence:
        """Whether a velocity is a function of the sample, its time and its condition."""
        change = measure_network(self.model.shape, lambda c: self._field(self.scale, condition=c), self.condition)
        return replace(evidence, batch_change=change.batch, repeat_change=change.repeat)

    def _paths(self, evidence: Evidence) -> Evidence:
        """Trajectories, the final samples, and the network as a denoiser of them."""
        field = self._field(1.0)
        plain = self._trajectory(field, STEPS["plain"])
        x1, begun = plain.x1, float(field.scheduler.start(field.scheduler.t_min))
        mean, size = self._mean(x1), self._rms(x1)
        deviation, foreseen = counted(x1 - mean, self.mask), counted(plain.first - self._mean(plain.first), self.mask)
        spread = math.sqrt(self._variance(x1))
        evidence = replace(
            evidence,
            knots=plain.knots,
            spread=spread,
            start=plain.knots[0].alpha * size / begun,
            foresight=float((deviation * foreseen).mean()) / max(_rms(deviation) * _rms(foreseen), 1e-30),
            **self._summary(x1),
        )
        if spread > DISTINCT * size:
            evidence = replace(evidence, levels=self._levels(x1, mean, spread))
        if self.scale == 1:
            return evidence
        guided = self._trajectory(self._field(self.scale), STEPS["guided"])
        x = self._noise(self.samples)
        t = torch.tensor(0.5 * (guided.knots[0].t + guided.knots[-1].t), dtype=torch.float64)
        unguided, with_guidance = self._field(1.0)(x, t), self._field(self.scale)(x, t)
        return replace(
            evidence,
            guided=guided.knots,
            guidance_effect=_change(counted(unguided, self.mask), counted(with_guidance, self.mask)),
            **self._summary(guided.x1),
        )

    def _levels(self, x1: Tensor, mean: Tensor, spread: float) -> tuple[Level, ...]:
        """Denoise the samples at several levels of fresh noise, without guidance."""
        field = self._field(1.0)
        scheduler = field.scheduler
        levels = []
        for number, signal in enumerate(SIGNALS, 1):
            t = scheduler.time_at_angle(torch.tensor(math.atan(signal / spread), dtype=torch.float64))
            if not scheduler.t_min <= float(t) <= scheduler.t_max:
                continue
            point = scheduler(t)
            alpha, sigma = float(point.alpha), float(point.sigma)
            x = alpha * x1 + sigma * self._noise(self.samples, number)
            data = endpoints_from_velocity(field(x, t), x, point).data
            residual, output, sample, state = (
                counted(values, self.mask) for values in (x1 - data, data - mean, x1 - mean, x - alpha * mean)
            )
            linear = spread**2 * sigma**2 / (alpha**2 * spread**2 + sigma**2)
            levels.append(
                Level(
                    t=float(t),
                    signal=signal,
                    error=_at_least(residual.square()) / linear,
                    removable=_explained(residual, [output, state]),
                    surplus=_at_least(output * (output - sample)) / spread**2,
                )
            )
        return tuple(levels)

    def _time(self, evidence: Evidence) -> Evidence:
        """How the network's output changes with its time, near and far."""
        native = self.model.native
        length = native.t_max - native.t_min
        flat, far = 0, []
        response = []
        for share in BASES:
            base = native.t_min + share * length
            x = self._noised(base)
            here, near, there = (self._output(x, base + move * length) for move in (0.0, NEAR, FAR))
            far.append(_change(here, there))
            response.append((base, far[-1] / FAR))
            # A smooth output changes at least so much that a hundredth of the linear share is well above rounding.
            linear = far[-1] * NEAR / FAR
            flat += linear > NOISE_FLOOR and _change(here, near) < 0.01 * linear
        x = self._noised(native.t_min + 0.5 * length)
        ends = [self._output(x, native.t_min + share * length) for share in (0.3, 0.7)]
        stairs = flat / len(BASES) if evidence.precise else None
        return replace(evidence, time_effect=max(*far, _change(*ends)), time_response=tuple(response), stairs=stairs)

    def _conditions(self, evidence: Evidence) -> Evidence:
        """How the network's output changes when samples exchange their conditions."""
        base = self.model.native.t_min + 0.5 * (self.model.native.t_max - self.model.native.t_min)
        x = self._noised(base)
        effects = {}
        here = self._output(x, base)
        for name, exchanged, differs in _exchanged(self.condition):
            there = self._output(x, base, exchanged)
            effects[name] = _change(here[differs], there[differs])
        return replace(evidence, condition_effect=effects)

    def _truth(self, evidence: Evidence) -> Evidence:
        """Ground truth of a few samples at the configured tolerance, and at a tenth of it."""
        few = torch.arange(self.samples // TRUTH_SHARE, device=self._device)
        x0 = self._noise(len(few))
        field = self._field(self.scale, condition=self.condition[few], limit=BUDGET)
        try:
            truth = solve(field, x0, self.rtol, self.atol)
        except _SpentError:
            return evidence
        except NotFiniteError:
            return replace(evidence, truth_error=math.inf)
        evidence = replace(evidence, truth_evaluations=truth.nfe)
        try:
            tighter = solve(field, x0, self.rtol / 10, self.atol / 10)
        except (_SpentError, NotFiniteError):
            return evidence
        mask = None if self.mask is None else self.mask[few]
        return replace(evidence, truth_error=_rms(counted(truth.x1 - tighter.x1, mask)) / self.model.data_range)

    # ---- the network ------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.condition.device
        return device

    def _field(self, scale: float, *, condition: Condition | None = None, limit: float = math.inf) -> VelocityField:
        """The metered velocity field of the whole batch, or of these conditions."""
        field = self.model.field(self.condition if condition is None else condition, scale)
        return _Metered(field, self.meter, self.model.forwards_per_evaluation(scale), limit)

    def _noise(self, count: int, stream: int = 0) -> Tensor:
        """Noise (count, ...), float64. Stream 0 is the noise that training pairs start from."""
        first = stream * MOST
        values = noise(self.seed, range(first, first + count), self.model.shape)
        return torch.from_numpy(values).to(self._device).double()

    def _noised(self, t: float) -> Tensor:
        """Noise of the size of states at this native time, where the data is taken to have the spread 1."""
        point = self.model.native(t)
        return math.hypot(float(point.alpha), float(point.sigma)) * self._noise(self.samples)

    def _output(self, x: Tensor, t: float, condition: Condition | None = None) -> Tensor:
        """The network's own output at a native time, without guidance; 0 where entries do not count."""
        self.meter.count(len(x), 1)
        condition = self.condition if condition is None else condition
        output = self.model.predict(x.clone(), torch.tensor(t, dtype=torch.float64), condition.clone())
        if not bool(torch.isfinite(output).all()):
            self.meter.not_finite = t
            raise _NotFiniteVelocityError
        return counted(output.double().clone(), self.mask)

    def _trajectory(self, field: VelocityField, steps: int) -> _Trajectory:
        """Trajectories by DPM-Solver++(2M), whose last step ends in the data that the network predicts.

        The steps are shortest at both ends: data that lie on a plane are reached only there.
        """
        scheduler = field.scheduler
        ends = [float(scheduler.angle(t)) for t in (scheduler.t_min, scheduler.t_max)]
        shares = (1 - torch.cos(torch.linspace(0, math.pi, steps + 1, dtype=torch.float64))) / 2
        times = scheduler.time_at_angle(ends[0] + (ends[1] - ends[0]) * shares)
        times = times.clamp(scheduler.t_min, scheduler.t_max)
        times[0], times[-1] = scheduler.t_min, scheduler.t_max
        x = float(scheduler.start(scheduler.t_min)) * self._noise(self.samples)
        knots, lambdas = [], scheduler.lambda_(times)
        first = previous = x
        for step in range(steps):
            point, after = scheduler(times[step]), scheduler(times[step + 1])
            velocity = field(x, times[step])
            data, implied = endpoints_from_velocity(velocity, x, point)
            predicted = data
            first = data if step == 0 else first
            knots.append(
                Knot(
                    t=float(times[step]),
                    alpha=float(point.alpha),
                    sigma=float(point.sigma),
                    state=self._rms(x),
                    expected=math.nan,
                    velocity=self._rms(velocity),
                    noise=self._rms(implied),
                    prediction=self._variance(data),
                )
            )
            if 2 <= step < steps - 1:
                last, h = lambdas[step] - lambdas[step - 1], lambdas[step + 1] - lambdas[step]
                data = data + float(h / last / 2) * (data - previous)
            previous = predicted
            kept = float(after.sigma / point.sigma)
            x = kept * x + (float(after.alpha) - kept * float(point.alpha)) * data
        end = self._rms(x)
        return _Trajectory(
            tuple(replace(knot, expected=math.hypot(knot.alpha * end, knot.sigma)) for knot in knots),
            x,
            first,
        )

    # ---- statistics of the entries that count -----------------------------------------------------------------

    def _rms(self, values: Tensor) -> float:
        return _rms(counted(values, self.mask))

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over the batch (B, ...), of each entry over the samples in which it counts."""
        if self.mask is None:
            return values.mean(0)
        kept = self.mask.expand_as(values)
        return torch.where(kept, values, 0.0).sum(0) / kept.sum(0).clamp_min(1)

    def _variance(self, values: Tensor) -> float:
        """Variance over the batch (B, ...), as a mean over entries."""
        deviation = counted(values - self._mean(values), self.mask)
        return float(deviation.square().mean()) * len(values) / (len(values) - 1)

    def _summary(self, x1: Tensor) -> dict[str, Any]:
        """Size of the final samples."""
        kept = x1.flatten() if self.mask is None else x1[self.mask.expand_as(x1)]
        low, high = torch.quantile(
            kept[:: -(-len(kept) // QUANTILES)], torch.tensor([0.01, 0.99], dtype=x1.dtype, device=x1.device)
        )
        ends = {"lowest": float(kept.min()), "low": float(low), "high": float(high), "highest": float(kept.max())}
        return ends | {"end": self._rms(x1)}


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _change(first: Tensor, second: Tensor) -> float:
    """RMS of the difference as a share of the first's RMS."""
    return _rms(second - first) / max(_rms(first), 1e-30)


def _at_least(values: Tensor) -> float:
    """Mean of the values (B, ...), less :data:`CHANCE` standard errors over the samples."""
    means = values.flatten(1).mean(dim=1)
    return float(means.mean() - CHANCE * means.std() / math.sqrt(len(means)))


def _explained(target: Tensor, terms: list[Tensor]) -> float:
    """Share of the target's square that the best linear combination of the terms explains, less that of chance.

    Chance is estimated from the differences between samples, since the numbers of one sample may depend on each other:
    data on a line have one degree of freedom per sample.
    """
    y, columns = target.flatten(1), torch.stack([term.flatten(1) for term in terms], dim=2)
    scores = torch.einsum("bnk,bn->bk", columns, y)
    inverse = torch.linalg.pinv(torch.einsum("bnk,bnl->kl", columns, columns), hermitian=True)
    total, score = float(y.square().sum()), scores.sum(0)
    if total == 0:
        return 0.0
    chance = len(scores) * torch.trace(inverse @ torch.cov(scores.T))
    return float(score @ inverse @ score - CHANCE_SQUARE * chance) / total


def _exchanged(condition: Condition) -> list[tuple[str, Condition, Tensor]]:
    """For each tensor of the conditions: its name, the conditions with it exchanged between samples, and a mask.

    The mask says which samples get another one. Tensors that are equal for all samples are left out.
    """
    tensors = condition.tensors if isinstance(condition, Conditions) else {"condition": condition}
    results: list[tuple[str, Condition, Tensor]] = []
    for name, tensor in tensors.items():
        rows = torch.arange(len(tensor), device=tensor.device)
        orders = [torch.roll(rows, shift) for shift in range(1, len(rows))]
        others = [(tensor[order] != tensor).reshape(len(rows), -1).any(dim=1) for order in orders]
        best = max(range(len(orders)), key=lambda number: int(others[number].sum()))
        if bool(others[best].any()):
            exchanged = tensor[orders[best]]
            whole = condition.replaced({name: exchanged}) if isinstance(condition, Conditions) else exchanged
            results.append((name, whole, others[best]))
    return results
