"""Where a distillation runs: hosts of its model, storage, and what the model is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.base import PluginConfig
from orchestrator.models.facts import ModelFacts
from orchestrator.pool.requests import Pool
from orchestrator.progress import Note, note
from orchestrator.storage import Storage


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
        wait: Whether to wait for another process that makes the same pairs.
        force: Whether to go on with a teacher that its examination refuses.
        announce: Receives progress notes, in sentences.
    """

    pool: Pool
    storage: Storage
    facts: ModelFacts
    conditioning: PluginConfig
    pairs_seed: int = 0
    hosts: int = 1
    wait: bool = False
    force: bool = False
    announce: Note = note
