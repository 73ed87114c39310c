"""Every solver on every dataset by every metric: nothing is measured twice, and nothing that failed is hidden."""

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
from orchestrator.evaluation.run import Case, Evaluation, Score
from orchestrator.evaluation.solvers import EvaluatedSolver
from orchestrator.hosts.host import Host
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


class Watched(Pool):
    """A pool that notes what it is asked, and may break on the way."""

    def __init__(self, pool: LocalPool, breaks_after: int | None = None, refuses: Any = None):
        self.pool, self.breaks_after, self.refuses = pool, breaks_after, refuses
        self.asked: list[Request] = []

    def map(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        def noted() -> Iterator[Request]:
            for request in requests:
                if self.breaks_after is not None and len(self.asked) == self.breaks_after:
                    raise KeyboardInterrupt
                self.asked.append(request)
                yield request

        for outcome in self.pool.map(noted()):
            if self.refuses is not None and self.refuses(self.asked[-1]):
                yield Outcome(outcome.index, None, PoolError("set aside by the test"))
            else:
                yield outcome


@pytest.fixture
def hosts(copied: Storage) -> Watched:
    """A host on a copy of the small experiment's pairs."""
    return Watched(
        LocalPool(Host(HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=copied.root)))
    )


@pytest.fixture
def scorers(copied: Storage) -> Watched:
    """A scorer on the same storage, in batches that do not divide a shard."""
    return Watched(LocalPool(Scorer(ScorerSettings(storage=copied.root, batch_size=7))))


@pytest.fixture
def pairs(specs: dict[PairKey, PairSpec]) -> PairSpec:
    """The 40 test pairs, in shards of 16."""
    return specs[PairKey("test", 1.0, 0)]


@pytest.fixture
def midpoint(facts: ModelFacts) -> NSSolver:
    return GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler)


def _theta(solver: NSSolver, title: str = "Midpoint") -> EvaluatedSolver:
    return EvaluatedSolver(kind="theta", name=title, guidance_scale=1.0, ns=solver)


TRUTH = EvaluatedSolver(kind="ground truth", name="Ground truth", guidance_scale=1.0)


def _scores(evaluation: Evaluation, pairs: PairSpec) -> dict[tuple[str, str], Score]:
    evaluation.measure()
    found = evaluation.scores({pairs.digest: 100.0})
    return {(s.case.solver.name, s.metric.metric.column): s for s in found}


def _evaluation(
    storage: Storage,
    hosts: Pool,
    scorers: Pool,
    pairs: PairSpec,
    solvers: Sequence[EvaluatedSolver],
    metrics: Sequence[Any],
) -> Evaluation:
    cases = [Case(solver=solver, dataset="labels", pairs=pairs) for solver in solvers]
    return Evaluation(
        storage, hosts, scorers, cases, [m if isinstance(m, MetricSpec) else MetricSpec(m) for m in metrics]
    )


def test_scores_are_those_of_a_sweep(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver
) -> None:
    """Shard by shard or all pairs at once: the same means, to the rounding of the network's batches."""
    found = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", "snr", "rmse"]), pairs)
    for column, summary in evaluate(hosts.pool, midpoint, pairs.digest, ["psnr", "snr", "rmse"]).items():
        assert found["Midpoint", column].summary.mean == pytest.approx(summary["mean"], rel=1e-5)
        assert found["Midpoint", column].summary.count == 40


def test_a_scorer_sees_every_sample_once(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """What it measures through shards of media is what one would measure on the samples themselves."""
    found = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint), TRUTH], [brightness]), pairs)
    samples = hosts.pool.call("sample", theta=midpoint.flat().numpy(), pairs=pairs.digest, indices=range(40))
    assert found["Midpoint", "brightness"].summary.mean == pytest.approx(float(samples.mean()), abs=1e-6)
    truth = PairStore(copied, pairs).load().x1
    assert found["Ground truth", "brightness"].summary.mean == pytest.approx(float(truth.mean()), abs=1e-6)
    assert not copied.names("measurements/media/" + f"{pairs.digest}-{_theta(midpoint).digest}"), "media are deleted"


def test_nothing_is_measured_twice(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """Again: no request at all. Another metric of hosts: scorers rest. Another of scorers: each shard once more."""

    def again(*metrics: Any) -> tuple[int, int]:
        hosts.asked.clear()
        scorers.asked.clear()
        _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], metrics), pairs)
        return len(hosts.asked), len(scorers.asked)

    assert again("psnr", brightness) == (3, 3)
    assert again("psnr", brightness) == (0, 0)
    assert again("psnr", "snr", brightness) == (3, 0)
    assert again("psnr", brightness, "rmse") == (3, 0)


