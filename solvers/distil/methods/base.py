"""Interface of distillation methods: settings, state, steps, and cost of one way to move theta."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from solvers.distil.batches import batch_indices
from solvers.distil.state import DistillationState
from solvers.families.base import LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

ENOUGH_RESIDUALS = 4
"""Residuals per learned number below which a method that solves for all numbers at once overfits: with 1.3 it lost 7 dB
on a 2-D model at NFE 4."""

SEED_STEP = 7919
"""Difference of the seeds of two training sets, so that an iteration takes other pairs of each."""


_NOTHING = object()


class RunLength(NamedTuple):
    """Iterations, pairs per iteration, and iterations between validations."""

    iterations: int
    batch_size: int
    validate_every: int


class LossAndGradient(NamedTuple):
    """Mean loss over a batch and its gradient in theta's flat form, float64."""

    loss: float
    gradient: Tensor


class GradientQuery(NamedTuple):
    """Asks for the mean loss on a batch and its gradient (:class:`LossAndGradient`).

    Attributes:
        at: The solver, or the family's parameters if the loss is a function of these.
        indices: The batch, as indices of training pairs.
    """

    at: NSSolver | Tensor
    indices: list[int]


class LossQuery(NamedTuple):
    """Asks for the mean PSNR loss of a solver on a batch: a float.

    Attributes:
        solver: The solver.
        indices: The batch, as indices of training pairs.
        pair_set: Number of their training set.
    """

    solver: NSSolver
    indices: list[int]
    pair_set: int = 0


class NormalQuery(NamedTuple):
    """Asks for the normal equations at a solver, summed over a batch (``NormalEquations``).

    Attributes:
        solver: The solver.
        indices: The batch, as indices of training pairs.
        jacobian: 'forward', 'central' or 'jvp'.
        free: Mask over flat theta. Rows and columns of the entries outside it may be zero.
        pair_set: Number of their training set.
    """

    solver: NSSolver
    indices: list[int]
    jacobian: Any
    free: Tensor
    pair_set: int = 0


SingleQuery = GradientQuery | LossQuery | NormalQuery


class Several(NamedTuple):
    """Asks several queries at once, such as one per training set; the answer is the list of theirs, in order."""

    queries: tuple[SingleQuery, ...]


Query = SingleQuery | Several

T = TypeVar("T")

Asking = Generator[Query, Any, T]
"""A computation that yields queries, receives their answers, and returns a T."""


def ask_all(queries: Sequence[SingleQuery]) -> Asking[list[Any]]:
    """The answers to these queries, in order; several are asked at once."""
    if len(queries) > 1:
        answers: list[Any] = yield Several(tuple(queries))
        return answers
    answer = yield queries[0]
    return [answer]


