"""A detector compares one number of the evidence with its limits; what is beyond them is a finding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

from orchestrator.hosts.teacher.evidence import Evidence

Severity = Literal["refused", "noted"]


class Finding(NamedTuple):
    """What is wrong with a teacher.

    Attributes:
        name: Name of the detector.
        severity: 'refused' stops what needs many pairs; 'noted' is a warning.
        sentence: What was measured, and what it means.
        remedy: What to do about it.
    """

    name: str
    severity: Severity
    sentence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}; {self.remedy}"


class Reading(NamedTuple):
    """A detector's row in the table.

    Attributes:
        name: Name of the detector.
        quantity: What is measured.
        value: The number; None if it does not apply or could not be measured.
        limit: The limits in words.
        finding: What is wrong; None if nothing is.
    """

    name: str
    quantity: str
    value: float | None
    limit: str
    finding: Finding | None


class Detector(ABC):
    """Compares one number with its limits.

    Attributes:
        name: Short name.
        quantity: What is measured, for the table.
        noted, refused: Limits; beyond ``refused`` the teacher is refused, beyond ``noted`` it is noted. None: not done.
        least: Smallest value that is not noted, if small values are the fault.
        remedy: What to do.
    """

    name: ClassVar[str]
    quantity: ClassVar[str]
    noted: ClassVar[float | None] = None
    refused: ClassVar[float | None] = None
    least: ClassVar[float | None] = None
    remedy: ClassVar[str]

    @abstractmethod
    def value(self, evidence: Evidence) -> float | None:
        """The number; None if it does not apply or could not be measured."""

    @abstractmethod
    def sentence(self, value: float, evidence: Evidence) -> str:
        """What a number beyond a limit means."""

    def severity(self, value: float, evidence: Evidence) -> Severity | None:
        """How bad the number is; None if it is within the limits."""
        if self.refused is not None and not value <= self.refused:
            return "refused"
        if self.noted is not None and not value <= self.noted:
            return "noted"
        return "noted" if self.least is not None and value < self.least else None

    @property
    def limit(self) -> str:
        parts = [f"at least {self.least:.3g}"] if self.least is not None else []
        if self.noted is not None:
            parts.append(f"at most {self.noted:.3g}")
        if self.refused is not None:
            parts.append(f"refused beyond {self.refused:.3g}")
        return ", ".join(parts)

    def read(self, evidence: Evidence) -> Reading:
        value = self.value(evidence)
        severity = None if value is None else self.severity(value, evidence)
        finding = None
        if value is not None and severity is not None:
            finding = Finding(self.name, severity, self.sentence(value, evidence), self.remedy)
        return Reading(self.name, self.quantity, value, self.limit, finding)
