"""Runs an evaluation: measures what is missing, on hosts and scorers concurrently, and summarises all measurements.

The unit of work is one shard of one solver on one pair set. A host samples it, measures the metrics that compare with
ground truth, and writes images or sound for scorers, which measure the other metrics. An evaluation that was stopped at
any moment resumes when it is repeated: measurements that were stored are not made again.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from orchestrator import plugins
from orchestrator.datasets.base import Dataset
from orchestrator.errors import UserError
from orchestrator.evaluation.cases import Case, Score, truth_of
from orchestrator.evaluation.real import RealSamples, RealShard, check_real_samples
from orchestrator.hosts.protocols import HostProtocol, ScorerProtocol
from orchestrator.metrics.base import IMAGE_RANGE, Array, Media, Summary
from orchestrator.metrics.measurements import FINITE, Measured, MetricSpec
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pool.requests import Outcome, Pool, Request
from orchestrator.progress import bar, counted
from orchestrator.storage import Storage, digest_of

WAITING_MEDIA = 8
"""Shards of media that may wait for a scorer; bounds the media on disk."""


@dataclass
class Evaluation:
    """An evaluation of cases by metrics.

    Attributes:
        storage: Storage of pairs and measurements.
        hosts: Hosts of the model.
        scorers: Processes that hold the metrics' networks; None if no metric needs one.
        cases: Solvers and datasets to evaluate.
        metrics: Metrics to measure.
        shown: Smallest and largest value of the model's data, which are black and white in its images.
        failures: Why a shard could not be measured, by digest of its solver, name of its pairs, and identity of the
            metric.
    """

    storage: Storage
    hosts: Pool
    scorers: Pool | None
    cases: Sequence[Case]
    metrics: Sequence[MetricSpec]
    shown: tuple[float, float] = IMAGE_RANGE
    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _real_samples: dict[tuple[str, str], RealSamples | None] = field(default_factory=dict)

    # ---- measuring --------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Measure what is missing. A shard that fails is noted in :attr:`failures`; the others are still measured."""
        # The same theta under two names is measured once.
        cases = [*self.cases, *self._truths()]
        shards = {
            (case.solver.digest, case.pairs.name, shard): self._shard(case, shard)
            for case in cases
            for shard in range(case.pairs.shards)
        }
        work = [shard for shard in shards.values() if shard.is_missing]
        real = self._real_work()
        total = sum(shard.steps for shard in work) + sum(len(item.indices) for item in real)
        with bar(total, "sample", "evaluation") as progress:
            for outcome, item in _answers(self.scorers, real, lambda item: item.request()):
                if outcome.error is not None:
                    self._fail_everywhere(item.spec, outcome.error)
                progress.update(len(item.indices))
            lock = threading.Lock()  # outcomes of hosts and scorers arrive in two threads

            def update(samples: int) -> None:
                with lock:
                    progress.update(samples)

            self._measure_samples(work, update)
        for case in cases:
            self._delete_media(case)

    def _truths(self) -> list[Case]:
        """Ground truth of the pairs on which a metric compares distributions with it."""
        return [
            truth_of(case)
            for case in {case.pairs.name: case for case in self.cases}.values()
            if any(spec.metric.compares_with_truth(self.dataset(case.pairs)) for spec in self.metrics)
        ]

    def _measure_samples(self, work: Sequence[_Shard], update: Any) -> None:
        """Sample on the hosts in a second thread and score in this one, so that both pools stay busy."""
        waiting: queue.Queue[_Shard | BaseException | None] = queue.Queue(WAITING_MEDIA)
        stop = threading.Event()

        def put(item: _Shard | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    waiting.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def sample() -> None:
            try:
                unsampled = [shard for shard in work if shard.needs_host]
                for shard in work:
                    if not shard.needs_host:
                        put(shard)
                for outcome in self.hosts.map(shard.host_request() for shard in unsampled):
                    shard = unsampled[outcome.index]
                    if outcome.error is not None:
                        self._fail(shard, outcome.error, [*shard.compared, *shard.scored])
                        update(shard.steps)
                        continue
                    update(shard.rows)
                    if shard.scored:
                        put(shard)
                    if stop.is_set():
                        return
                put(None)
            except BaseException as error:  # raised again in the thread that waits on the queue
                put(error)

        def scored() -> Iterator[_Shard]:
            while (item := waiting.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

        thread = threading.Thread(target=sample, daemon=True, name="sampling")
        thread.start()
        try:
            for outcome, shard in _answers(self.scorers, scored(), lambda shard: shard.scorer_request()):
                if outcome.error is not None:
                    self._fail(shard, outcome.error, shard.scored)
                update(shard.rows * len(shard.scored))
                self.storage.delete(shard.media_key)
        finally:
            stop.set()
            thread.join()

    def _fail(self, shard: _Shard, error: Exception, metrics: Sequence[MetricSpec]) -> None:
        for spec in metrics:
            self.failures.setdefault(_failure(shard.case, spec), str(error))

    def _fail_everywhere(self, spec: MetricSpec, error: Exception) -> None:
        """Note real samples that could not be measured: this metric then has no value, other metrics are unaffected."""
        for case in self.cases:
            self.failures.setdefault(_failure(case, spec), f"real samples: {error}")

    def check_forms(self) -> None:
        """Refuse, before anything is measured, decoded images and real samples that a metric cannot measure.

        Raises:
            ConfigError: See :meth:`MetricSpec.check_samples` and :func:`check_real_samples`.
        """
        for case in {case.pairs.name: case for case in self.cases}.values():
            images: tuple[int, ...] | None = None
            if any(spec.metric.sees == "images" for spec in self.metrics):
                first = Request.of(HostProtocol.pictures, theta=None, pairs=case.pairs.name, indices=[0])
                images = tuple(self.hosts.call(first).shape[1:])
            for spec in self.metrics:
                spec.check_samples(self.facts.kind, self.facts.shape, images, case.pairs.count)
                real = self._real(spec, case.pairs)
                if real is not None:
                    shape = images if spec.metric.sees == "images" else self.facts.shape
                    assert shape is not None
                    source = plugins.build("datasets", real.dataset["name"], real.dataset["options"])
                    check_real_samples(spec, source, shape, self.shown)

    def _shard(self, case: Case, shard: int) -> _Shard:
        finite = self._finite(case)
        missing = [spec for spec in self.metrics if self._measurable(spec, case) and self._lacks(case, spec, shard)]
        unique = list({spec.identity: spec for spec in missing}.values())
        return _Shard(
            shard=shard,
            case=case,
            compared=[spec for spec in unique if spec.metric.compares],
            scored=[spec for spec in unique if not spec.metric.compares],
            keys={spec.identity: self._measured(case, spec).key(shard) for spec in unique},
            finite=finite.key(shard),
            lacks_finite=not self.storage.exists(finite.key(shard)),
            media=f"{self._media_folder(case)}/shard-{shard:05d}",
            storage=self.storage,
        )

    def _lacks(self, case: Case, spec: MetricSpec, shard: int) -> bool:
        return not self.storage.exists(self._measured(case, spec).key(shard))

    @staticmethod
    def _measurable(spec: MetricSpec, case: Case) -> bool:
        """Whether a metric is measured for a case: ground truth is not compared with itself, pair by pair."""
        return not (spec.metric.compares and case.solver.kind == "ground truth")

    def _measured(self, case: Case, spec: MetricSpec) -> Measured:
        rescaled = spec.metric.sees == "images" and self.shown != IMAGE_RANGE
        return self._of(case, digest_of([spec.identity, *self.shown]) if rescaled else spec.identity)

    def _finite(self, case: Case) -> Measured:
        return self._of(case, FINITE)

    def _of(self, case: Case, identity: str) -> Measured:
        pairs = case.pairs
        cut = pairs.count % pairs.shard_size
        return Measured(self.storage, case.solver.digest, pairs.digest, identity, pairs.shards, cut)

    def _delete_media(self, case: Case) -> None:
        folder = self._media_folder(case)
        self.storage.delete_leftovers(folder)
        for name in self.storage.names(folder):
            self.storage.delete(f"{folder}/{name}")
        self.storage.delete_empty_folder(folder)

    def _media_folder(self, case: Case) -> str:
        shown = "" if self.shown == IMAGE_RANGE else f"-{digest_of(list(self.shown))[:8]}"
        return f"measurements/media/{case.pairs.name}-{case.solver.digest}{shown}"

    @cached_property
    def facts(self) -> ModelFacts:
        """Facts about the hosts' model."""
        return self.hosts.call(Request.of(HostProtocol.facts))

    # ---- real samples -----------------------------------------------------------------------------------------

    def _real(self, spec: MetricSpec, pairs: PairSpec) -> RealSamples | None:
        """The real samples that a metric compares with, or None if it needs none measured."""
        key = (digest_of([spec.name, dict(spec.options)]), pairs.content)
        if key not in self._real_samples:
            dataset = self.dataset(pairs)
            source = spec.metric.real(dataset)
            self._real_samples[key] = None
            if source is not None:
                described = pairs.conditioning if source is dataset else plugins.describe("datasets", source)
                mapped = spec.metric.sees == "images" and source.real_form == "samples"
                limits = self.shown if mapped else IMAGE_RANGE
                self._real_samples[key] = RealSamples(
                    self.storage, spec, described, source.real_content, source.real_count(), limits
                )
        return self._real_samples[key]

    def references(self) -> set[str]:
        """Folders of the measurements of real samples that the metrics compare with."""
        real = [self._real(spec, case.pairs) for case in self.cases for spec in self.metrics]
        return {f"measurements/{samples.measured.of}" for samples in real if samples is not None}

    def _real_work(self) -> list[RealShard]:
        needed = [self._real(spec, case.pairs) for case in self.cases for spec in self.metrics]
        missing = [shard for real in needed if real is not None for shard in real.missing()]
        return list({shard.key: shard for shard in missing}.values())

    @staticmethod
    def dataset(pairs: PairSpec) -> Dataset:
        """The dataset from which the pairs' conditioning was drawn."""
        return plugins.build("datasets", pairs.conditioning["name"], pairs.conditioning["options"])

    # ---- summaries --------------------------------------------------------------------------------------------

    def scores(self, ground_truth_nfe: Mapping[str, float]) -> list[Score]:
        """One score per case and metric; ground truth has distance 0 from itself.

        Args:
            ground_truth_nfe: Mean evaluations per sample of ground truth, by name of the pairs.
        """
        scores = []
        for case in self.cases:
            dataset = self.dataset(case.pairs)
            not_finite = self._not_finite(case)
            nfe = case.solver.nfe or ground_truth_nfe[case.pairs.name]
            for spec in self.metrics:
                failure = None
                compares = spec.metric.compares or spec.metric.compares_with_truth(dataset)
                is_exact = compares and case.solver.kind == "ground truth"
                if not is_exact:
                    summary, failure = self._summary(case, spec, dataset, len(not_finite))
                else:
                    exact = math.inf if spec.metric.higher_is_better else 0.0
                    summary = Summary(exact, 0.0, case.pairs.count, 0)
                scores.append(
                    Score(
                        case=case,
                        metric=spec,
                        summary=summary,
                        nfe=nfe,
                        not_finite=not_finite[:10],
                        failure=failure,
                        reference=spec.metric.compared_with(dataset),
                        is_exact=is_exact,
                    )
                )
        return scores

    def _summary(self, case: Case, spec: MetricSpec, dataset: Dataset, not_finite: int) -> tuple[Summary, str | None]:
        nothing = Summary(math.nan, math.nan, 0, not_finite)
        if (failure := self.failures.get(_failure(case, spec))) is not None:
            return nothing, failure
        if not_finite and spec.metric.needs_all:
            # The remaining samples follow another distribution than the solver's.
            return nothing, f"{counted(not_finite, 'sample')} {'is' if not_finite == 1 else 'are'} not finite"
        real = self._real(spec, case.pairs)
        reference = None if real is None else real.measured
        if spec.metric.compares_with_truth(dataset):
            truth = truth_of(case)
            if (failure := self.failures.get(_failure(truth, spec))) is not None:
                return nothing, f"ground truth: {failure}"
            reference = self._measured(truth, spec)
        try:
            return spec.metric.summarise(self._measured(case, spec), dataset, reference), None
        except (UserError, ValueError) as error:
            return nothing, str(error)

    def _not_finite(self, case: Case) -> tuple[int, ...]:
        """Indices of the samples that are not finite."""
        measured = self._finite(case)
        if measured.missing():
            return ()
        good = np.concatenate([shard[:, 0] for shard in measured])
        return tuple(int(i) for i in np.flatnonzero(~good.astype(bool)))

    def per_sample(self, case: Case, spec: MetricSpec) -> Array:
        """A metric's per-sample measurements, (N, K), in the order of the pairs."""
        return np.concatenate(list(self._measured(case, spec)))


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """One shard of one case, with the measurements that are missing.

    Attributes:
        shard: Index of the shard.
        case: The case.
        compared: Missing metrics that compare with ground truth; a host measures them.
        scored: Missing metrics that a scorer measures.
        keys: Storage keys of the missing measurements, by metric identity.
        finite: Storage key of the record of finite samples.
        lacks_finite: Whether that record is missing.
        media: Storage key of the shard's samples for scorers, without the forms that they are kept in.
        storage: Storage of measurements and media.
    """

    shard: int
    case: Case
    compared: list[MetricSpec]
    scored: list[MetricSpec]
    keys: dict[str, str]
    finite: str
    lacks_finite: bool
    media: str
    storage: Storage

    @property
    def is_missing(self) -> bool:
        return bool(self.compared or self.scored or self.lacks_finite)

    @property
    def forms(self) -> list[Media]:
        """Forms of samples that scorers need."""
        return sorted({spec.metric.sees for spec in self.scored})

    @property
    def media_key(self) -> str:
        """Storage key of the samples in these forms."""
        return f"{self.media}-{'-'.join(self.forms)}.safetensors"

    @property
    def needs_host(self) -> bool:
        """Whether the shard has to be sampled; media left by a killed run are used as they are."""
        return bool(self.compared or self.lacks_finite or (self.scored and not self.storage.exists(self.media_key)))

    @property
    def rows(self) -> int:
        return len(self.case.pairs.shard_indices(self.shard))

    @property
    def steps(self) -> int:
        """Progress steps: samples to be sampled, plus samples to be scored by each metric."""
        return self.rows * (self.needs_host + len(self.scored))

    def host_request(self) -> Request[int]:
        return Request.of(
            HostProtocol.measure_shard,
            theta=self.case.solver.theta,
            pairs=self.case.pairs.name,
            shard=self.shard,
            metrics=self.compared,
            keys=[self.keys[spec.identity] for spec in self.compared],
            finite=self.finite,
            media=self.media_key if self.scored else None,
            forms=self.forms,
        )

    def scorer_request(self) -> Request[int]:
        pairs = self.case.pairs
        return Request.of(
            ScorerProtocol.measure,
            metrics=self.scored,
            keys=[self.keys[spec.identity] for spec in self.scored],
            media=self.media_key,
            dataset=pairs.conditioning,
            seed=pairs.seed,
            first=pairs.shard_indices(self.shard).start,
        )


def _failure(case: Case, spec: MetricSpec) -> tuple[str, str, str]:
    """Key of a failure to measure."""
    return case.solver.digest, case.pairs.name, spec.identity


def _answers(pool: Pool | None, work: Any, request: Any) -> Iterator[tuple[Outcome, Any]]:
    """Outcomes paired with their items of work; items are consumed lazily, as the pool has room."""
    taken = []

    def requests() -> Iterator[Request]:
        for item in work:
            taken.append(item)
            yield request(item)

    if pool is None:
        assert not list(requests()), "a metric needs a scorer, but no scorer was started"
        return
    for outcome in pool.map(requests()):
        yield outcome, taken[outcome.index]
