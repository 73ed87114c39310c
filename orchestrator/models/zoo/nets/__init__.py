"""Networks of the zoo: plain torch modules ``net(x, t, condition)``, independent of schedulers, training and files.

A network also defines the conditioning that stands for a dropped one (``null_condition``), and describes the problem
with conditioning that it cannot take (``condition_error``).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from orchestrator.models.zoo.nets.film_mlp import FilmMLP
from orchestrator.models.zoo.nets.infilling import Infilling
from orchestrator.models.zoo.nets.unet import UNet

NETS: dict[str, Any] = {"film_mlp": FilmMLP, "unet": UNet, "infilling": Infilling}


def build_net(architecture: dict[str, Any]) -> nn.Module:
    """Build the network described by ``{"net": name, **arguments}``.

    Raises:
        ValueError: The name is unknown or the arguments do not fit the network.
    """
    arguments = dict(architecture)
    name = arguments.pop("net", None)
    if name not in NETS:
        raise ValueError(f"unknown network {name!r}; choose one of {', '.join(NETS)}")
    try:
        return NETS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"network {name!r} does not take these arguments: {error}") from error
