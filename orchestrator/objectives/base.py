"""What an objective is: a loss of each pair. A new one is one file beside this one, with an ``OBJECTIVE``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from orchestrator.pairs import PairSet
from solvers.families import LearnableFamily
from solvers.field import VelocityField
from solvers.ns import NSSolver


@dataclass(frozen=True)
class Objective(ABC):
    """A loss per pair, whose mean over pairs is minimised. A subclass's fields are its options. Stateless.

    Iterates are always chosen by validation PSNR, whatever is minimised: results of two objectives can be compared.
    """

    #: Whether the training pairs must hold the trajectories between their ends.
    needs_trajectory: ClassVar[bool] = False
    #: Published source of the loss.
    source: ClassVar[str]

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for tables and figures."""

    def check(self, family: LearnableFamily) -> None:  # noqa: B027 (optional: most objectives fit every family)
        """Refuse a family that the loss is not defined for.

        Raises:
            ValueError: Naming the family and the remedy.
        """


@dataclass(frozen=True)
class SolverObjective(Objective):
    """A loss of the solver's own samples or states: defined for every NS solver, whatever family it comes from."""

    @abstractmethod
    def per_sample(self, solver: NSSolver, field: VelocityField, pairs: PairSet) -> Tensor:
        """The losses, shape (B,), differentiable in theta.

        Args:
            solver: theta.
            field: The velocity of these pairs' conditioning.
            pairs: B pairs on the field's device.
        """


@dataclass(frozen=True)
class FamilyObjective(Objective):
    """A loss of the family's own steps, which the NS form no longer shows."""

    @abstractmethod
    def per_sample(
        self, family: LearnableFamily, parameters: Tensor, sigma0: float, field: VelocityField, pairs: PairSet
    ) -> Tensor:
        """The losses, shape (B,), differentiable in ``parameters``."""
