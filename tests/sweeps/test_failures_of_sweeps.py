"""Whole sweeps that cannot work, or work too well: one attempt, one line per cause, no traceback."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from command_place import Place

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

NETWORK = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        {built}
    def forward(self, x, t):
        {body}
"""


def _place(folder: Path, body: str, built: str = "pass", **changes: Any) -> Place:
    """A small experiment on a network with this code."""
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(NETWORK.format(body=body, built=built), encoding="utf-8")
    options = {"factory": "net:Net", "path": str(folder), "shape": [1, 2, 3]}
    options |= {"prediction": "velocity", "native_scheduler": "cond_ot"}
    pairs = {"train": 16, "validation": 64, "test": 16, "batch_size": 16, "shard_size": 16, "rtol": 1e-5, "atol": 1e-5}
    experiment = {
        "name": "tiny",
        "model": {"name": "torch_module", "options": options},
        "conditioning": {"name": "labels", "options": {"classes": 1}},
        "pairs": pairs,
        "nfe": [2],
        "fixed": ["euler", "midpoint"],
        "grid_search": {"p": [1.0], "q": [1.0], "also": [], "pairs": 16},
        "learned": [
            {"family": "bns", "method": "levenberg_marquardt", "iterations": 2, "validate_every": 1, "batch_size": 16},
            {"family": "bns", "learning_rate": [1e-3], "iterations": 2, "validate_every": 1, "batch_size": 16},
        ],
        "resources": {"hosts": 1, "host_cpus": 0.5, "trial_cpus": 0.25, "local_cpus": 2},
    }
    return Place(folder, experiment | changes)


def _sweep(place: Place, *options: str) -> tuple[int, str]:
    # None of these networks was trained, so their examination refuses them.
    process = place.start("sweep", "tiny.yaml", "--force", *options)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def test_points_that_cannot_work_are_a_line_each(tmp_path: Path) -> None:
    """Ground truth stays where the network is finite; two steps of Euler do not."""
    body = (
        "return torch.where(x.abs() > 4.5, x * float('nan'), "
        "-6 * x + torch.tanh(self.layer(x.flatten(1))).view(x.shape))"
    )
    place = _place(tmp_path, body)
    code, output = _sweep(place)
    assert code == 1
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("failed: ")]
    points = [line for line in lines if "common grid" in line]
    assert [line.split(":")[1] for line in points] == [" Euler nfe2 common grid", " Midpoint nfe2 common grid"]
    assert all("gives validation samples that are not finite" in line for line in points)
    assert len(lines) == 4, "two distillations have no start"
    log = place.root / "experiments/tiny/sweep.log"
    assert f"details: {log}" in output
    assert log.read_text(encoding="utf-8").count(" ERROR bespoke: ") == 4, "one attempt per point"


@pytest.mark.parametrize(
    ("body", "built", "message"),
    [
        (
            "return self.layer(x)",
            "pass",
            r"network Net failed: {place}/net.py, line 11, in forward: RuntimeError: mat1 .*; it was called with x "
            r"float32 \(4, 1, 2, 3\), time float32 \(4,\), label int64 \(4,\)",
        ),
        ("return x", "raise KeyError('licence')", r".*{place}/net.py, line 9, in __init__: KeyError: 'licence'.*"),
    ],
    ids=["forward", "factory"],
)
def test_an_error_of_a_network_is_told_once_and_soon(tmp_path: Path, body: str, built: str, message: str) -> None:
    """Without a retry, and without the advice to run the same command again."""
    place = _place(tmp_path, body, built)
    begin = time.monotonic()
    code, output = _sweep(place)
    assert code == 2, output
    *stages, line = output.strip().splitlines()
    assert re.fullmatch("error: " + message.replace("{place}", re.escape(str(tmp_path))), line), line
    assert not [stage for stage in stages if "Error" in stage or "net.py" in stage]
    assert time.monotonic() - begin < 120


def test_an_exact_solver_is_a_result(tmp_path: Path) -> None:
    """The last layer of a fresh DiT is zero: the velocity is 0, and every solver is exact, learned ones as well."""
    built = "nn.init.zeros_(self.layer.weight); nn.init.zeros_(self.layer.bias)"
    place = _place(tmp_path, "return self.layer(x.flatten(1)).view(x.shape)", built)
    code, output = _sweep(place)
    assert code == 0, output
    assert output.count("∞") == 6 + 1  # six scores, and the accuracy of ground truth itself
    rows = json.loads(place.run("compare", "tiny", "--json"))
    assert {row["psnr_db"] for row in rows} == {300.0}
    report = (place.root / "experiments/tiny/report.html").read_text(encoding="utf-8")
    assert "∞" in report
    theta = next((place.root / "experiments/tiny/thetas").glob("*.json"))
    scored = place.run("evaluate", str(theta), "--config", "tiny.yaml", "--json")
    values = json.loads(scored[scored.index("[") :])
    assert {row["value"] for row in values if row["metric"] == "psnr_db" and row["kind"] != "ground truth"} == {300.0}
    assert "∞" in place.run("evaluate", str(theta), "--config", "tiny.yaml")
