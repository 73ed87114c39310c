"""Interface of objectives: losses per pair. A new objective is a file in this folder that defines ``OBJECTIVE``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from orchestrator.content import digest
from orchestrator.pairs import PairSet
from solvers.families import LearnableFamily
from solvers.field import VelocityField
from solvers.ns import NSSolver


@dataclass(frozen=True)
class Objective(ABC):
    """A loss per pair, whose mean over pairs is minimised. Stateless. A subclass's fields are its options.

    The best iterate is always chosen by validation PSNR, so that results of different objectives are comparable.
    """

    #: Whether the training pairs must include the trajectories between their ends.
    needs_trajectory: ClassVar[bool] = False
    #: Published source of the loss.
    source: ClassVar[str]

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for tables and figures."""

    @property
    def content(self) -> str:
        """sha256 of everything of the user's that the loss depends on: options, and the content of weights."""
        return digest({f.name: getattr(self, f.name) for f in fields(self)})

    def check(self, family: LearnableFamily) -> None:  # noqa: B027 (optional: most objectives fit every family)
        """Check that the loss is defined for ``family``.

        Raises:
            ValueError: It is not; the message names the family and the remedy.
        """

    def check_shape(self, shape: tuple[int, ...]) -> None:  # noqa: B027 (optional: most objectives take any samples)
        """Check that the loss is defined for samples of this shape, as solved.

        Raises:
            ValueError: It is not; the message says which shapes it takes.
        """


@dataclass(frozen=True)
class SolverObjective(Objective):
    """A loss on the solver's samples or states, defined for every NS solver whatever its family."""

    @abstractmethod
    def per_sample(self, solver: NSSolver, field: VelocityField, pairs: PairSet) -> Tensor:
        """The losses, shape (B,), differentiable in theta.

        Args:
            solver: theta as a solver.
            field: The velocity field under the conditioning of these pairs.
            pairs: B pairs on the field's device.
        """


@dataclass(frozen=True)
class FamilyObjective(Objective):
    """A loss on the family's own steps, which cannot be recovered from the NS form."""

    @abstractmethod
    def per_sample(
        self, family: LearnableFamily, parameters: Tensor, sigma0: float, field: VelocityField, pairs: PairSet
    ) -> Tensor:
        """The losses, shape (B,), differentiable in ``parameters``."""
