"""Evaluation of solvers on datasets by metrics: nothing is measured twice, and failures are reported."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from s3_server import S3Server

from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import ConfigError, PoolError
from orchestrator.evaluation.cases import Case, Score
from orchestrator.evaluation.run import Evaluation
from orchestrator.evaluation.solvers import EvaluatedSolver
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.scorer import Scorer
from orchestrator.hosts.settings import HostSettings, ScorerSettings
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pool.requests import LocalPool, Outcome, Pool, Request
from orchestrator.results.scoring import evaluate
from orchestrator.storage import Storage
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.ns import NSSolver


class RecordingPool(Pool):
    """A pool that records its requests, and that may stop after some of them or refuse some."""

    def __init__(self, pool: LocalPool, breaks_after: int | None = None, refuses: Any = None):
        self.pool, self.breaks_after, self.refuses = pool, breaks_after, refuses
        self.requests: list[Request] = []

    def map(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        def recorded() -> Iterator[Request]:
            for request in requests:
                if self.breaks_after is not None and len(self.requests) == self.breaks_after:
                    raise KeyboardInterrupt
                self.requests.append(request)
                yield request

        for outcome in self.pool.map(recorded()):
            if self.refuses is not None and self.refuses(self.requests[-1]):
                yield Outcome(outcome.index, None, PoolError("set aside by the test"))
            else:
                yield outcome


@pytest.fixture
def hosts(copied: Storage) -> RecordingPool:
    """A host on a copy of the pairs of the small experiment."""
    return RecordingPool(
        LocalPool(Host(HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=copied.root)))
    )


@pytest.fixture
def scorers(copied: Storage) -> RecordingPool:
    """A scorer on the same storage, whose batch size does not divide a shard."""
    return RecordingPool(LocalPool(Scorer(ScorerSettings(storage=copied.root, batch_size=7))))


@pytest.fixture
def pairs(specs: dict[PairKey, PairSpec]) -> PairSpec:
    """The spec of the 40 test pairs, in shards of 16."""
    return specs[PairKey("test", 1.0, 0)]


@pytest.fixture
def midpoint(facts: ModelFacts) -> NSSolver:
    return GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler)


def _theta(solver: NSSolver, title: str = "Midpoint") -> EvaluatedSolver:
    return EvaluatedSolver(kind="theta", name=title, guidance_scale=1.0, ns=solver)


TRUTH = EvaluatedSolver(kind="ground truth", name="Ground truth", guidance_scale=1.0)


def _scores(evaluation: Evaluation, pairs: PairSpec) -> dict[tuple[str, str], Score]:
    evaluation.measure()
    scores = evaluation.scores({pairs.name: 100.0})
    return {(s.case.solver.name, s.metric.metric.column): s for s in scores}


def _evaluation(
    storage: Storage,
    hosts: Pool,
    scorers: Pool | None,
    pairs: PairSpec,
    solvers: Sequence[EvaluatedSolver],
    metrics: Sequence[Any],
) -> Evaluation:
    cases = [Case(solver=solver, dataset="labels", pairs=pairs) for solver in solvers]
    return Evaluation(
        storage, hosts, scorers, cases, [m if isinstance(m, MetricSpec) else MetricSpec(m) for m in metrics]
    )


def test_scores_agree_with_those_of_a_sweep(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver
) -> None:
    """Measured by shards or on all pairs at once, the means agree up to the rounding of the network's batches."""
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", "snr", "rmse"]), pairs)
    for column, summary in evaluate(hosts.pool, midpoint, pairs.name, ["psnr", "snr", "rmse"]).items():
        assert scores["Midpoint", column].summary.mean == pytest.approx(summary["mean"], rel=1e-5)
        assert scores["Midpoint", column].summary.count == 40