def test_two_names_of_one_theta_are_one_piece_of_work(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """And two rows of the table."""
    solvers = [_theta(midpoint), _theta(midpoint, "its twin")]
    found = _scores(_evaluation(copied, hosts, scorers, pairs, solvers, [brightness]), pairs)
    assert (len(hosts.asked), len(scorers.asked)) == (3, 3)
    assert found["Midpoint", "brightness"].summary == found["its twin", "brightness"].summary


@pytest.mark.parametrize("breaks", ["hosts", "scorers"])
def test_an_interrupted_evaluation_goes_on(
    copied: Storage,
    hosts: Watched,
    scorers: Watched,
    pairs: PairSpec,
    midpoint: NSSolver,
    brightness: str,
    breaks: str,
) -> None:
    """Stopped after two shards, hosts or scorers: the same call measures the rest, and the numbers are the same."""
    solvers = [_theta(midpoint), TRUTH]
    broken = {"hosts": hosts, "scorers": scorers}
    broken[breaks] = Watched(broken[breaks].pool, breaks_after=2)
    with pytest.raises(KeyboardInterrupt):
        _evaluation(copied, broken["hosts"], broken["scorers"], pairs, solvers, ["psnr", brightness]).measure()
    scorers.asked.clear()
    resumed = _scores(_evaluation(copied, hosts, scorers, pairs, solvers, ["psnr", brightness]), pairs)
    assert 1 <= len(scorers.asked) < 6
    whole = evaluate(hosts.pool, midpoint, pairs.digest, ["psnr"])["psnr_db"]["mean"]
    assert resumed["Midpoint", "psnr_db"].summary.mean == pytest.approx(whole, rel=1e-5)
    assert resumed["Ground truth", "brightness"].summary.count == 40


def _measured(storage: Storage, folder: str = "measurements") -> dict[str, bytes]:
    """Every file of measurements, by key."""
    found: dict[str, bytes] = {}
    for name in storage.names(folder):
        key = f"{folder}/{name}"
        if name.endswith(".safetensors"):
            found[key] = storage.read(key)
        else:
            found |= _measured(storage, key)
    return found


def test_on_s3_that_fails_one_request_in_twenty_the_measurements_are_those_of_a_directory(
    copied: Storage,
    copied_to_s3: Storage,
    s3_server: S3Server,
    hosts: Watched,
    scorers: Watched,
    pairs: PairSpec,
    midpoint: NSSolver,
    brightness: str,
) -> None:
    """Interrupted on the way, and gone on with: byte for byte, nothing half-written, no media left."""
    solvers, metrics = [_theta(midpoint), TRUTH], ["psnr", brightness]
    here = _scores(_evaluation(copied, hosts, scorers, pairs, solvers, metrics), pairs)
    chance, failed = random.Random(0), [0]

    def fault(request: dict[str, Any]) -> bool:
        failing = chance.random() < 0.05
        failed[0] += failing
        return failing

    s3_server.fault = fault
    settings = HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=copied_to_s3.root)
    far_hosts = LocalPool(Host(settings))
    far_scorers = LocalPool(Scorer(ScorerSettings(storage=copied_to_s3.root, batch_size=7)))
    broken = Watched(far_hosts, breaks_after=2)
    with pytest.raises(KeyboardInterrupt):
        _evaluation(copied_to_s3, broken, far_scorers, pairs, solvers, metrics).measure()
    there = _scores(_evaluation(copied_to_s3, far_hosts, far_scorers, pairs, solvers, metrics), pairs)
    s3_server.fault = None
    assert failed[0] > 0
    assert {key: score.summary for key, score in there.items()} == {key: score.summary for key, score in here.items()}
    assert _measured(copied_to_s3) == _measured(copied)
    media = "measurements/media"
    assert not [name for folder in copied_to_s3.names(media) for name in copied_to_s3.names(f"{media}/{folder}")]


def test_samples_that_are_not_finite_are_counted_and_named(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """A solver that blows up on some noise: left out of the means, never averaged away, never seen by a network."""
    wild = NSSolver(midpoint.times, midpoint.a, midpoint.b)
    found = _evaluation(copied, _SpoilsTwo(hosts), scorers, pairs, [_theta(wild)], ["psnr", brightness])
    scores = _scores(found, pairs)
    for column in ("psnr_db", "brightness"):
        score = scores["Midpoint", column]
        assert (score.summary.count, score.summary.not_finite) == (38, 2)
        assert math.isfinite(score.summary.mean)
        assert score.not_finite == (3, 17)


class _SpoilsTwo(Pool):
    """Makes samples 3 and 17 NaN, as a solver that diverges there would."""

    def __init__(self, hosts: Watched):
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


def test_what_cannot_be_measured_is_told_and_the_rest_goes_on(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """A shard that no scorer can answer costs its own metric its value, with the reason; PSNR is there."""
    scorers.refuses = lambda request: request.arguments["first"] == 16
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", brightness]), pairs)
    assert math.isfinite(scores["Midpoint", "psnr_db"].summary.mean)
    assert scores["Midpoint", "brightness"].failure == "set aside by the test"
    assert math.isnan(scores["Midpoint", "brightness"].summary.mean)


def test_ground_truth_is_at_no_distance_from_itself(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec
) -> None:
    """Its row has its evaluations; what compares with ground truth is exact by definition and not computed."""
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, [TRUTH], ["psnr", "rmse"]), pairs)
    assert scores["Ground truth", "psnr_db"].summary.mean == math.inf
    assert scores["Ground truth", "rmse"].summary.mean == 0
    assert scores["Ground truth", "rmse"].nfe == 100


