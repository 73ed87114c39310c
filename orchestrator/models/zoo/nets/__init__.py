"""Networks of the zoo: plain torch modules ``net(x, t, condition)``. They know nothing of paths, training or files.

A network also says what its conditioning is when it is dropped (``null_condition``), and what is wrong with some that
it cannot take (``condition_error``).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from orchestrator.models.zoo.nets.film_mlp import FilmMLP
from orchestrator.models.zoo.nets.infilling import Infilling
from orchestrator.models.zoo.nets.unet import UNet

NETS: dict[str, Any] = {"film_mlp": FilmMLP, "unet": UNet, "infilling": Infilling}


def build_net(architecture: dict[str, Any]) -> nn.Module:
    """The network that an ``{"net": name, **arguments}`` description names.

    Raises:
        ValueError: The name is unknown or the arguments do not fit it.
    """
    arguments = dict(architecture)
    name = arguments.pop("net", None)
    if name not in NETS:
        raise ValueError(f"unknown network {name!r}; choose one of {', '.join(NETS)}")
    try:
        return NETS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"network {name!r} does not take these arguments: {error}") from error
