"""A host refuses a network whose velocity of a sample is not a function of that sample, before any pair is made."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_spec_example import pair_spec
from torch import Tensor, nn

from orchestrator.errors import ConfigError
from orchestrator.hosts.host import Host
from orchestrator.hosts.network_check import SAMPLES
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs.ground_truth import NotFiniteError


class Net(nn.Module):
    """A velocity of six numbers, with one layer between two linear ones."""

    def __init__(self, between: nn.Module):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(6, 32), between, nn.Linear(32, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x.flatten(1)) + t[:, None]))).view(x.shape)


class FunctionalDropout(nn.Module):
    """Dropout without ``training=``, which eval() does not reach."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.02)


class Counting(nn.Module):
    """Keeps a state between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class WholeBatch(nn.Module):
    """Scales by a number of the whole batch, as dynamic quantisation does."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.std()


class Rounding(nn.Module):
    """Differs from call to call as sums in any order do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-6 * torch.randn_like(x))


class Overflowing(nn.Module):
    """Infinite for some samples."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x))[:, None] == 1, torch.inf, x)


def built(between: str, **kwargs: Any) -> nn.Module:
    """A network with that layer."""
    torch.manual_seed(0)
    return Net((getattr(nn, between, None) or globals()[between])(**kwargs))


def host_of(options: dict[str, Any], folder: Path) -> Host:
    """A host of that network."""
    described = {"shape": [1, 2, 3], "prediction": "velocity", "native_scheduler": "cond_ot"}
    name = "torch_module" if "factory" in options else "torchscript"
    return Host(HostSettings(adapter=name, options=described | options, storage=str(folder)))


def traced_in_training_mode(net: nn.Module, folder: Path) -> Path:
    """The network as TorchScript, traced before net.eval()."""
    path = folder / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net.train(), (torch.randn(2, 1, 2, 3), torch.rand(2)), check_trace=False)
        torch.jit.save(traced, path)
    return path


def first_shard(host: Host) -> None:
    """Make the first pairs with the host."""
    facts = host.facts()
    spec = pair_spec(model_digest=facts.digest, shape=facts.shape, rtol=1e-3, atol=1e-3)
    host.make_shard(spec, 0, 16)


RANDOM = r"is not deterministic: the same input gives velocities .* dropout that eval\(\) does not switch off"
COMPANY = r"depends on the other samples of its batch .* batch normalisation in training mode"


@pytest.mark.parametrize(
    ("between", "kwargs", "reason"),
    [
        ("FunctionalDropout", {}, RANDOM),
        ("Counting", {}, RANDOM),
        ("WholeBatch", {}, COMPANY),
        ("BatchNorm1d", {"num_features": 32, "track_running_stats": False}, COMPANY),
    ],
)
def test_a_module_that_is_not_a_function_of_the_sample_is_refused(
    tmp_path: Path, between: str, kwargs: dict[str, Any], reason: str
) -> None:
    """Every request is refused, with the likely cause, and nothing is written."""
    host = host_of({"factory": f"{__name__}:built", "kwargs": {"between": between} | kwargs}, tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match=reason):
            first_shard(host)
    assert not list(tmp_path.rglob("shard*"))


@pytest.mark.parametrize(
    ("layer", "reason"), [(nn.Dropout(0.1), RANDOM), (nn.BatchNorm1d(32), COMPANY)], ids=["dropout", "batch norm"]
)
def test_torchscript_traced_in_training_mode_is_refused(tmp_path: Path, layer: nn.Module, reason: str) -> None:
    """eval() has no effect on it; exported in evaluation mode, the same network is accepted."""
    net = Net(layer)
    with pytest.raises(ConfigError, match=reason):
        first_shard(host_of({"file": str(traced_in_training_mode(net, tmp_path))}, tmp_path))
    torch.jit.save(torch.jit.trace(net.eval(), (torch.randn(2, 1, 2, 3), torch.rand(2))), tmp_path / "net.pt")
    first_shard(host_of({"file": str(tmp_path / "net.pt")}, tmp_path))
    assert list(tmp_path.rglob("shard*"))


def test_rounding_that_differs_from_call_to_call_is_not_refused(tmp_path: Path) -> None:
    """Kernels of GPUs that add in any order are as good as deterministic. The check costs two evaluations, once."""
    host = host_of({"factory": f"{__name__}:built", "kwargs": {"between": "Rounding"}}, tmp_path)
    host._field(torch.zeros(8, dtype=torch.int64), 1.0)
    assert host.work.forwards == 2 * SAMPLES
    host._field(torch.zeros(8, dtype=torch.int64), 1.0)
    assert host.work.forwards == 2 * SAMPLES


def test_a_network_that_is_not_finite_from_the_start_is_refused(tmp_path: Path) -> None:
    """The message says at which time, for how many samples, and what to check; nothing of a time grid."""
    host = host_of({"factory": f"{__name__}:built", "kwargs": {"between": "Overflowing"}}, tmp_path)
    with pytest.raises(NotFiniteError, match=r"first evaluation, at t=0\.5, is not finite for 1 of 4 samples; check"):
        first_shard(host)