def test_a_scorer_sees_every_sample_once(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """Scores measured through shards of media equal those measured on the samples themselves."""
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint), TRUTH], [brightness]), pairs)
    samples = hosts.pool.call(
        Request.of(HostProtocol.sample, theta=midpoint.flat().numpy(), pairs=pairs.name, indices=range(40))
    )
    assert scores["Midpoint", "brightness"].summary.mean == pytest.approx(float(samples.mean()), abs=1e-6)
    truth = PairStore(copied, pairs).load().x1
    assert scores["Ground truth", "brightness"].summary.mean == pytest.approx(float(truth.mean()), abs=1e-6)
    assert not copied.names("measurements/media/" + f"{pairs.name}-{_theta(midpoint).digest}"), "media are deleted"


def test_nothing_is_measured_twice(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """Measuring again sends no requests. Another metric measured by hosts sends none to scorers."""

    def count_requests(*metrics: Any) -> tuple[int, int]:
        hosts.requests.clear()
        scorers.requests.clear()
        _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], metrics), pairs)
        return len(hosts.requests), len(scorers.requests)

    assert count_requests("psnr", brightness) == (3, 3)
    assert count_requests("psnr", brightness) == (0, 0)
    assert count_requests("psnr", "snr", brightness) == (3, 0)
    assert count_requests("psnr", brightness, "rmse") == (3, 0)


def test_a_theta_with_two_names_is_measured_once(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """It still has two rows in the table."""
    solvers = [_theta(midpoint), _theta(midpoint, "its twin")]
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, solvers, [brightness]), pairs)
    assert (len(hosts.requests), len(scorers.requests)) == (3, 3)
    assert scores["Midpoint", "brightness"].summary == scores["its twin", "brightness"].summary


@pytest.mark.parametrize("breaks", ["hosts", "scorers"])
def test_an_interrupted_evaluation_is_resumed(
    copied: Storage,
    hosts: RecordingPool,
    scorers: RecordingPool,
    pairs: PairSpec,
    midpoint: NSSolver,
    brightness: str,
    breaks: str,
) -> None:
    """After hosts or scorers stop at two shards, the same call measures the rest and gives the same scores."""
    solvers = [_theta(midpoint), TRUTH]
    pools = {"hosts": hosts, "scorers": scorers}
    pools[breaks] = RecordingPool(pools[breaks].pool, breaks_after=2)
    with pytest.raises(KeyboardInterrupt):
        _evaluation(copied, pools["hosts"], pools["scorers"], pairs, solvers, ["psnr", brightness]).measure()
    scorers.requests.clear()
    resumed = _scores(_evaluation(copied, hosts, scorers, pairs, solvers, ["psnr", brightness]), pairs)
    assert 1 <= len(scorers.requests) < 6
    expected = evaluate(hosts.pool, midpoint, pairs.name, ["psnr"])["psnr_db"]["mean"]
    assert resumed["Midpoint", "psnr_db"].summary.mean == pytest.approx(expected, rel=1e-5)
    assert resumed["Ground truth", "brightness"].summary.count == 40


def _measured(storage: Storage, folder: str = "measurements") -> dict[str, bytes]:
    """Every file of measurements, by storage key."""
    files: dict[str, bytes] = {}
    for name in storage.names(folder):
        key = f"{folder}/{name}"
        if name.endswith(".safetensors"):
            files[key] = storage.read(key)
        else:
            files |= _measured(storage, key)
    return files


