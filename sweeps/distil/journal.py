"""The journal of a distillation: results of its stages, from which a killed command resumes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np

from orchestrator.pool.requests import Outcome, Pool, R, Request
from orchestrator.results.inventory import DISTILLATIONS_FORMAT
from orchestrator.storage import Storage, digest_of
from sweeps.distil.place import Place
from sweeps.distil.settings import DistilSettings


def folder(place: Place, settings: DistilSettings) -> str:
    """Folder of the journal: it depends on everything that decides the thetas."""
    facts = place.facts
    content = {
        "settings": dataclasses.asdict(settings),
        "model": facts.digest,
        "shape": facts.shape,
        "data_range": facts.data_range,
        "device_class": facts.device_class,
        "conditioning": place.conditioning.build("datasets").content,
        "pairs_seed": place.pairs_seed,
        "precision": place.precision,
        "compile": place.compile,
    }
    return f"distillations/v{DISTILLATIONS_FORMAT}-{digest_of(content)}"


class Journal:
    """Results of stages, by name, as JSON objects. Each is written when its stage is paid for.

    Args:
        storage: The storage.
        folder: Its folder there.
    """

    def __init__(self, storage: Storage, folder: str):
        self.storage, self.folder = storage, folder

    def read(self, name: str) -> Any:
        """The result of a stage; None if it has none, or if it is damaged."""
        key = self._key(name)
        if not self.storage.exists(key):
            return None
        try:
            return self.storage.read_json(key)
        except ValueError:
            return None

    def write(self, name: str, content: Any) -> None:
        """Record the result of a stage, atomically."""
        self.storage.write_json(self._key(name), content)

    def _key(self, name: str) -> str:
        return f"{self.folder}/{name}.json"


class RecordedPool(Pool):
    """A pool whose answers, lists of vectors, are recorded in order, so that a killed command does not ask again.

    Args:
        pool: The pool.
        journal: Where the answers are recorded.
        name: Name of the first answer's stage, without its number.
    """

    def __init__(self, pool: Pool, journal: Journal, name: str):
        self.pool, self.journal, self.name = pool, journal, name
        self.asked = 0

    def map(self, requests: Iterable[Request[R]]) -> Iterator[Outcome[R]]:
        for index, request in enumerate(requests):
            name = f"{self.name}-{self.asked}"
            self.asked += 1
            answer = self.journal.read(name)
            if answer is None:
                values = cast(list[Any], self.pool.call(request))
                # JSON has no numbers that are not finite.
                answer = [[v if math.isfinite(v) else str(v) for v in value.tolist()] for value in values]
                self.journal.write(name, answer)
            yield Outcome(index, cast(R, [np.array([float(v) for v in value]) for value in answer]), None)