@dataclass(frozen=True)
class Problem:
    """What a run minimises: a loss over the parameters of a family.

    Attributes:
        family: Learnable family whose parameters are moved.
        scheduler: Scheduler of the model's field.
        sigma0: Preconditioning.
        in_parameters: Whether the loss is a function of the family's parameters and not of theta, such as BST's local
            errors.
        guidance_scales: Guidance scale of each training set, if there are several; the loss is the mean over them.
    """

    family: LearnableFamily
    scheduler: Scheduler
    sigma0: float = 1.0
    in_parameters: bool = False
    guidance_scales: tuple[float, ...] = ()

    @property
    def sets(self) -> int:
        """Number of training sets."""
        return len(self.guidance_scales) or 1

    def solver(self, parameters: Tensor) -> NSSolver:
        """The solver at ``parameters``, shape (p,), float64; differentiable in them."""
        return self.family.to_ns(parameters, self.scheduler, self.sigma0)

    def solvers(self, parameters: Tensor) -> list[NSSolver]:
        """The solver at ``parameters`` for each training set; differentiable in them."""
        if not self.guidance_scales:
            return [self.solver(parameters)]
        families = [self.family.at(scale) for scale in self.guidance_scales]
        return [family.to_ns(parameters, self.scheduler, self.sigma0) for family in families]

    def project(self, parameters: Tensor) -> Tensor:
        """The nearest parameters inside the family's bounds."""
        return self.family.project(parameters, self.scheduler, self.sigma0)

    def gradient(self, parameters: Tensor, indices: list[int]) -> Asking[LossAndGradient]:
        """The mean loss on these training pairs, and its gradient in ``parameters``, shape (p,), float64."""
        if self.in_parameters:
            in_parameters: LossAndGradient = yield GradientQuery(parameters, indices)
            return in_parameters
        leaf = parameters.detach().requires_grad_()
        solver = self.solver(leaf)
        loss, in_theta = yield GradientQuery(solver.detach(), indices)
        (gradient,) = torch.autograd.grad(solver.flat(), leaf, in_theta)
        return LossAndGradient(loss, gradient)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A distillation method with its settings. A subclass's dataclass fields are its options.

    Class attributes:
        name: Name in configurations.
        label: Suffix of a solver's name in tables; None for the papers' own method.
        state_type: Type of its states.
        default_length: Length of a run unless a configuration sets it.
        logged: Options that are logged as parameters of a run.
        psnr_only: Whether it can minimise only the PSNR loss.
        solves_for_all: Whether a step solves for all numbers at once, which takes at least as many residuals.
        has_backward: Whether it takes gradients by a backward pass.
        shares_batches: Whether its steps ask for single gradients, which can share model batches with other runs.
        neutral: Values of options at which a run is that of a release without them.
        several_sets: Whether it learns from several training sets at once, one per guidance scale.

    Attributes:
        iterations: Length of the run.
        batch_size: Pairs per iteration.
        seed: Seed of the batch order.
        training_pairs: Number of pairs to draw from, in each training set.
    """

    name: ClassVar[str]
    label: ClassVar[str | None] = None
    state_type: ClassVar[type[DistillationState]] = DistillationState
    default_length: ClassVar[RunLength]
    logged: ClassVar[tuple[str, ...]] = ()
    psnr_only: ClassVar[bool] = False
    solves_for_all: ClassVar[bool] = False
    has_backward: ClassVar[bool] = False
    shares_batches: ClassVar[bool] = False
    neutral: ClassVar[Mapping[str, Any]] = {}
    several_sets: ClassVar[bool] = False

    iterations: int
    batch_size: int
    seed: int = 0
    training_pairs: int = 520

    @classmethod
    def variants(cls, options: Mapping[str, Any], half_precision: bool) -> list[dict[str, Any]]:
        """Options of every run that a configuration asks for, one mapping per value of the method's axes.

        Args:
            options: Options as configured; those that are axes of the search are lists.
            half_precision: Whether the network computes in half precision during distillation.
        """
        return [dict(options)]

    @classmethod
    def defaults(cls, numbers: int, dimensions: int, nfe: int, training_pairs: int) -> dict[str, Any]:
        """Options of a run whose configuration sets no batch size.

        Args:
            numbers, dimensions: As for :meth:`check_pairs`.
            nfe: Evaluations per sample.
            training_pairs: Number of pairs to draw from.
        """
        return {"batch_size": cls.default_length.batch_size}

    @property
    def validations_without_gain(self) -> int | None:
        """Validations without a gain that end a run; None: it takes all its iterations."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run gives, without those that are neutral."""
        settings = asdict(self)
        return {name: value for name, value in settings.items() if self.neutral.get(name, _NOTHING) != value}

    @property
    def needs_gradients(self) -> bool:
        """Whether the network must be differentiable."""
        return self.has_backward

    @property
    def short(self) -> str | None:
        """What distinguishes runs of one search in their names, e.g. ``lr0.005``; None: nothing."""
        return None

    def begin(self, parameters: Tensor) -> DistillationState:
        """The state before the first iteration.

        Args:
            parameters: Parameters of the family at the start, shape (p,), float64.

        Raises:
            ValueError: Some parameters are not finite.
        """
        non_finite = int((~torch.isfinite(parameters)).sum())
        if non_finite:
            raise ValueError(
                f"{non_finite} of {len(parameters)} starting parameters are not finite; choose another start"
            )
        return self.state_type(parameters=parameters.tolist(), **self.memory(len(parameters)))

    def check_pairs(self, numbers: int, dimensions: int) -> None:
        """Check that the training pairs can determine what is learned, before any are made.

        A method that solves for all numbers at once would fit fewer residuals (one per pair and dimension) exactly, and
        lose on every other pair.

        Args:
            numbers: How many numbers are learned independently (:meth:`LearnableFamily.freedom`).
            dimensions: Dimensions of a sample.

        Raises:
            ValueError: The training pairs, or those of a full batch, have fewer residuals than ``numbers``.
        """
        needed = math.ceil(numbers / dimensions)
        for name, pairs in (("training_pairs", self.training_pairs), ("batch_size", self.batch_size)):
            if self.solves_for_all and pairs < needed:
                raise ValueError(
                    f"method {self.name!r} learns {numbers} numbers from {pairs} pairs of {dimensions} dimensions, "
                    f"which have only {pairs * dimensions} residuals; set {name} to at least {needed}, or use method "
                    f"'adam'"
                )

    def doubt_about_pairs(self, numbers: int, dimensions: int) -> str | None:
        """A sentence if the training pairs barely determine what is learned, so that it may fit them alone; or None.

        Args:
            numbers, dimensions: As for :meth:`check_pairs`.
        """
        residuals = self.training_pairs * dimensions
        if not self.solves_for_all or residuals >= ENOUGH_RESIDUALS * numbers:
            return None
        return (
            f"{self.training_pairs} training pairs of {dimensions} dimensions are few for {numbers} numbers; with "
            f"training_pairs of at least {math.ceil(ENOUGH_RESIDUALS * numbers / dimensions)}, the solver is better on "
            f"other samples"
        )

    def memory(self, count: int) -> dict[str, Any]:
        """Initial values of the fields that ``state_type`` adds, for ``count`` parameters."""
        return {}

    def iterate(self, state: DistillationState, steps: int, problem: Problem) -> Asking[DistillationState]:
        """Run ``steps`` more iterations, or fewer if the run ends; yields the queries they need.

        The result depends on the state alone: two calls with k steps equal one call with 2k, bit for bit, except for
        ``loss``, which is a mean over the last call. A run that has ended is returned as it is. A step to parameters
        that are not finite is not taken, and ends the run as 'diverged'.
        """
        losses: list[float] = []
        last = min(state.iteration + steps, self.iterations)
        while state.status == "running" and state.iteration < last:
            after, loss = yield from self.step(state, problem)
            if not all(map(math.isfinite, after.parameters)):
                state = replace(state, status="diverged")
                break
            state = after
            if math.isfinite(loss):
                losses.append(loss)
        if losses:
            state = replace(state, loss=sum(losses) / len(losses))
        if state.status == "running" and state.iteration >= self.iterations:
            state = replace(state, status="finished")
        return state

    @abstractmethod
    def step(self, state: Any, problem: Problem) -> Asking[tuple[DistillationState, float]]:
        """One iteration.

        Args:
            state: State of a running run, of the type ``state_type``.
            problem: What the run minimises.

        Returns:
            The state after it, and the batch's mean loss before it; NaN if that is not known.
        """

    def batch(self, iteration: int, pair_set: int = 0) -> list[int]:
        """Indices of the training pairs of an iteration, in one of the training sets."""
        return batch_indices(self.training_pairs, self.batch_size, self.seed_of(pair_set), iteration)

    def seed_of(self, pair_set: int) -> int:
        """Seed of the batch order in a training set; that of the first is the run's own."""
        return self.seed + SEED_STEP * pair_set

    def evaluations(self, state: DistillationState, nfe: int) -> tuple[int, int]:
        """Velocity evaluations, forward and backward, spent on training pairs up to ``state``."""
        spent = state.iteration * min(self.batch_size, self.training_pairs) * nfe
        return spent, spent if self.has_backward else 0
