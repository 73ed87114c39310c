"""Steps of a pair set, chosen by a host once and stored in the folder of the adaptive pairs that they stand in for."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

from orchestrator.hosts.protocols import HostProtocol
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.steps import SAMPLES, ChosenSteps
from orchestrator.pool.requests import Pool, Request
from orchestrator.storage import Storage


@dataclass(frozen=True)
class SharedSteps:
    """Steps of a pair set.

    Attributes:
        chosen: The steps, and the evaluations that their choice took.
        seconds: Wall time of the choice.
        reused: Whether they are from an earlier command.
    """

    chosen: ChosenSteps
    seconds: float
    reused: bool

    def of(self, spec: PairSpec) -> PairSpec:
        """A spec whose pairs are solved on these steps; the spec itself if adaptive steps take fewer evaluations."""
        return replace(spec, steps=self.chosen.steps)


def find_steps(storage: Storage, pool: Pool, spec: PairSpec, samples: int = SAMPLES) -> SharedSteps:
    """Steps for all pairs of a spec; a host chooses them on the first pairs unless they are stored.

    Pairs of other seeds and counts may be solved on them too, if model, guidance scale and tolerances are the same.

    Args:
        storage: Storage of the pairs, where the steps are kept.
        pool: Hosts of the model.
        spec: A spec without steps.
        samples: Number of pairs on which they are chosen.
    """
    key = f"{PairStore(storage, spec).folder}/steps-{samples}.json"
    if storage.exists(key):
        try:
            content = storage.read_json(key)
            times = content["chosen"]["steps"]
            chosen = ChosenSteps(**content["chosen"] | {"steps": None if times is None else tuple(times)})
            return SharedSteps(chosen, content["seconds"], reused=True)
        except (ValueError, KeyError, TypeError):  # of another version, or damaged
            storage.delete(key)
    begin = time.monotonic()
    chosen = pool.call(Request.of(HostProtocol.choose_steps, spec=spec, samples=samples))
    seconds = time.monotonic() - begin
    storage.write_json(key, {"chosen": asdict(chosen), "seconds": seconds})
    return SharedSteps(chosen, seconds, reused=False)
