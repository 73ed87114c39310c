"""Detectors of faulty teachers. Each reads one number of the evidence and compares it with its limits.

Limits were chosen on the zoo, at guidance 1 and 3, and widened for the networks of ``tests/support/kinds``.
``benchmarks/bench_teacher.py`` prints all numbers of the zoo, and which detector names which corruption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from orchestrator.hosts.teacher.evidence import Evidence, Knot, Level
from orchestrator.hosts.teacher.findings import Detector, Finding, Reading, Severity

LOW_SIGNAL = 0.25
"""Levels of less signal show nearly nothing of the sample; what a denoiser adds there is its own."""


class _OfMean(Detector):
    """Only notes a network that takes the guidance scale itself: its output is not a mean, even at scale 1."""

    def severity(self, value: float, evidence: Evidence) -> Severity | None:
        severity = super().severity(value, evidence)
        return severity if evidence.is_denoiser or severity is None else "noted"


class NotFinite(Detector):
    """Whether a velocity was not finite. One is enough: pairs would end there."""

    name = "not finite"
    quantity = "velocities that are not finite"
    refused = 0
    remedy = (
        "check its weights, the options that describe it (prediction, native_scheduler, time), its dtype (float16 "
        "ends at 65504) and its conditioning"
    )

    def value(self, evidence: Evidence) -> float | None:
        return 0 if evidence.not_finite is None else 1

    def sentence(self, value: float, evidence: Evidence) -> str:
        return f"the velocity is not finite at t={evidence.not_finite:.4g}"


class Company(Detector):
    """How a velocity changes with the other samples of its batch; rounding is below 1e-4 (3e-2 in half precision)."""

    name = "batch"
    quantity = "change of a velocity with the rest of its batch"
    refused = 1e-4
    remedy = (
        "export the network in evaluation mode: batch normalisation in training mode is the likely cause, as in a "
        "TorchScript that was traced before net.eval() (hosts refuse it even with --force)"
    )

    def value(self, evidence: Evidence) -> float | None:
        return None if _is_random(evidence) else evidence.batch_change

    def severity(self, value: float, evidence: Evidence) -> Severity | None:
        return "refused" if value > _rounding(evidence) else None

    def sentence(self, value: float, evidence: Evidence) -> str:
        return f"the velocity of a sample depends on the other samples of its batch: it changes by {value:.2g}"


class Random(Detector):
    """How a velocity changes when it is computed again; rounding as for :class:`Company`."""

    name = "random"
    quantity = "change of a velocity when it is repeated"
    refused = 1e-4
    remedy = (
        "switch dropout off: call net.eval() before exporting, or F.dropout with training=self.training (hosts refuse "
        "it even with --force)"
    )

    def value(self, evidence: Evidence) -> float | None:
        return evidence.repeat_change

    def severity(self, value: float, evidence: Evidence) -> Severity | None:
        return "refused" if value > _rounding(evidence) else None

    def sentence(self, value: float, evidence: Evidence) -> str:
        return f"the network is not deterministic: the same input gives velocities that differ by {value:.2g}"


class Divergence(Detector):
    """Size of the samples against the declared data. Samples of the zoo are 0.5 to 0.9 of half the range."""

    name = "divergence"
    quantity = "RMS of the samples, in half data ranges"
    refused = 8.0
    remedy = (
        "check the sign and the kind of the prediction, the schedule and the guidance scale; if the data are that "
        "large, set data_range"
    )

    def value(self, evidence: Evidence) -> float | None:
        return None if evidence.end is None else evidence.end / (evidence.data_range / 2)

    def sentence(self, value: float, evidence: Evidence) -> str:
        return (
            f"trajectories diverge: the samples' RMS is {evidence.end:.4g}, but the declared data range is "
            f"{evidence.data_range:g}"
        )


class DataRange(Detector):
    """Range of the samples against the declared one, to which every PSNR is relative.

    A range is too small if the samples' quantiles 0.01 and 0.99 are further apart: networks overshoot (by up to 1.4 in
    the zoo). It is too large if all samples lie within less.
    """

    name = "data range"
    quantity = "range of the samples / data_range"
    noted: ClassVar[float] = 1.65
    least: ClassVar[float] = 0.75
    remedy = "set data_range to the largest minus the smallest value of the data: every PSNR is relative to it"

    def value(self, evidence: Evidence) -> float | None:
        if evidence.samples * evidence.dimensions < 256 or evidence.lowest is None:
            return None
        (lowest, low, high, highest), declared = self._ends(evidence), evidence.data_range
        whole = (highest - lowest) / declared
        return whole if whole < self.least else max((high - low) / declared, self.least)

    @staticmethod
    def _ends(evidence: Evidence) -> tuple[float, float, float, float]:
        ends = (evidence.lowest, evidence.low, evidence.high, evidence.highest)
        lowest, low, high, highest = (math.nan if end is None else end for end in ends)
        return lowest, low, high, highest

    def sentence(self, value: float, evidence: Evidence) -> str:
        lowest, low, high, highest = self._ends(evidence)
        ends = (lowest, highest) if value < self.least else (low, high)
        return (
            f"the numbers of the samples lie from {ends[0]:.3g} to {ends[1]:.3g}, which is {value:.2g} of the declared "
            f"data range {evidence.data_range:g}"
        )


class Collapse(Detector):
    """Whether samples of different noise differ at all."""

    name = "collapse"
    quantity = "spread of the samples / their RMS"
    least = 1e-3
    remedy = "check the prediction and the schedule; if the conditions determine the sample, nothing is wrong"

    def value(self, evidence: Evidence) -> float | None:
        if evidence.end is None or evidence.spread is None:
            return None
        return evidence.spread / max(evidence.end, 1e-30)

    def sentence(self, value: float, evidence: Evidence) -> str:
        return "all samples are the same, whatever noise they start from"


class Start(Detector):
    """What is left of the data where sampling starts from noise alone. Stable Diffusion has 0.07."""

    name = "start"
    quantity = "signal / noise where sampling starts"
    noted, refused = 0.2, 1.0
    remedy = (
        "start earlier (t_min of the scheduler, or the schedule's last betas), or from the noise that the authors "
        "start from: start_scale of the scheduler, 1 for x0 itself"
    )

    def value(self, evidence: Evidence) -> float | None:
        return evidence.start

    def sentence(self, value: float, evidence: Evidence) -> str:
        first = evidence.knots[0]
        return (
            f"sampling starts from noise alone at t={first.t:.3g}, but there the network expects data in it: alpha is "
            f"{first.alpha:.3g}, sigma {first.sigma:.3g}, and signal / noise {value:.2g}"
        )


class Denoising(_OfMean):
    """Whether the network denoises its own samples better than the best linear denoiser, which is optimal for white
    Gaussian data only. The zoo has 0.1 to 0.8; 1 is reached by such data."""

    name = "denoising"
    quantity = "error as a denoiser / error of the best linear one"
    noted, refused = 1.2, 1.5
    remedy = "check prediction, native_scheduler, time (direction, scale) and the scale of the input"

    def value(self, evidence: Evidence) -> float | None:
        worst = _worst(evidence.levels, "error")
        return None if worst is None else worst.error

    def sentence(self, value: float, evidence: Evidence) -> str:
        worst = _worst(evidence.levels, "error")
        assert worst is not None
        return (
            f"the network denoises its own samples worse than a straight line: at t={worst.t:.3g} its error is "
            f"{value:.2g} times that of the best linear denoiser"
        )


class Bias(_OfMean):
    """Share of the denoising error that a linear correction would remove. It is 0 for a network trained by squared
    error, whatever the data; the zoo has at most 0.07, from imperfect training. Levels where the correction is small in
    noise or in data are left out: a condition may leave hardly any error, and noise that is off by a few per cent is,
    where there is little signal, data that are off by all of it."""

    name = "bias"
    quantity = "share of the error that a linear correction removes"
    noted, refused = 0.12, 0.2
    remedy = (
        "the network expects another noise level or scale than it gets: check native_scheduler, time (direction, "
        "scale), prediction and the scale of the input"
    )

    LEAST = 0.1  # RMS of a correction that matters, as a share of the noise's and of the samples' spread

    def value(self, evidence: Evidence) -> float | None:
        worst = _worst(self._levels(evidence), "removable")
        return (0.0 if evidence.levels else None) if worst is None else worst.removable

    def _levels(self, evidence: Evidence) -> list[Level]:
        """Those where the correction matters; ``share`` is that of the spread's square, or the noise's if less."""
        share = lambda level: level.removable * level.error * min(level.signal**2, 1) / (1 + level.signal**2)  # noqa: E731
        return [level for level in evidence.levels if share(level) >= self.LEAST**2]

    def sentence(self, value: float, evidence: Evidence) -> str:
        worst = _worst(self._levels(evidence), "removable")
        assert worst is not None
        return (
            f"{value:.0%} of the error that the network makes as a denoiser of its own samples, at t={worst.t:.3g}, is "
            f"a linear function of its input and output, which training would have removed"
        )


class Student(Detector):
    """Details that the network adds at levels where the noise hides them. A teacher returns a mean there, a one-step
    student a sample: 0.16 and more of the data's variance, against 0.05 in the zoo and 0.1 of a network that was
    trained for seconds. What tells a student from a poor network is that its first prediction is nearly the sample:
    others are noted at most, such as a noise prediction that was trained too briefly for the noisiest levels."""

    name = "student"
    quantity = "invented variance / variance of the samples"
    noted = 0.17
    remedy = "distil its teacher instead; a few Euler steps sample a one-step student or a straightened flow"

    SURE, FORESIGHT = 0.12, 0.85
    """Limit of refusal for a network whose first prediction has at least this correlation with the sample."""

    def value(self, evidence: Evidence) -> float | None:
        low = [level.surplus for level in evidence.levels if level.signal < LOW_SIGNAL]
        return sum(low) / len(low) if low else None

    def severity(self, value: float, evidence: Evidence) -> Severity | None:
        if self._foresees(evidence) and value > self.SURE:
            return "refused" if evidence.is_denoiser else "noted"
        return super().severity(value, evidence)

    def _foresees(self, evidence: Evidence) -> bool:
        return evidence.foresight is not None and evidence.foresight > self.FORESIGHT

    def sentence(self, value: float, evidence: Evidence) -> str:
        teacher = "a teacher predicts a mean there, if it is trained long enough"
        what = "it looks like a one-step student" if self._foresees(evidence) else teacher
        return (
            f"from noise that hides the sample the network paints details of its own, {value:.0%} of the data's "
            f"variance: {what} (its first prediction has a correlation of {evidence.foresight:.2f} with the sample)"
        )


class ImpliedNoise(_OfMean):
    """RMS of the noise that the network implies on its trajectories. That of a mean is at most the noise's, 1. Where
    hardly any noise is left, a velocity says little about it, and these times are left out."""

    name = "implied noise"
    quantity = "largest RMS of the implied noise"
    noted, refused = 1.3, 1.6
    remedy = "check prediction, native_scheduler and time"

    MOST_SIGNAL = 8.0
    """Signal-to-noise ratio alpha s / sigma up to which times count."""

    def value(self, evidence: Evidence) -> float | None:
        worst = self._worst(evidence)
        return None if worst is None else worst.noise

    def _worst(self, evidence: Evidence) -> Knot | None:
        spread = evidence.spread or 0.0
        noisy = [knot for knot in evidence.knots if knot.alpha * spread <= self.MOST_SIGNAL * knot.sigma]
        return max(noisy, key=lambda knot: knot.noise, default=None)

    def sentence(self, value: float, evidence: Evidence) -> str:
        worst = self._worst(evidence)
        assert worst is not None
        return f"at t={worst.t:.3g} the network implies noise of RMS {value:.3g}, but the noise has 1"


class Marginal(_OfMean):
    """How far the size of states on the trajectories is from that of noised samples; 8% in the zoo."""

    name = "path"
    quantity = "size of states against noised samples, as a factor"
    noted, refused = 1.2, 1.6
    remedy = (
        "check native_scheduler and time; if only the first steps leave the path, start where more of the data is left "
        "(t_min of the scheduler): predicted noise is divided by alpha"
    )

    def value(self, evidence: Evidence) -> float | None:
        return max((self._factor(knot.state, knot.expected) for knot in evidence.knots), default=None)

    @staticmethod
    def _factor(state: float, expected: float) -> float:
        return max(state, expected) / max(min(state, expected), 1e-30)

    def sentence(self, value: float, evidence: Evidence) -> str:
        worst = max(evidence.knots, key=lambda knot: self._factor(knot.state, knot.expected))
        return (
            f"at t={worst.t:.3g} the states have RMS {worst.state:.3g}, but the schedule's path to their own ends has "
            f"{worst.expected:.3g} there"
        )


class TimeEffect(Detector):
    """How the network's output changes with its time at all; 0.4 and more in the zoo."""

    name = "time"
    quantity = "largest change of the output with its time"
    least = 1e-2
    remedy = "check that 'call' passes the time, and its scale ('time_scale')"

    def value(self, evidence: Evidence) -> float | None:
        return evidence.time_effect

    def sentence(self, value: float, evidence: Evidence) -> str:
        return f"the time has hardly any effect on the network: its output changes by {value:.2g} at most"


