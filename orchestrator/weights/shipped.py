"""Small networks whose weights ship with the package: one safetensors file each, with facts about it as metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from orchestrator.storage import Storage
from orchestrator.weights.frozen import freeze

Net = TypeVar("Net", bound=nn.Module)


def load_shipped(net: Net, file: Path, facts_key: str) -> tuple[Net, dict[str, Any]]:
    """The network with its weights in float32, frozen; and what the file's metadata says of it under ``facts_key``."""
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()[facts_key])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    net.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    freeze(net)
    return net, facts


def ship(net: nn.Module, file: Path, facts_key: str, facts: dict[str, Any], *, half: bool = True) -> None:
    """Write the weights, in float16 if ``half``, and print the facts that go with them."""
    weights = {
        name: (tensor.half() if half and tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in net.state_dict().items()
    }
    Storage.at(file.parent).write(file.name, save(weights, {facts_key: json.dumps(facts, sort_keys=True)}))
    print(json.dumps(facts, indent=1))
