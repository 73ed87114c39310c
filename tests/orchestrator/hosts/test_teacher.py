"""The examination of teachers: sane ones pass, corrupted ones are named, within the budget."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from closed_form import Mixture

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import bench_teacher
from corruptions import CORRUPTIONS, changed, with_predict

from orchestrator.hosts.teacher.detectors import DETECTORS, findings, readings
from orchestrator.hosts.teacher.evidence import Evidence
from orchestrator.hosts.teacher.probe import BUDGET, Probe, batch_size
from orchestrator.models.zoo.adapter import zoo_names
from orchestrator.storage import Storage
from solvers.schedulers import EDM, VP, Cosine
from solvers.schedulers.discrete_vp import DiscreteVP, linear_betas

FAST = ["digits_fm_ot", "digits_eps_vp", "digits_fm_v_cs"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in zoo_names() if name not in FAST]
SQUARE = [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]


def random(count: int, dimensions: int, scale: float) -> torch.Tensor:
    return scale * torch.randn(count, dimensions, generator=torch.Generator().manual_seed(3))


SANE = {
    "numbers": Mixture([[-1.0], [1.0]], 0.3, (1,)),
    "one Gaussian number": Mixture([[0.0]], 1.0, (1,), VP(), "epsilon", data_range=6),
    "numbers off centre": Mixture([[3.0]], 0.5, (1,), data_range=2.5),
    "points": Mixture(SQUARE, 0.2, (2,), data_range=3),
    "points by label": Mixture(SQUARE, 0.2, (2,), labelled=True, data_range=3),
    "points from steps": Mixture(
        SQUARE, 0.2, (2,), DiscreteVP(betas=tuple(linear_betas(count=400))), "epsilon", data_range=3
    ),
    "points, EDM": Mixture(SQUARE, 0.2, (2,), EDM(), "sample", data_range=3),
    "small points": Mixture([[0.0, 0.0]], 0.1, (2,), data_range=0.6),
    "white sequences": Mixture(torch.zeros(1, 96), 1.0, (12, 8), data_range=6),
    "sequences": Mixture(random(5, 96, 1.0), 0.5, (12, 8), data_range=6),
    "sequences on a plane": Mixture(random(5, 3, 4.0), 0.5, (12, 8)),
    "sequences on a plane, vp": Mixture(random(5, 3, 4.0), 0.5, (12, 8), VP(), "epsilon"),
    "images on a line": Mixture([[4.0], [-4.0]], 0.3, (1, 8, 8)),
    "twenty images": Mixture(random(20, 64, 0.7), 0.02, (1, 8, 8), Cosine(), "v_prediction"),
    "sets of points by label": Mixture(random(4, 60, 1.0), 0.3, (20, 3), labelled=True),
}


def examine(model: Mixture, scale: float = 1.0, tolerance: float = 1e-6, mask: torch.Tensor | None = None) -> Evidence:
    count = batch_size(int(torch.tensor(model.shape).prod()))
    labels = torch.arange(count) % 4 if model.labelled else torch.zeros(count, dtype=torch.int64)
    return Probe(model, labels, scale, 2, tolerance, tolerance, mask).run()


@pytest.mark.parametrize("name", [*FAST, *SLOW])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_models_of_the_zoo_are_sane(name: str, scale: float) -> None:
    """Nothing is found, with guidance or without; each number is within two thirds of its limit for refusal."""
    evidence = bench_teacher.examine(*bench_teacher.load(name), scale)
    assert findings(evidence) == []
    for detector in DETECTORS:
        value = detector.value(evidence)
        if value is not None and detector.refused:
            assert value < detector.refused * 2 / 3 + 0.01, detector.name
    assert evidence.evaluations <= BUDGET
    assert evidence.forwards <= 2 * 16 * BUDGET


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        (FAST[0], 1.0),
        *(pytest.param(name, 1.0, marks=pytest.mark.slow) for name in (*FAST[1:], "cifar10_gray16_fm_ot")),
        *(pytest.param(name, 3.0, marks=pytest.mark.slow) for name in FAST),
    ],
)
def test_corruptions_are_named(name: str, scale: float) -> None:
    """At least nine of ten are, within the budget. The larger models take minutes: benchmarks/bench_teacher.py."""
    model, condition = bench_teacher.load(name)
    silent = []
    for corruption, corrupt in CORRUPTIONS.items():
        torch.manual_seed(0)
        evidence = bench_teacher.examine(corrupt(model), condition, scale)
        assert evidence.evaluations <= BUDGET
        if not findings(evidence):
            silent.append(corruption)
    assert len(silent) <= len(CORRUPTIONS) // 10, silent


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name in SANE for scale in ((1.0, 3.0) if SANE[name].labelled else (1.0,))]
)
def test_exact_denoisers_are_sane(name: str, scale: float) -> None:
    """Mixtures of Gaussians of any shape and rank, under every kind of schedule and prediction."""
    model = SANE[name]
    evidence = examine(model, scale)
    assert [finding for finding in findings(evidence) if finding.name != "data range"] == []
    assert evidence.evaluations <= BUDGET


EXPECTED = {
    "sign of the output": "bias",
    "time reversed": "denoising",
    "time ignored": "time",
    "time in steps of 0.01": "stairs",
    "other scheduler": "bias",
    "data range halved": "data range",
    "dropout on": "random",
    "one-step student": "student",
    "condition ignored": "condition",
}


@pytest.mark.parametrize("corruption", EXPECTED)
def test_the_right_detector_names_a_corruption(corruption: str) -> None:
    """Its sentence says what is wrong, and what to do."""
    model, condition = bench_teacher.load("digits_fm_ot")
    torch.manual_seed(0)
    found = {one.name: one for one in findings(bench_teacher.examine(CORRUPTIONS[corruption](model), condition, 1.0))}
    assert EXPECTED[corruption] in found
    assert found[EXPECTED[corruption]].sentence
    assert found[EXPECTED[corruption]].remedy


def test_a_velocity_that_is_not_finite_ends_the_examination() -> None:
    """What was measured before is kept; the time is named."""
    model, condition = bench_teacher.load("digits_fm_ot")
    broken = with_predict(lambda predict, x, t, c: predict(x, t, c) / (t < 0.6))(model)
    evidence = bench_teacher.examine(broken, condition, 1.0)
    (finding,) = [one for one in findings(evidence) if one.name == "not finite"]
    assert finding.severity == "refused"
    assert evidence.not_finite is not None
    assert 0.6 <= evidence.not_finite < 0.7
    assert evidence.evaluations < 50


def test_samples_that_depend_on_their_batch_are_named() -> None:
    """The mean over the batch stands for batch normalisation in training mode."""
    model, condition = bench_teacher.load("digits_fm_ot")
    batch = with_predict(lambda predict, x, t, c: predict(x, t, c) - predict(x, t, c).mean(0))(model)
    assert findings(bench_teacher.examine(batch, condition, 1.0))[0].name == "batch"


def test_guidance_without_effect_is_named() -> None:
    """Labels that the network ignores make guidance cost twice as much for nothing."""
    model, condition = bench_teacher.load("digits_fm_ot")
    names = {one.name for one in findings(bench_teacher.examine(CORRUPTIONS["condition ignored"](model), condition, 3))}
    assert names == {"condition", "guidance"}


def test_a_start_far_from_noise_is_named() -> None:
    """A policy whose last noise level keeps most of the data."""
    model = Mixture(SQUARE, 0.2, (2,), VP(t_min=0.5), "epsilon", data_range=3)
    assert "start" in {finding.name for finding in findings(examine(model))}


def test_a_loose_tolerance_is_named() -> None:
    """Ground truth that moves by more than a thousandth of the data range."""
    assert "ground truth" in {finding.name for finding in findings(examine(SANE["points"], tolerance=0.05))}


def test_a_network_that_takes_the_scale_itself_is_noted_at_most() -> None:
    """It predicts no mean even without guidance, so that only its trajectories can refuse it."""
    model, condition = bench_teacher.load("digits_fm_ot")
    guided = changed(CORRUPTIONS["output halved"](model), forwards_per_evaluation=lambda scale: 1)
    found = findings(bench_teacher.examine(guided, condition, 3.0))
    assert found
    assert {finding.severity for finding in found} == {"noted"}


@pytest.mark.parametrize("shape", [(16, 12, 8), (16, 12, 1), (1, 12, 8)])
def test_entries_that_do_not_count_may_run_off(shape: tuple[int, ...]) -> None:
    """Those that the dataset's mask leaves out, whether it differs between samples or is the same for all."""
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.6).expand(16, *shape[1:])
    runaway = with_predict(lambda predict, x, t, c: torch.where(mask[: len(x)], predict(x, t, c), 4 * x))
    model = runaway(SANE["white sequences"])
    assert "divergence" in {finding.name for finding in findings(examine(model))}
    assert findings(examine(model, mask=mask)) == []


