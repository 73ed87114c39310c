"""Where a distillation runs: hosts of its model, storage, and what the model is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from orchestrator.config.base import PluginConfig
from orchestrator.models.base import Precision
from orchestrator.models.facts import ModelFacts
from orchestrator.pool.requests import Pool
from orchestrator.progress import Note, note
from orchestrator.storage import Storage


def _nothing(folders: Iterable[str]) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a distillation runs.

    Attributes:
        pool: Hosts of the model: one in this process, or Ray's.
        storage: Storage of the hosts, for pairs and for the state from which a killed distillation resumes.
        facts: Facts of the model.
        conditioning: Dataset that conditions the pairs.
        pairs_seed: Seed of all noise, ``pairs.seed`` of a configuration.
        hosts: Number of hosts.
        memory_bytes: Memory of a host's distillation step, beside the model.
        precision: Precision of the network in distillation steps.
        compile: Whether the network is compiled for distillation steps.
        wait: Whether to wait for another process that makes the same pairs.
        force: Whether to go on with a teacher that its examination refuses.
        announce: Receives progress notes, in sentences.
        need: Receives keys of folders in the storage before they are used, so that they are not deleted.
    """

    pool: Pool
    storage: Storage
    facts: ModelFacts
    conditioning: PluginConfig
    pairs_seed: int = 0
    hosts: int = 1
    memory_bytes: int = 10**9
    precision: Precision = "float32"
    compile: bool = False
    wait: bool = False
    force: bool = False
    announce: Note = note
    need: Callable[[Iterable[str]], object] = _nothing
