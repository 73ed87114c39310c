"""Interface of distillation methods: settings, state, steps, and cost of one way to move theta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from solvers.distil.state import DistillationState
from solvers.families.base import LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler


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
    """Asks for the mean PSNR loss of a solver on a batch: a float."""

    solver: NSSolver
    indices: list[int]


class NormalQuery(NamedTuple):
    """Asks for the normal equations at a solver, summed over a batch (``NormalEquations``).

    Attributes:
        solver: The solver.
        indices: The batch, as indices of training pairs.
        jacobian: 'forward', 'central' or 'jvp'.
        free: Mask over flat theta. Rows and columns of the entries outside it may be zero.
    """

    solver: NSSolver
    indices: list[int]
    jacobian: Any
    free: Tensor


Query = GradientQuery | LossQuery | NormalQuery


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A distillation method with its settings. A subclass's dataclass fields are its options.

    Class attributes:
        name: Name in configurations.
        label: Suffix of a solver's name in tables; None for the papers' own method.
        default_length: Length of a run unless a configuration sets it.
        logged: Options that are logged as parameters of a run.
        psnr_only: Whether it can minimise only the PSNR loss.
        has_backward: Whether it takes gradients by a backward pass.
        shares_batches: Whether its steps ask for single gradients, which can share model batches with other runs.

    Attributes:
        iterations: Length of the run.
        batch_size: Pairs per iteration.
        seed: Seed of the batch order.
        training_pairs: Number of pairs to draw from.
    """

    name: ClassVar[str]
    label: ClassVar[str | None] = None
    default_length: ClassVar[RunLength]
    logged: ClassVar[tuple[str, ...]] = ()
    psnr_only: ClassVar[bool] = False
    has_backward: ClassVar[bool] = False
    shares_batches: ClassVar[bool] = False

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

    @property
    @abstractmethod
    def needs_gradients(self) -> bool:
        """Whether the network must be differentiable."""

    @property
    def short(self) -> str | None:
        """What distinguishes runs of one search in their names, e.g. ``lr0.005``; None: nothing."""
        return None

    @abstractmethod
    def begin(self, parameters: Tensor) -> DistillationState:
        """The state before the first iteration, at these parameters of the family."""

    @abstractmethod
    def resume(self, saved: Mapping[str, Any]) -> DistillationState:
        """The state restored from the dictionary of its fields."""

    @abstractmethod
    def iterate(
        self,
        state: DistillationState,
        steps: int,
        family: LearnableFamily,
        scheduler: Scheduler,
        sigma0: float,
        *,
        in_parameters: bool = False,
    ) -> Generator[Query, Any, DistillationState]:
        """Run ``steps`` more iterations, or fewer if the run ends; yields the evaluations they need.

        Args:
            state: State to continue from.
            steps: Number of iterations.
            family: Learnable family whose parameters are moved.
            scheduler: Scheduler of the model's field.
            sigma0: Preconditioning.
            in_parameters: Whether the loss is a function of the family's parameters and not of theta.
        """

    @abstractmethod
    def evaluations(self, state: DistillationState, nfe: int) -> tuple[int, int]:
        """Velocity evaluations, forward and backward, spent on training pairs up to ``state``."""
