"""The journal of a distillation: results of its stages, from which a killed command resumes."""

from __future__ import annotations

import dataclasses
from typing import Any

from orchestrator.storage import Storage, digest_of
from sweeps.distil.place import Place
from sweeps.distil.settings import DistilSettings

FORMAT = 1
"""Incremented whenever equal settings would give another theta. It begins the name of every folder."""


def folder(place: Place, settings: DistilSettings) -> str:
    """Folder of the journal: it depends on everything that decides the thetas."""
    facts = place.facts
    content = {
        "settings": dataclasses.asdict(settings),
        "model": facts.digest,
        "device_class": facts.device_class,
        "conditioning": place.conditioning.build("datasets").content,
        "pairs_seed": place.pairs_seed,
        "precision": place.precision,
        "compile": place.compile,
    }
    return f"distillations/v{FORMAT}-{digest_of(content)}"


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
