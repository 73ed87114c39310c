"""A distillation of large samples keeps within its memory and its budget."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_memory_is_bounded_and_evaluations_are_those_of_the_budget(repository: Path, tmp_path: Path) -> None:
    """50,000 dimensions and 0.1 GB for a distillation step: no request to the host takes twice as much. The examination
    of the teacher once held all states of its trajectories, five times as much as everything else."""
    arguments = "--dimensions 50000 --duration 0 --nfe 4 --budget 5000 --memory-gb 0.1"
    command = [sys.executable, str(repository / "benchmarks" / "bench_half_second.py"), *arguments.split()]
    # Freed tensors go back to the system, so that the peak is that of what is in use.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    shown = subprocess.run(
        [*command, "--results", str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    evaluations = re.search(r"for ([\d,]+) velocity evaluations", shown)
    assert evaluations is not None
    assert 2000 < int(evaluations[1].replace(",", "")) <= 1.05 * 5000
    requests = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in shown.splitlines() if row.startswith("| ")}
    assert {"examine", "choose_steps", "make_shard", "normal_equations", "loss"} <= requests.keys()
    assert 20 < float(requests["all"][-1].strip("| ")) < 200