def test_measurements_on_an_s3_that_fails_one_request_in_twenty_equal_those_on_a_directory(
    copied: Storage,
    copied_to_s3: Storage,
    s3_server: S3Server,
    hosts: RecordingPool,
    scorers: RecordingPool,
    pairs: PairSpec,
    midpoint: NSSolver,
    brightness: str,
) -> None:
    """The run is interrupted and resumed. Files are equal byte for byte, and no partial files or media are left."""
    solvers, metrics = [_theta(midpoint), TRUTH], ["psnr", brightness]
    local_scores = _scores(_evaluation(copied, hosts, scorers, pairs, solvers, metrics), pairs)
    chance, failed = random.Random(0), [0]

    def fault(request: dict[str, Any]) -> bool:
        failing = chance.random() < 0.05
        failed[0] += failing
        return failing

    s3_server.fault = fault
    settings = HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=copied_to_s3.root)
    s3_hosts = LocalPool(Host(settings))
    s3_scorers = LocalPool(Scorer(ScorerSettings(storage=copied_to_s3.root, batch_size=7)))
    interrupted = RecordingPool(s3_hosts, breaks_after=2)
    with pytest.raises(KeyboardInterrupt):
        _evaluation(copied_to_s3, interrupted, s3_scorers, pairs, solvers, metrics).measure()
    s3_scores = _scores(_evaluation(copied_to_s3, s3_hosts, s3_scorers, pairs, solvers, metrics), pairs)
    s3_server.fault = None
    assert failed[0] > 0
    assert {key: score.summary for key, score in s3_scores.items()} == {
        key: score.summary for key, score in local_scores.items()
    }
    assert _measured(copied_to_s3) == _measured(copied)
    media = "measurements/media"
    assert not [name for folder in copied_to_s3.names(media) for name in copied_to_s3.names(f"{media}/{folder}")]


def test_samples_that_are_not_finite_are_counted_and_named(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """A solver diverges on some noise: those samples are left out of the means and are not passed to a network."""
    diverging = NSSolver(midpoint.times, midpoint.a, midpoint.b)
    evaluation = _evaluation(copied, _PoolWithTwoNaNs(hosts), scorers, pairs, [_theta(diverging)], ["psnr", brightness])
    scores = _scores(evaluation, pairs)
    for column in ("psnr_db", "brightness"):
        score = scores["Midpoint", column]
        assert (score.summary.count, score.summary.not_finite) == (38, 2)
        assert math.isfinite(score.summary.mean)
        assert score.not_finite == (3, 17)


class _PoolWithTwoNaNs(Pool):
    """A pool whose host makes samples 3 and 17 NaN, as a solver that diverges on them would."""

    def __init__(self, hosts: RecordingPool):
        self.hosts = hosts
        host = hosts.pool.host
        sample = host._sample

        def spoiled(theta: Any, pairs: Any, spec: Any) -> torch.Tensor:
            samples = sample(theta, pairs, spec)
            for index in (3, 17):
                noise = torch.from_numpy(_noise_of(spec, index))
                samples[(pairs.x0 == noise).flatten(1).all(1)] = math.nan
            return samples

        host._sample = spoiled

    def map(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        return self.hosts.map(requests)


def _noise_of(spec: PairSpec, index: int) -> Any:
    from orchestrator.randomness import noise

    return noise(spec.seed, [index], spec.shape)


def test_a_metric_that_cannot_be_measured_does_not_affect_the_others(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """If scorers fail on a shard, their metric has the reason instead of a value, and PSNR is still measured."""
    scorers.refuses = lambda request: request.arguments["first"] == 16
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", brightness]), pairs)
    assert math.isfinite(scores["Midpoint", "psnr_db"].summary.mean)
    assert scores["Midpoint", "brightness"].failure == "set aside by the test"
    assert math.isnan(scores["Midpoint", "brightness"].summary.mean)


def test_ground_truth_has_exact_scores_against_itself(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec
) -> None:
    """Metrics that compare with ground truth are exact by definition and not computed. NFE is that of the pairs."""
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, [TRUTH], ["psnr", "rmse"]), pairs)
    assert scores["Ground truth", "psnr_db"].summary.mean == math.inf
    assert scores["Ground truth", "rmse"].summary.mean == 0
    assert scores["Ground truth", "rmse"].nfe == 100


def test_options_of_a_metric_are_part_of_its_identity(brightness: str) -> None:
    """Measurements with another offset are kept apart, and those with equal options are reused."""
    plain, shifted = MetricSpec(brightness), MetricSpec(brightness, {"offset": 1.0})
    assert plain.identity != shifted.identity
    assert shifted.identity == MetricSpec(brightness, {"offset": 1.0}).identity


def test_per_sample_values_are_in_the_order_of_the_pairs(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver
) -> None:
    """The bootstrap compares solvers pair by pair."""
    evaluation = _evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr"])
    evaluation.measure()
    direct = hosts.pool.call(
        Request.of(HostProtocol.score, theta=midpoint.flat().numpy(), pairs=pairs.name, metrics=["psnr"])
    )["psnr"]
    np.testing.assert_allclose(
        evaluation.per_sample(evaluation.cases[0], evaluation.metrics[0])[:, 0], direct, rtol=1e-4
    )


def test_a_shard_without_a_finite_sample_is_counted_and_not_measured(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """A solver diverges everywhere: every sample is counted, none is passed to a network, and there is no value."""
    diverging = NSSolver.from_flat(midpoint.flat())
    hosts.pool.host._sample = lambda theta, pairs, spec: torch.full_like(pairs.x0, math.nan)
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(diverging)], ["psnr", brightness]), pairs)
    for column in ("psnr_db", "brightness"):
        score = scores["Midpoint", column]
        assert (score.summary.count, score.summary.not_finite) == (0, 40)
        assert math.isnan(score.summary.mean)
        assert score.not_finite == tuple(range(10))


