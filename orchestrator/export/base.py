"""What an exporter provides: theta, written for another program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from orchestrator.errors import UserError
from orchestrator.storage import Storage
from solvers.theta import ThetaArtifact


class ExportError(UserError):
    """A destination that cannot take the export, or a theta that the target cannot express."""


class Exporter(ABC):
    """Writes a theta artifact in one format. Stateless: ``EXPORTER()`` makes one.

    Attributes:
        name: Module name, as ``bespoke export --to`` takes it.
    """

    name: ClassVar[str]

    @abstractmethod
    def export(self, artifact: ThetaArtifact, destination: Path) -> list[Path]:
        """Write ``artifact`` to ``destination``; a file that is there is replaced.

        Args:
            artifact: The solver with its provenance.
            destination: A file or a folder, whichever the format consists of.

        Returns:
            The files written.

        Raises:
            ExportError: The destination does not suit the format.
            InvalidThetaError: theta holds numbers that no solver has.
        """


def check_artifact(artifact: ThetaArtifact) -> ThetaArtifact:
    """The artifact as it would be read back from its JSON: what a loader would refuse is never written.

    Raises:
        InvalidThetaError: theta holds a number that is not finite, a time outside [0, 1], or unusable provenance.
    """
    return ThetaArtifact.from_json(artifact.to_json(), origin="theta to be exported")


def write_file(destination: Path, suffix: str, data: bytes) -> list[Path]:
    """Write the one file of a format, complete under its name or not at all.

    Raises:
        ExportError: The destination is a folder, or ends in another suffix.
        StoreError: The disk is full.
    """
    if destination.is_dir() or destination.suffix != suffix:
        raise ExportError(
            f"the export is one file that ends in {suffix}, and the destination is {destination}; write for example "
            f"{destination / ('theta' + suffix) if destination.is_dir() else destination.with_suffix(suffix)}"
        )
    Storage.at(destination.parent).write(destination.name, data)
    return [destination]
