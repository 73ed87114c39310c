"""``built``: an adapter object that lives in the process of a notebook or a script, for the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.models.base import ModelAdapter
from orchestrator.models.in_process import ONLY_HERE, Live


@dataclass
class Built:
    """An adapter that was built in this process, of a class of yours or around a pipeline, by ``orchestrator.Model``.

    Building this plugin returns that adapter itself.

    Attributes:
        adapter: The adapter, and its digest.
    """

    adapter: Any

    def __new__(cls, adapter: Any) -> Any:
        if not isinstance(adapter, Live):
            raise ConfigError(f"model adapter 'built': {ONLY_HERE}")
        return adapter.network

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        cls(**options)

    @classmethod
    def without_network(cls, options: dict[str, Any]) -> ModelAdapter:
        adapter: ModelAdapter = cls(**options)  # type: ignore[assignment]
        return adapter

    @classmethod
    def check_conditioning(cls, options: dict[str, Any], dataset: Any) -> None:
        """Conditions are checked when they are encoded: an adapter object has no options to check them with."""

    @classmethod
    def check_guidance(cls, options: dict[str, Any], scale: float) -> None:
        """Guidance is checked when it is used."""

    @classmethod
    def default_conditioning(cls, options: dict[str, Any]) -> dict[str, Any]:
        adapter = cls.without_network(options)
        network = getattr(adapter, "network", adapter)  # of a pipeline
        if getattr(network, "encoders", ()):
            raise ConfigError(f"{adapter.name} is a text model; give prompts as conditions")
        return {"name": "labels", "options": {"classes": getattr(network, "classes", None) or 1}}


ADAPTER = Built
