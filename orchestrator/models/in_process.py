"""``in_process``: a function or a module that lives in the process of a notebook or a script, for the Python API."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import cloudpickle
import torch

from orchestrator.content import is_own_module
from orchestrator.errors import UserError
from orchestrator.models._described import DescribedModel
from orchestrator.models._fingerprint import Fingerprint
from orchestrator.weights.frozen import freeze

ONLY_HERE = (
    "the model lives only in the process of the notebook or script that made it; give it there to orchestrator.Model, "
    "or put its class in a file and use the adapter 'torch_module'"
)
"""The error for a model that was in another process."""


class Live(str):
    """Identity of a function or a module, as text, with the thing itself.

    A configuration and its digest see the text. Ray sends the thing along, with all of the user's code that it needs.

    Attributes:
        network: The function or the module.
        shown: Its name.
    """

    network: Any
    shown: str

    @classmethod
    def of(cls, network: Any, identity: str, shown: str) -> Live:
        """``network`` under an identity that changes whenever its numbers may."""
        live = cls(identity)
        live.network, live.shown = network, shown
        return live

    def __deepcopy__(self, memo: dict[int, Any]) -> Live:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (_packed(self.network, self.shown), str(self), self.shown)


def _packed(network: Any, shown: str) -> bytes:
    """The function or module as a pickle that holds the user's own code, which other machines do not have.

    Raises:
        UserError: It cannot be pickled; names the reason and the remedy.
    """
    own = [module for name, module in sys.modules.copy().items() if name != "__main__" and is_own_module(name)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(network)
    except Exception as error:  # whatever an object in it raises
        raise UserError(
            f"{shown} lives in this process only, and cannot be sent to hosts ({error}); put its class in a file and "
            f"its weights beside it, and use Model.from_file"
        ) from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def _unpacked(packed: bytes, identity: str, shown: str) -> Live:
    return Live.of(cloudpickle.loads(packed), identity, shown)


@dataclass
class InProcess(DescribedModel):
    """A function or a module that lives in the process of a notebook or a script; ``orchestrator.Model`` makes it.

    Attributes:
        network: The function or module, and its identity.

    The options of :class:`DescribedModel` describe its shape and conventions, and the errors are documented there.
    """

    network: Any = field()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.network, Live):
            raise self.refused(ONLY_HERE)
        self.name = self.network.shown

    def inspect(self) -> None:
        """Nothing has to be loaded."""

    @cached_property
    def networks(self) -> list[torch.nn.Module]:
        """The torch modules that it consists of, or refers to."""
        return Fingerprint.networks_of(self.network.network)

    def load(self) -> Callable[..., Any]:
        for network in self.networks:
            freeze(network)
        return self.network.network

    def to(self, device: str) -> InProcess:
        for network in self.networks:
            network.to(device)
        return self

    @cached_property
    def parameters(self) -> int:  # type: ignore[override]
        return sum(weight.numel() for network in self.networks for weight in network.parameters())

    @cached_property
    def network_dtype(self) -> torch.dtype:  # type: ignore[override]
        weights = (weight for network in self.networks for weight in [*network.parameters(), *network.buffers()])
        return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)

    def identity(self) -> Iterable[Any]:
        yield "in process"
        yield from super().identity()


ADAPTER = InProcess
