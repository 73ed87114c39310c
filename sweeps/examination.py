"""The teacher's examination before pairs are made in number: once per model, guidance scale and conditioning."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator import plugins
from orchestrator.errors import UserError
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.teacher.detectors import findings
from orchestrator.hosts.teacher.evidence import FORMAT, Evidence
from orchestrator.hosts.teacher.findings import Finding
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import complete
from orchestrator.pool.requests import Pool, Request
from orchestrator.progress import Note, stage
from orchestrator.storage import Storage, digest_of


class TeacherError(UserError):
    """The examination refuses the teacher."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is examined: a model at one guidance scale, with one source of conditions.

    Attributes:
        conditioning: Name and options of the dataset.
        content: Digest of the dataset's content.
        guidance_scale: Guidance scale.
        seed: Seed of the noise.
        rtol, atol: Tolerances of ground truth.
    """

    conditioning: Mapping[str, Any]
    content: str
    guidance_scale: float
    seed: int
    rtol: float
    atol: float

    @classmethod
    def of(cls, spec: PairSpec) -> Subject:
        """The subject whose pairs these are."""
        return cls(
            conditioning=spec.conditioning,
            content=spec.content,
            guidance_scale=spec.guidance_scale,
            seed=spec.seed,
            rtol=spec.rtol,
            atol=spec.atol,
        )

    def key(self, facts: ModelFacts) -> str:
        """Storage key of its evidence. The seed is left out: any noise will do."""
        model = (
            facts.digest,
            facts.shape,
            facts.device_class,
            facts.data_range,
        )  # the size of a sample can be an option
        content = (*model, self.content, self.guidance_scale)
        return f"teachers/v{FORMAT}-{digest_of([*content, self.rtol, self.atol])}.json"

    @property
    def label(self) -> str:
        guided = "" if self.guidance_scale == 1 else f" at guidance {self.guidance_scale:g}"
        return f"conditions from {self.conditioning['name']}{guided}"


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The result for one subject.

    Attributes:
        subject: What was examined.
        evidence: What was measured.
        stored: Whether it was measured by an earlier command.
    """

    subject: Subject
    evidence: Evidence
    stored: bool

    @property
    def findings(self) -> list[Finding]:
        return findings(self.evidence)


def subjects(specs: Collection[PairSpec]) -> list[Subject]:
    """The subjects of these pairs. Each takes noise and conditions from its first spec, a training set if any."""
    first: dict[str, Subject] = {}
    for spec in specs:
        first.setdefault(digest_of([_source(spec), spec.guidance_scale]), Subject.of(spec))
    return list(first.values())


def _source(spec: PairSpec) -> dict[str, Any]:
    """Name and options of the dataset, without those by which the sets of an experiment differ in their rows."""
    name, options = spec.conditioning["name"], spec.conditioning["options"]
    parts = plugins.build("datasets", name, options).split_options("train")
    return {"name": name, "options": {option: value for option, value in options.items() if option not in parts}}


def stored(storage: Storage, facts: ModelFacts, subject: Subject) -> Evidence | None:
    """Evidence of an earlier examination; None if there is none, or if it is damaged."""
    key = subject.key(facts)
    if not storage.exists(key):
        return None
    try:
        return Evidence.from_dict(storage.read_json(key))
    except (KeyError, TypeError, ValueError):
        return None


def examine(storage: Storage, pool: Pool, facts: ModelFacts, subject: Subject) -> Examination:
    """Read stored evidence, or measure it and store it."""
    if (evidence := stored(storage, facts, subject)) is not None:
        return Examination(subject=subject, evidence=evidence, stored=True)
    with stage(f"examining the teacher, {subject.label}"):
        evidence = pool.call(
            Request.of(
                HostProtocol.examine,
                conditioning=subject.conditioning,
                seed=subject.seed,
                guidance_scale=subject.guidance_scale,
                rtol=subject.rtol,
                atol=subject.atol,
            )
        )
    storage.write_json(subject.key(facts), evidence.to_dict())
    return Examination(subject=subject, evidence=evidence, stored=False)


def check_teacher(
    storage: Storage, pool: Pool, facts: ModelFacts, specs: Collection[PairSpec], *, force: bool, announce: Note
) -> list[Subject]:
    """Examine the teacher of the pair sets that are still to be made, and announce what is found.

    Args:
        storage: Storage of pairs and evidence.
        pool: Hosts of the model.
        facts: Facts of the model.
        specs: The pair sets that are needed; of complete ones the teacher is not examined.
        force: Whether to go on with a teacher that is refused.
        announce: Receives a sentence per finding.

    Returns:
        The subjects that were examined now; the others' evidence is an earlier command's.

    Raises:
        TeacherError: The teacher is refused, and ``force`` is false.
    """
    made = complete(storage, specs)
    missing = [spec for spec in specs if spec.name not in made]
    refused: list[str] = []
    examinations = [examine(storage, pool, facts, subject) for subject in subjects(missing)]
    for examination in examinations:
        subject = examination.subject
        for finding in examination.findings:
            if finding.severity == "refused":
                refused.append(f"{subject.label}: {finding}")
            else:
                announce(f"the teacher, {subject.label}: {finding}")
    examined = [examination.subject for examination in examinations if not examination.stored]
    if not refused:
        return examined
    listed = "; ".join(refused)
    if not force:
        raise TeacherError(
            f"the examination of {facts.name} refuses it before pairs are made: {listed}. `bespoke check` on this "
            f"configuration shows what was measured; --force goes on"
        )
    announce(f"the examination of {facts.name} refuses it, and --force goes on: {listed}")
    return examined