class Stairs(Detector):
    """Whether the output stays the same over a ten-thousandth of the domain, though it changes over a fiftieth."""

    name = "stairs"
    quantity = "share of times around which the output is constant"
    refused = 0.3
    remedy = (
        "declare integer timesteps if the network looks its time up in a table, or pass the time as a fraction and in "
        "float32: adaptive ground truth cannot follow a velocity that jumps"
    )

    def value(self, evidence: Evidence) -> float | None:
        return evidence.stairs

    def sentence(self, value: float, evidence: Evidence) -> str:
        return "the network's time works in stairs: its output does not change between neighbouring times, then jumps"


class ConditionEffect(Detector):
    """How the network's output changes when samples exchange their conditions; 0.1 and more in the zoo."""

    name = "condition"
    quantity = "change of the output with the conditions"
    least = 1e-3
    remedy = "check that 'call' passes the condition, and that the dataset is the one of the network"

    def value(self, evidence: Evidence) -> float | None:
        return min(evidence.condition_effect.values(), default=None)

    def sentence(self, value: float, evidence: Evidence) -> str:
        name = min(evidence.condition_effect, key=lambda name: evidence.condition_effect[name])
        which = "the condition" if name == "condition" else f"the condition {name!r}"
        return f"{which} has no effect: exchanged between samples, it changes the output by {value:.2g}"