def test_a_damaged_measurement_is_reported_and_measured_again(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver
) -> None:
    """The metric has no value in this call. The next call measures it again and gives the original value."""
    evaluation = _evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", "snr"])
    intact = _scores(evaluation, pairs)
    copied.write(evaluation._measured(evaluation.cases[0], evaluation.metrics[0]).key(1), b"no measurement")
    damaged = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", "snr"]), pairs)
    assert "is damaged: " in str(damaged["Midpoint", "psnr_db"].failure)
    assert damaged["Midpoint", "snr_db"].summary == intact["Midpoint", "snr_db"].summary
    again = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", "snr"]), pairs)
    assert again["Midpoint", "psnr_db"].summary == intact["Midpoint", "psnr_db"].summary


def test_images_are_measured_on_the_range_of_the_data(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """Metrics of images see data in [0, 1] as images in [-1, 1], and not what was measured on another range."""
    plain = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], [brightness]), pairs)
    model = hosts.pool.host.model  # type: ignore[attr-defined]
    model.data_min, model.data_max = 0, 1
    evaluation = _evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], [brightness])
    evaluation.shown = model.shown_range
    rescaled = _scores(evaluation, pairs)
    before, after = (scores["Midpoint", "brightness"].summary.mean for scores in (plain, rescaled))
    assert after == pytest.approx(2 * before - 1, abs=1e-6)
    again = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], [brightness]), pairs)
    assert again["Midpoint", "brightness"].summary.mean == before


def test_a_distance_to_ground_truth_of_the_same_pairs_measures_it(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """Also if ground truth has no row; raw samples and images for scorers come from one pass of the solver."""
    metrics = ["sliced_wasserstein", brightness]
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], metrics), pairs)
    assert len(hosts.requests) == 6  # three shards, of theta and of ground truth
    score = scores["Midpoint", "sliced_wasserstein[raw]"]
    assert score.reference == "ground truth of the same pairs"
    x1 = PairStore.open(copied, pairs.name).load().x1.flatten(1).double().numpy()
    request = Request.of(
        HostProtocol.sample, theta=midpoint.flat().numpy(), pairs=pairs.name, indices=range(pairs.count)
    )
    samples = hosts.pool.call(request).reshape(40, -1)
    expected = score.metric.metric.summarise([samples], Evaluation.dataset(pairs), [x1])
    assert score.summary.mean == pytest.approx(expected.mean, rel=1e-4)
    assert 0 < score.summary.stderr < score.summary.mean
    hosts.requests.clear()
    with_truth = _evaluation(copied, hosts, scorers, pairs, [_theta(midpoint), TRUTH], metrics[:1])
    exact = _scores(with_truth, pairs)["Ground truth", "sliced_wasserstein[raw]"]
    assert not hosts.requests
    assert (exact.summary.mean, exact.is_exact) == (0, True)


