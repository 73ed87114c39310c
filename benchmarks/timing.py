"""Interleaved timing of alternatives. Machines are noisy, so only ratios from one run are reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleaved_rounds(
    alternatives: Mapping[str, Callable[[], object]], rounds: int, tick: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each alternative in every round. They take turns, so that drift of the machine affects all alike.

    Args:
        alternatives: Functions to time, by name; each runs once before the first round to warm up.
        rounds: Runs of each.
        tick: Called after every run, including the warm-up, outside the timed part.
    """
    for run in alternatives.values():
        run()
        tick()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
            tick()
    return seconds


def interleaved(alternatives: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each alternative over :func:`interleaved_rounds`."""
    return {name: statistics.median(values) for name, values in interleaved_rounds(alternatives, rounds).items()}


def paired_ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median over rounds of ``of / to``. A slow round of the machine affects both and cancels."""
    return statistics.median(one / other for one, other in zip(of, to, strict=True))


def report(title: str, medians: Mapping[str, float], baseline: str) -> None:
    """Print medians and their ratio to the baseline."""
    print(title)
    for name, value in medians.items():
        print(f"  {name:<40} {value * 1e3:9.2f} ms   {value / medians[baseline]:6.3f} x")