@pytest.mark.parametrize(("factor", "named"), [(1.05, False), (0.5, True)])
def test_noise_that_is_off_by_little_is_no_bias(factor: float, named: bool) -> None:
    """Where there is little signal, the data that it implies are off by their own size."""
    model = with_predict(lambda predict, x, t, c: factor * predict(x, t, c))(SANE["sequences on a plane, vp"])
    evidence = examine(model)
    assert max(level.removable for level in evidence.levels) > 0.2
    assert ("bias" in {finding.name for finding in findings(evidence)}) == named


def test_evidence_survives_json() -> None:
    """Stored evidence gives the same findings."""
    evidence = examine(SANE["points by label"], 3.0)
    again = Evidence.from_dict(json.loads(json.dumps(evidence.to_dict())))
    assert again == evidence
    assert readings(again) == readings(evidence)
    assert dataclasses.replace(again, not_finite=0.5) != evidence


def test_evidence_that_is_not_finite_survives_storage(storage: Storage) -> None:
    """JSON has no infinity; a ground truth that fails at the tolerance is measured as infinitely far off."""
    evidence = Evidence(
        guidance_scale=1.0, samples=16, dimensions=2, data_range=2.0, truth_error=math.inf, end=math.nan
    )
    storage.write_json("evidence.json", evidence.to_dict())
    again = Evidence.from_dict(storage.read_json("evidence.json"))
    assert again.truth_error == math.inf
    assert again.end is not None
    assert math.isnan(again.end)
    assert "ground truth" in {finding.name for finding in findings(again)}