def test_ground_truth_that_cannot_be_measured_leaves_distances_to_it_without_a_value(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver
) -> None:
    """The reason names it."""
    scorers.refuses = lambda request: "ground-truth" in request.arguments["media"]
    scores = _scores(
        _evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", "sliced_wasserstein"]), pairs
    )
    assert scores["Midpoint", "sliced_wasserstein[raw]"].failure == "ground truth: set aside by the test"
    assert math.isfinite(scores["Midpoint", "psnr_db"].summary.mean)


def test_the_error_of_every_coordinate_is_measured_on_hosts(
    copied: Storage, hosts: RecordingPool, pairs: PairSpec, midpoint: NSSolver
) -> None:
    """With groups of rows of a digit, without scorers; the mean of squares is that of RMSE."""
    groups = {"upper": [0, 1, 2, 3], "lower": [4, 5, 6, 7]}
    spec = MetricSpec("coordinate_rmse", {"axis": 1, "groups": groups})
    scores = _scores(_evaluation(copied, hosts, None, pairs, [_theta(midpoint)], [spec, "rmse"]), pairs)
    summary: Any = scores["Midpoint", "coordinate_rmse[axis 1, groups]"].summary
    (upper, lower) = (value for _, value, _ in summary.parts)
    assert [name for name, _, _ in summary.parts] == ["upper", "lower"]
    rmse = hosts.pool.call(
        Request.of(HostProtocol.score, theta=midpoint.flat().numpy(), pairs=pairs.name, metrics=["rmse"])
    )["rmse"]
    assert (upper**2 + lower**2) / 2 == pytest.approx(np.mean(rmse**2), rel=1e-4)


def test_real_images_of_another_size_are_refused_before_any_is_measured(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, tmp_path: Path
) -> None:
    """The message has both sizes and the option to set."""
    evaluation = _evaluation_against_pictures(copied, hosts, scorers, pairs, midpoint, tmp_path, side=6)
    with pytest.raises(ConfigError, match=r"shape \(1, 8, 8\) with real images of 'image_folder' of shape \(1, 6, 6\)"):
        evaluation.check_forms()
    assert not scorers.requests


def test_real_samples_that_cannot_be_measured_affect_one_metric(
    copied: Storage, hosts: RecordingPool, scorers: RecordingPool, pairs: PairSpec, midpoint: NSSolver, tmp_path: Path
) -> None:
    """The other metrics keep their values."""
    evaluation = _evaluation_against_pictures(copied, hosts, scorers, pairs, midpoint, tmp_path, side=8)
    evaluation.check_forms()
    scorers.refuses = lambda request: request.method == "measure_real"
    scores = _scores(evaluation, pairs)
    assert scores["Midpoint", "fid[digits_cnn]"].failure == "real samples: set aside by the test"
    assert math.isfinite(scores["Midpoint", "psnr_db"].summary.mean)


def _evaluation_against_pictures(
    storage: Storage, hosts: Pool, scorers: Pool, pairs: PairSpec, solver: NSSolver, folder: Path, side: int
) -> Evaluation:
    """An evaluation of PSNR and of a distance to three plain pictures."""
    for number in range(3):
        Image.new("L", (side, side), 40 * number).save(folder / f"{number}.png")
    pictures = {"name": "image_folder", "options": {"folder": str(folder), "grayscale": True}}
    metrics = ["psnr", MetricSpec("fid", {"features": "digits_cnn", "reference": pictures})]
    return _evaluation(storage, hosts, scorers, pairs, [_theta(solver)], metrics)