class GuidanceEffect(Detector):
    """How guidance changes the velocity; 0.1 and more in the zoo."""

    name = "guidance"
    quantity = "change of the velocity by guidance"
    least = 1e-3
    remedy = "check the null condition, or leave guidance out: it takes two passes of the network per evaluation"

    def value(self, evidence: Evidence) -> float | None:
        return evidence.guidance_effect

    def sentence(self, value: float, evidence: Evidence) -> str:
        return f"guidance {evidence.guidance_scale:g} has no effect: it changes the velocity by {value:.2g}"


class Truth(Detector):
    """How far ground truth moves under a tighter tolerance. Distilled solvers reach 40 to 60 dB: 1e-3 of the range is
    60 dB, 1e-2 is 40 dB."""

    name = "ground truth"
    quantity = "change at a tenth of the tolerance / data_range"
    noted, refused = 1e-3, 1e-2
    remedy = "tighten pairs.rtol and pairs.atol, e.g. to 1e-7"

    def value(self, evidence: Evidence) -> float | None:
        return evidence.truth_error

    def sentence(self, value: float, evidence: Evidence) -> str:
        db = "no accuracy at all" if math.isinf(value) else f"{-20 * math.log10(value):.0f} dB"
        return f"ground truth moves by {value:.2g} of the data range at a tenth of its tolerance ({db})"


DETECTORS: tuple[Detector, ...] = (
    NotFinite(),
    Random(),
    Company(),
    Stairs(),
    TimeEffect(),
    Denoising(),
    Bias(),
    Student(),
    ImpliedNoise(),
    Marginal(),
    Start(),
    Divergence(),
    Collapse(),
    DataRange(),
    ConditionEffect(),
    GuidanceEffect(),
    Truth(),
)


def readings(evidence: Evidence) -> list[Reading]:
    """What every detector reads, in order."""
    return [detector.read(evidence) for detector in DETECTORS]


def findings(evidence: Evidence) -> list[Finding]:
    """What is wrong, refusals first."""
    found = [reading.finding for reading in readings(evidence) if reading.finding is not None]
    return sorted(found, key=lambda finding: finding.severity != "refused")


def _worst(levels: Sequence[Level], attribute: str) -> Level | None:
    return max(levels, key=lambda level: float(getattr(level, attribute)), default=None)


def _rounding(evidence: Evidence) -> float:
    return 1e-4 if evidence.precise else 3e-2


def _is_random(evidence: Evidence) -> bool:
    return evidence.repeat_change is not None and evidence.repeat_change > _rounding(evidence)
