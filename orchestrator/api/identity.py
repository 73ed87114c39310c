"""What a function or a module of this process is known by, also after it was trained on or has filled its caches."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.models._fingerprint import Fingerprint
from orchestrator.models.in_process import Live
from orchestrator.progress import note
from orchestrator.weights.frozen import frozen


class LiveNetwork:
    """A function or a module, and what it is known by.

    Attributes:
        network: The function or module.
        networks: The torch modules that it consists of, or refers to.
    """

    def __init__(self, network: Callable[..., Any], name: str):
        self.network, self.name = network, name
        self.networks = Fingerprint.networks_of(network)
        self._salt, self._warned = secrets.token_hex(16), False
        self._before: dict[str, str | None] = {}  # what the network changes by running, as it was before

    def live(self) -> Live:
        """The network under its identity at this time; a sentence says what of it has no digest."""
        fingerprint = Fingerprint.of(self.network)
        for path, value in self._before.items():
            if value is None:
                fingerprint.parts.pop(path, None)
            else:
                fingerprint.parts[path] = value
        if not fingerprint.unknown:
            return Live.of(self.network, fingerprint.digest, self.name)
        if not self._warned:
            listed = ", ".join(f"{path} ({kind})" for path, kind in list(fingerprint.unknown.items())[:3])
            note(
                f"{self.name} refers to what has no digest: {listed}. What is stored for it will not be used after "
                f"this Model; make a new Model if you change that"
            )
            self._warned = True
        return Live.of(self.network, f"{fingerprint.digest}-{self._salt}", self.name)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Evaluation mode without gradients while this lasts; what changes meanwhile are caches and counters."""
        before = Fingerprint.of(self.network)
        try:
            with frozen(self.networks):
                yield
        finally:
            for path in Fingerprint.of(self.network).changed(before):
                self._before.setdefault(path, before.parts.get(path))
