"""Interleaved timing of alternatives: machines are noisy, so only ratios from one run are reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(alternatives: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each alternative, taken in turns so that drift of the machine hits all alike."""
    for run in alternatives.values():
        run()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, medians: Mapping[str, float], baseline: str) -> None:
    """Print medians and their ratio to the baseline."""
    print(title)
    for name, value in medians.items():
        print(f"  {name:<40} {value * 1e3:9.2f} ms   {value / medians[baseline]:6.3f} x")
