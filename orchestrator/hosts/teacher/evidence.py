"""What the examination of a teacher measures: numbers only, so that they can be sent, stored and read again."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

FORMAT = 2
"""Incremented whenever the same teacher would yield other numbers; part of the key of stored evidence."""


@dataclass(frozen=True, kw_only=True)
class Knot:
    """A trajectory of the batch at one time. All means are over samples and those of their entries that count.

    Attributes:
        t, alpha, sigma: Time and path of the velocity field.
        state: RMS of x_t.
        expected: RMS of alpha x1 + sigma eps with the final samples x1 and noise eps that is independent of them.
        velocity: RMS of the velocity.
        noise: RMS of the noise that the velocity implies.
        prediction: Variance over samples of the data that the velocity implies.
    """

    t: float
    alpha: float
    sigma: float
    state: float
    expected: float
    velocity: float
    noise: float
    prediction: float


@dataclass(frozen=True, kw_only=True)
class Level:
    """The network as a denoiser of its own samples x1, at x_t = alpha x1 + sigma eps with fresh noise.

    The last three are lower bounds: what chance explains is subtracted.

    Attributes:
        t: Time.
        signal: Signal-to-noise ratio alpha s / sigma, where s is the samples' spread.
        error: Mean squared error of the denoised samples, as a share of that of the best linear denoiser that knows
            the mean and the spread of the samples. At most about 1 for a denoiser.
        removable: Share of the error that a linear correction of the output, from the output and x_t, would remove.
            0 for a posterior mean, whose error is uncorrelated with both.
        surplus: Variance of the denoised samples that is not explained by the samples, as a share of the samples'
            variance. 0 for a posterior mean; large if details are invented.
    """

    t: float
    signal: float
    error: float
    removable: float
    surplus: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Measurements of a teacher at one guidance scale and with one source of conditions.

    Numbers that could not be measured are None, such as all that follow a velocity that is not finite.

    Attributes:
        guidance_scale: Guidance scale.
        samples: Samples per batch.
        dimensions: Numbers per sample.
        data_range: Declared data range.
        precise: Whether the network's weights have at least 32 bits.
        is_denoiser: Whether the network without guidance is trained as a denoiser; false if it takes the scale itself.
        batch_change: Relative change of a velocity when another sample of its batch changes.
        repeat_change: Relative change of a velocity when it is computed again.
        not_finite: Time at which a velocity was not finite; None if all were finite.
        knots: The trajectories without guidance.
        guided: The trajectories with guidance; empty if there is none.
        lowest, low, high, highest: Quantiles 0, 0.01, 0.99 and 1 of all numbers of the final samples.
        end: RMS of the final samples.
        spread: RMS deviation of the final samples from their mean.
        start: Signal-to-noise ratio alpha s / n where sampling starts from n x0 (n is sigma, or start_scale), with
            s the RMS of the samples.
        foresight: Correlation of the data that the first velocity implies with the final samples, over their means.
        levels: The network as a denoiser of its own samples.
        time_effect: Largest relative change of the network's output with the time.
        time_response: Native times, and the relative change of the output per whole domain of time there.
        stairs: Share of the looked-at times near which the output does not change with time, though it does further on.
        condition_effect: Relative change of the output when samples exchange their conditions, by name of the
            condition; empty if all conditions were equal.
        guidance_effect: Relative change of the velocity by guidance; None without.
        truth_error: RMS difference of final samples at the configured tolerance from those at a tenth of it, as a
            share of the data range.
        truth_evaluations: Velocity evaluations that the configured tolerance takes; None if too many.
        evaluations: Evaluations spent, each of a batch of ``samples``; smaller batches count by their share.
        forwards: Passes of the network spent, each of one sample.
        seconds: Wall time.
    """

    guidance_scale: float
    samples: int
    dimensions: int
    data_range: float
    precise: bool = True
    is_denoiser: bool = True
    batch_change: float | None = None
    repeat_change: float | None = None
    not_finite: float | None = None
    knots: tuple[Knot, ...] = ()
    guided: tuple[Knot, ...] = ()
    lowest: float | None = None
    low: float | None = None
    high: float | None = None
    highest: float | None = None
    end: float | None = None
    spread: float | None = None
    start: float | None = None
    foresight: float | None = None
    levels: tuple[Level, ...] = ()
    time_effect: float | None = None
    time_response: tuple[tuple[float, float], ...] = ()
    stairs: float | None = None
    condition_effect: dict[str, float] = field(default_factory=dict)
    guidance_effect: float | None = None
    truth_error: float | None = None
    truth_evaluations: int | None = None
    evaluations: float = 0.0
    forwards: int = 0
    seconds: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the inverse is :meth:`from_dict`."""
        content: dict[str, Any] = _as_json(dataclasses.asdict(self))
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Evidence:
        """Evidence from :meth:`to_dict`.

        Raises:
            KeyError, TypeError: The content is not evidence.
        """
        content = _from_json(content)
        lists: dict[str, Any] = {name: tuple(Knot(**knot) for knot in content[name]) for name in ("knots", "guided")}
        lists |= {"levels": tuple(Level(**level) for level in content["levels"])}
        lists |= {"time_response": tuple((t, change) for t, change in content["time_response"])}
        return cls(**content | lists)


def _as_json(value: Any) -> Any:
    """``value`` with numbers that are not finite, which JSON does not have, as texts such as 'inf'."""
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    """The inverse of :func:`_as_json`; evidence holds no other texts."""
    if isinstance(value, dict):
        return {key: _from_json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_from_json(part) for part in value]
    return float(value) if isinstance(value, str) else value
