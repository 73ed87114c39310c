"""The requests that hosts and scorers answer, as protocols: what a client may send, and what comes back.

Clients build requests from these methods, ``Request.of(HostProtocol.score, theta=theta, ...)``; hosts and scorers
implement them. Everything that crosses the wire is small: a theta, pair indices, a few sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.hosts.runs import LearnedRun, PairSets, State
from orchestrator.hosts.teacher.evidence import Evidence
from orchestrator.hosts.timing import Timing
from orchestrator.hosts.truth import TruthFacts
from orchestrator.metrics.base import Media
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec, accuracy
from orchestrator.pairs.make import PairMaker
from orchestrator.pairs.steps import SAMPLES, ChosenSteps
from solvers.distil.normal_equations import Jacobian, NormalEquations
from solvers.network_schedule import NetworkSchedule

Theta = npt.NDArray[np.float64]
"""A solver in flat form (:meth:`solvers.ns.NSSolver.flat`), as it is sent."""


class HostProtocol(PairMaker, Protocol):
    """Requests to a host. ``pairs`` is always a ``PairSpec.name``, ``indices`` are positions in these pairs."""

    def facts(self) -> ModelFacts:
        """Facts about the host's model."""

    def process_id(self) -> int:
        """Id of the host's process; also shows that the host is up."""

    def truth(self, *, pairs: str, again: int = accuracy.PAIRS) -> TruthFacts:
        """Facts about the ground truth of a pair set, among them its own error.

        Args:
            pairs: Name of the pairs.
            again: Pairs to solve again at a tenth of the tolerance, from the first on.
        """

    def examine(
        self, *, conditioning: Mapping[str, Any], seed: int, guidance_scale: float, rtol: float, atol: float
    ) -> Evidence:
        """Measure the teacher, in at most ``teacher.probe.BUDGET`` evaluations; nothing is stored.

        Args:
            conditioning: Name and options of the dataset that conditions the samples.
            seed: Seed of noise and conditions; that of the training pairs gives the first trajectories of these.
            guidance_scale: Guidance scale.
            rtol, atol: Tolerances of ground truth.
        """

    def choose_steps(self, *, spec: PairSpec, samples: int = SAMPLES) -> ChosenSteps:
        """Steps for all pairs of a spec, chosen on its first pairs to be as accurate as its tolerances.

        Args:
            spec: A spec without steps.
            samples: Number of pairs.
        """

    def time_evaluation(
        self, *, conditioning: Mapping[str, Any], guidance_scale: float, batch_sizes: Sequence[int]
    ) -> Timing:
        """Time one velocity evaluation: a call of each batch size, repeated if it is too short to time.

        Args:
            conditioning: Name and options of the dataset that conditions the samples.
            guidance_scale: Guidance scale.
            batch_sizes: Batch sizes to time, at least one.
        """

    # ---- losses, for distillation -----------------------------------------------------------------------------

    def loss_and_gradient(
        self,
        *,
        theta: Theta,
        pairs: str,
        indices: Sequence[int],
        objective: str = "psnr",
        objective_options: dict[str, Any] | None = None,
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """The loss of theta and its gradient in theta's flat form, both summed over one block of pairs.

        Args:
            theta: Flat theta, float64.
            pairs: Name of the pairs.
            indices: Pairs of one block, at most ``BLOCK``.
            objective, objective_options: A ``SolverObjective`` and its options; the PSNR loss by default.
        """

    def loss_and_gradient_of_parameters(
        self, *, run: LearnedRun, parameters: npt.NDArray[np.float64], indices: Sequence[int]
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """The same for a loss of the family's own steps (``FamilyObjective``), in the family's parameters."""

    def normal_equations(
        self,
        *,
        theta: Theta,
        pairs: str,
        indices: Sequence[int],
        jacobian: Jacobian = "forward",
        free: npt.NDArray[np.bool_] | None = None,
    ) -> NormalEquations:
        """J^T W J and J^T W r of the PSNR loss, summed over one block of pairs, without a backward pass.

        Args:
            theta: Flat theta, float64.
            pairs: Name of the pairs.
            indices: Pairs of one block, at most ``BLOCK``.
            jacobian: 'forward', 'central' or 'jvp'.
            free: Mask over theta of the entries whose columns are computed; by default, all learnable ones.
        """

    def loss(self, *, theta: Theta, pairs: str, indices: Sequence[int]) -> float:
        """The PSNR loss of theta, summed over these pairs."""

    def advance(self, *, run: LearnedRun, state: State, steps: int, validation: PairSets | None = None) -> State:
        """Advance a run by ``steps`` iterations on the host, which saves a round trip per iteration.

        Args:
            run: The run.
            state: State to continue from.
            steps: Number of iterations.
            validation: Name of the pairs on which the last iterate is validated, or several sets, one per guidance
                scale; None: no validation.
        """

    def schedule(self, *, times: npt.NDArray[np.float64]) -> NetworkSchedule:
        """What the network is evaluated at, for a theta with these times, shape (n,), float64."""

    # ---- starts and grids from trajectories -------------------------------------------------------------------

    def least_squares(self, *, pairs: str, times: npt.NDArray[np.float64]) -> Theta:
        """theta fitted row by row to the trajectories of a whole pair set (``solvers.distil.least_squares``).

        Args:
            pairs: Name of pairs with trajectories.
            times: t_0..t_n, shape (n + 1,), float64.
        """

    def gits_grid(
        self,
        *,
        pairs: str,
        steps: int,
        gamma: float,
        loss: Literal["error", "deviation"],
        trajectories: int,
        knots: int,
    ) -> tuple[npt.NDArray[np.float64], int]:
        """The grid that GITS chooses from the trajectories of the first pairs of a set.

        Args:
            pairs: Name of pairs with trajectories.
            steps: Steps of the grid.
            gamma, loss: See ``solvers.gits.gits_grid``.
            trajectories: Number of pairs to use; all of them if there are fewer.
            knots: Number of uniform times to choose from; raised to 4 per step if there are fewer.

        Returns:
            The times, shape (steps + 1,), float64, and the number of velocity evaluations spent, each of one sample.
        """

    # ---- samples and scores -----------------------------------------------------------------------------------

    def sample(self, *, theta: Theta, pairs: str, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """Samples of theta from the noise of these pairs, shape (len(indices), ...), float32."""

    def score(
        self, *, theta: Theta, pairs: str, metrics: Sequence[str], indices: Sequence[int] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Values of each metric for theta on these pairs (by default, the whole set), in the order of ``indices``."""

    def score_thetas(
        self, *, thetas: Sequence[Theta], pairs: str, metric: str, indices: Sequence[int]
    ) -> list[npt.NDArray[np.float64]]:
        """Values of one metric for several theta on the same pairs: a grid search in one request."""

    def measure_shard(
        self,
        *,
        theta: Theta | None,
        pairs: str,
        shard: int,
        metrics: Sequence[MetricSpec],
        keys: Sequence[str],
        finite: str,
        media: str | None = None,
        forms: Sequence[Media] = (),
    ) -> int:
        """Sample the pairs of one shard, measure the metrics that compare with ground truth, and write their values.

        Args:
            theta: Flat theta; None for ground truth itself.
            pairs: Name of the pairs.
            shard: Number of the shard; of the last one, only the named pairs are measured. No other shard is read.
            metrics: Metrics that compare with ground truth; empty for ground truth itself.
            keys: Storage key for the values of each metric.
            finite: Storage key for the mask of finite samples, which is written last.
            media: Storage key for the samples, for scorers; None: they are not kept.
            forms: Forms in which they are kept.

        Returns:
            The number of samples in the shard.
        """

    def pictures(self, *, theta: Theta | None, pairs: str, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """Samples decoded for viewing, (N, ...), float32.

        Images (N, C, H, W) of a latent model; of sound, mel frames as they are sampled, or the spectrogram of decoded
        waves, (N, F, T); otherwise samples as they are.

        Args:
            theta: Flat theta; None for ground truth.
            pairs: Name of the pairs.
            indices: Pairs to sample.
        """

    def sound(self, *, theta: Theta | None, pairs: str, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """Waves (N, samples) of theta from the noise of these pairs, or of their ground truth if theta is None."""


class ScorerProtocol(Protocol):
    """Requests to a scorer."""

    def process_id(self) -> int:
        """Id of the scorer's process; also shows that the scorer is up."""

    def measure(
        self,
        *,
        metrics: Sequence[MetricSpec],
        keys: Sequence[str],
        media: str,
        dataset: Mapping[str, Any],
        seed: int,
        first: int,
    ) -> int:
        """Measure a media shard by these metrics and write the values.

        Args:
            metrics: The metrics.
            keys: Storage key for the values of each metric.
            media: Storage key of the media shard.
            dataset: Name and options of the dataset that conditioned the samples.
            seed, first: Seed of the pairs and index of the shard's first pair, which determine the conditioning.

        Returns:
            The number of samples in the shard. The values of samples that are not finite are NaN.
        """

    def measure_real(
        self,
        *,
        metric: MetricSpec,
        key: str,
        dataset: Mapping[str, Any],
        indices: Sequence[int],
        shown_range: tuple[float, float] = (-1.0, 1.0),
    ) -> int:
        """Measure real samples of a dataset, write the values, and return the number of samples.

        Args:
            metric: The metric.
            key: Storage key for the values.
            dataset: Name and options of the dataset.
            indices: Indices of the real samples.
            shown_range: Values of the real samples that are mapped to -1 and 1.
        """