def test_options_of_what_is_measured_are_part_of_its_name(brightness: str) -> None:
    """Numbers of another offset are other numbers; equal options are found again."""
    plain, moved = MetricSpec(brightness), MetricSpec(brightness, {"offset": 1.0})
    assert plain.identity != moved.identity
    assert moved.identity == MetricSpec(brightness, {"offset": 1.0}).identity


def test_per_sample_numbers_are_in_the_order_of_the_pairs(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver
) -> None:
    """What the bootstrap compares pair by pair belongs to the same pair."""
    evaluation = _evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr"])
    evaluation.measure()
    direct = hosts.pool.call("score", theta=midpoint.flat().numpy(), pairs=pairs.digest, metrics=["psnr"])["psnr"]
    np.testing.assert_allclose(
        evaluation.per_sample(evaluation.cases[0], evaluation.metrics[0])[:, 0], direct, rtol=1e-4
    )


def test_a_shard_without_a_finite_sample_is_counted_and_not_measured(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver, brightness: str
) -> None:
    """A solver that diverges everywhere: every sample is counted, no network sees one, and there is no value."""
    nowhere = NSSolver.from_flat(midpoint.flat())
    hosts.pool.host._sample = lambda theta, pairs, spec: torch.full_like(pairs.x0, math.nan)
    scores = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(nowhere)], ["psnr", brightness]), pairs)
    for column in ("psnr_db", "brightness"):
        score = scores["Midpoint", column]
        assert (score.summary.count, score.summary.not_finite) == (0, 40)
        assert math.isnan(score.summary.mean)
        assert score.not_finite == tuple(range(10))


def test_a_damaged_measurement_costs_its_metric_its_value_once(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver
) -> None:
    """It is named and deleted; the same call measures it again, and the value is what it was."""
    evaluation = _evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", "snr"])
    whole = _scores(evaluation, pairs)
    copied.write(evaluation._measured(evaluation.cases[0], evaluation.metrics[0]).key(1), b"no measurement")
    broken = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", "snr"]), pairs)
    assert "is damaged: " in str(broken["Midpoint", "psnr_db"].failure)
    assert broken["Midpoint", "snr_db"].summary == whole["Midpoint", "snr_db"].summary
    again = _scores(_evaluation(copied, hosts, scorers, pairs, [_theta(midpoint)], ["psnr", "snr"]), pairs)
    assert again["Midpoint", "psnr_db"].summary == whole["Midpoint", "psnr_db"].summary


def test_real_images_of_another_size_are_refused_before_any_is_measured(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver, tmp_path: Path
) -> None:
    """With both sizes and what to set."""
    evaluation = _against_pictures(copied, hosts, scorers, pairs, midpoint, tmp_path, side=6)
    with pytest.raises(ConfigError, match=r"shape \(1, 8, 8\) with real images of 'image_folder' of shape \(1, 6, 6\)"):
        evaluation.check_sizes()
    assert not scorers.asked


def test_real_samples_that_cannot_be_measured_cost_one_metric_its_value(
    copied: Storage, hosts: Watched, scorers: Watched, pairs: PairSpec, midpoint: NSSolver, tmp_path: Path
) -> None:
    """And no other."""
    evaluation = _against_pictures(copied, hosts, scorers, pairs, midpoint, tmp_path, side=8)
    evaluation.check_sizes()
    scorers.refuses = lambda request: request.method == "measure_real"
    scores = _scores(evaluation, pairs)
    assert scores["Midpoint", "fid[digits_cnn]"].failure == "real samples: set aside by the test"
    assert math.isfinite(scores["Midpoint", "psnr_db"].summary.mean)


def _against_pictures(
    storage: Storage, hosts: Pool, scorers: Pool, pairs: PairSpec, solver: NSSolver, folder: Path, side: int
) -> Evaluation:
    """PSNR, and a distance to three plain pictures."""
    for number in range(3):
        Image.new("L", (side, side), 40 * number).save(folder / f"{number}.png")
    pictures = {"name": "image_folder", "options": {"folder": str(folder), "grayscale": True}}
    metrics = ["psnr", MetricSpec("fid", {"features": "digits_cnn", "reference": pictures})]
    return _evaluation(storage, hosts, scorers, pairs, [_theta(solver)], metrics)
