"""Precision, checkpointing and compilation: their effect on distillation steps, and what they must not change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from orchestrator.config.pair_plan import PairKey
from orchestrator.config.reading import parse_config
from orchestrator.errors import ConfigError
from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.host import Host
from orchestrator.hosts.runs import LearnedRun
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.base import AUTOCAST, AutocastField, CompiledNetwork, Precision
from orchestrator.models.facts import ModelFacts
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs import PairSpec
from orchestrator.storage import Storage
from solvers.distil.methods.adam import Adam
from solvers.families import GridSolver
from solvers.families.bns import BNS
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid

TRAIN = PairKey("train", 1.0, 0)
INDICES = list(range(16))
LOWERED: list[Precision] = ["bfloat16", "float16"]
# Twice the largest error observed on this model, at a loss of about -3 per pair.
GRADIENT_ERROR = {"bfloat16": 0.1, "float16": 0.01}


@pytest.fixture(scope="module")
def make_host(
    made: Storage, specs: dict[PairKey, PairSpec], host_settings: Callable[..., HostSettings]
) -> Callable[..., Host]:
    """A function that builds a host with the small experiment's pairs and changed settings, once per settings."""
    hosts: dict[str, Host] = {}

    def make(**settings: Any) -> Host:
        key = repr(sorted(settings.items()))
        if key not in hosts:
            hosts[key] = Host(replace(host_settings(made), **settings))
        return hosts[key]

    return make


@pytest.fixture
def train_digest(specs: dict[PairKey, PairSpec]) -> str:
    """Digest of the training pairs."""
    return specs[TRAIN].name


def theta_of(facts: ModelFacts, nfe: int = 4) -> npt.NDArray[np.float64]:
    """Midpoint, slightly perturbed, so that no gradient is zero."""
    flat = GridSolver(Midpoint(), nfe, Grid()).to_ns(facts.scheduler).flat()
    return to_numpy(flat + 0.01 * torch.linspace(0.2, 1, len(flat), dtype=torch.float64))


def relative_error(actual: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def dtypes_inside(host: Host) -> list[torch.dtype]:
    """A list that collects the dtypes of the network's first matrix product from now on, after the host's own check."""
    seen: list[torch.dtype] = []
    host._field(torch.zeros(1, dtype=torch.int64), 1.0)
    net = host.model.net  # type: ignore[attr-defined]
    net.inward.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    return seen


# --- Precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOWERED)
def test_the_network_computes_in_the_configured_precision(
    made: Storage,
    specs: dict[PairKey, PairSpec],
    facts: ModelFacts,
    train_digest: str,
    host_settings: Callable[..., HostSettings],
    precision: Precision,
) -> None:
    """Autocast applies to the network's products, in gradients as in normal equations."""
    host = Host(replace(host_settings(made), precision=precision))
    seen = dtypes_inside(host)
    theta = theta_of(facts)
    host.loss_and_gradient(theta, train_digest, INDICES)
    host.normal_equations(theta, train_digest, INDICES[:2])
    host.loss(theta, train_digest, INDICES)
    assert set(seen) == {AUTOCAST[precision]}


@pytest.mark.parametrize("precision", LOWERED)
def test_pairs_and_scores_do_not_depend_on_the_precision(
    made: Storage,
    specs: dict[PairKey, PairSpec],
    facts: ModelFacts,
    train_digest: str,
    host_settings: Callable[..., HostSettings],
    storage: Storage,
    precision: Precision,
) -> None:
    """Ground truth and scores use the model as it was trained: the same bits as those of a plain host."""
    plain = Host(host_settings(made))
    lowered = Host(replace(host_settings(made), precision=precision))
    np.testing.assert_array_equal(
        lowered.sample(theta_of(facts), train_digest, INDICES), plain.sample(theta_of(facts), train_digest, INDICES)
    )
    spec = specs[TRAIN]
    copy = Storage.at(shutil.copytree(made.root, storage.root))
    remade = Host(replace(host_settings(copy), precision=precision)).make_shard(spec, 0, 16)
    assert remade == plain.make_shard(spec, 0, 16)


@pytest.mark.parametrize("precision", LOWERED)
def test_the_field_returns_float32_in_any_precision(make_host: Callable[..., Host], precision: Precision) -> None:
    """The network's output is cast to float32 before guidance, solver and loss use it."""
    model = make_host().model
    field = AutocastField(model.field(torch.arange(3), 3.0), AUTOCAST[precision] or torch.float32)
    x = torch.randn(3, 1, 8, 8)
    assert field(x, torch.tensor(0.4, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("precision", LOWERED)
def test_the_gradient_in_lower_precision_is_nearly_the_same(
    make_host: Callable[..., Host], facts: ModelFacts, train_digest: str, precision: Precision
) -> None:
    """It differs by the rounding of the network's products (bfloat16: 8 bits, float16: 11)."""
    theta = theta_of(facts)
    _, expected = make_host().loss_and_gradient(theta, train_digest, INDICES)
    loss, gradient = make_host(precision=precision).loss_and_gradient(theta, train_digest, INDICES)
    assert np.isfinite(loss)
    assert 0 < relative_error(gradient, expected) < GRADIENT_ERROR[precision]


@pytest.mark.parametrize("jacobian", ["forward", "central"])
def test_difference_steps_of_normal_equations_suit_the_networks_precision(
    make_host: Callable[..., Host], facts: ModelFacts, train_digest: str, jacobian: Any
) -> None:
    """A difference step for float32 would drown in bfloat16's rounding; with this one the gradient stays useful."""
    theta = theta_of(facts)
    expected = make_host().normal_equations(theta, train_digest, INDICES, "jvp")
    actual = make_host(precision="bfloat16").normal_equations(theta, train_digest, INDICES, jacobian)
    assert relative_error(actual.g.numpy(), expected.g.numpy()) < 0.3


def test_forward_mode_is_refused_under_autocast(
    make_host: Callable[..., Host], facts: ModelFacts, train_digest: str
) -> None:
    """torch's autocast casts a value but not its tangent. The error names the differences that work instead."""
    match = r"this model has no forward-mode derivative \(.+\); use jacobian='central' or 'forward'"
    with pytest.raises(ValueError, match=match):
        make_host(precision="bfloat16").normal_equations(theta_of(facts), train_digest, INDICES[:2], "jvp")


def test_a_run_in_bfloat16_learns(make_host: Callable[..., Host], facts: ModelFacts, train_digest: str) -> None:
    """A few steps of Adam lower the loss of the float32 model."""
    settings = Adam(learning_rate=5e-3, iterations=10, batch_size=16, training_pairs=48)
    run = LearnedRun(family="bns", options={}, sigma0=1.0, train=train_digest, method=settings)
    start = settings.begin(BNS().start(GridSolver(Midpoint(), 4, Grid()), facts.scheduler))
    state = make_host(precision="bfloat16").advance(run, start, 10)

    def loss_at(parameters: list[float]) -> float:
        solver = BNS().to_ns(torch.tensor(parameters, dtype=torch.float64), facts.scheduler, 1.0)
        return make_host().loss(to_numpy(solver.flat()), train_digest, list(range(48)))

    assert loss_at(state.parameters) < loss_at(start.parameters)


def test_batched_runs_compute_in_the_configured_precision(
    made: Storage,
    specs: dict[PairKey, PairSpec],
    facts: ModelFacts,
    train_digest: str,
    host_settings: Callable[..., Any],
) -> None:
    """Steps of several theta use the same field as those of one."""
    host = Host(replace(host_settings(made), precision="bfloat16"))
    seen = dtypes_inside(host)
    settings = Adam(iterations=1, batch_size=16, training_pairs=48)
    run = LearnedRun(family="bns", options={}, sigma0=1.0, train=train_digest, method=settings)
    start = settings.begin(BNS().start(GridSolver(Midpoint(), 4, Grid()), facts.scheduler))
    host.advance_batched([{"run": run, "state": start, "steps": 1}] * 2)
    assert set(seen) == {torch.bfloat16}


# --- Checkpointing -----------------------------------------------------------------------------------------------


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of the distinct storages that autograd saves while ``run`` runs."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # A reference to the tensor keeps its address from being reused.
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def saved_bytes_per_evaluation(host: Host, facts: ModelFacts, train_digest: str, fewer: int, more: int) -> float:
    """Bytes that autograd saves per additional evaluation, between two NFEs."""
    few, many = (
        saved_bytes(lambda nfe=nfe: host.loss_and_gradient(theta_of(facts, nfe), train_digest, ALL))  # type: ignore[misc]
        for nfe in (fewer, more)
    )
    return (many - few) / (more - fewer)


ALL = list(range(48))
STATE_BYTES = len(ALL) * 64 * 4


@pytest.mark.parametrize(("fewer", "more"), [(4, 8), (8, 16)])
def test_with_checkpointing_an_evaluation_takes_the_memory_of_two_states(
    make_host: Callable[..., Host], facts: ModelFacts, train_digest: str, fewer: int, more: int
) -> None:
    """These are x_i and u_i; the elements of theta add less than a tenth of a state."""
    assert saved_bytes_per_evaluation(make_host(checkpoint=True), facts, train_digest, fewer, more) < 2.1 * STATE_BYTES


def test_without_checkpointing_an_evaluation_takes_the_memory_of_the_activations(
    make_host: Callable[..., Host], facts: ModelFacts, train_digest: str
) -> None:
    """This is why checkpointing exists: even this small network's activations take dozens of states."""
    assert saved_bytes_per_evaluation(make_host(), facts, train_digest, 4, 8) > 20 * STATE_BYTES


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointing_does_not_change_the_gradient(
    make_host: Callable[..., Host], facts: ModelFacts, train_digest: str, precision: Precision
) -> None:
    """The second pass repeats the same operations in the same precision, so the bits are equal."""
    theta = theta_of(facts)
    loss, gradient = make_host(precision=precision, checkpoint=True).loss_and_gradient(theta, train_digest, INDICES)
    expected_loss, expected = make_host(precision=precision).loss_and_gradient(theta, train_digest, INDICES)
    assert loss == expected_loss
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("settings", [{}, {"checkpoint": True}, {"precision": "bfloat16", "checkpoint": True}])
def test_weights_never_get_gradients(
    made: Storage,
    specs: dict[PairKey, PairSpec],
    facts: ModelFacts,
    train_digest: str,
    host_settings: Callable[..., HostSettings],
    settings: dict[str, Any],
) -> None:
    """The network is frozen in every mode: none of its weights requires or has a gradient."""
    host = Host(replace(host_settings(made), **settings))
    host.loss_and_gradient(theta_of(facts), train_digest, INDICES)
    weights = list(host.model.net.parameters())  # type: ignore[attr-defined]
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights)


# --- Compilation -------------------------------------------------------------------------------------------------


class _Splits(torch.nn.Module):
    """A network that cannot be compiled in one graph: its control flow depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


class _NoNetwork(ZooModel):
    """An adapter whose network is not in ``net``."""

    net = None  # type: ignore[assignment]

    def __init__(self) -> None:
        """Load nothing."""


def test_a_network_that_cannot_be_compiled_in_one_graph_is_refused() -> None:
    """The error gives the compiler's reason and a remedy. A silent fallback would hide the failure."""
    match = r"the network of toy cannot be compiled \(\w+: .+\); set resources\.compile to false"
    with pytest.raises(ConfigError, match=match):
        CompiledNetwork(_Splits(), "toy")(torch.ones(2, 2))


def test_an_adapter_whose_network_is_not_in_net_cannot_be_compiled() -> None:
    with pytest.raises(ConfigError, match="_NoNetwork has no network 'net' to compile; set it to false"):
        _NoNetwork().compiled()


def test_the_compiled_twin_shares_the_weights_and_does_not_change_the_model() -> None:
    """Weights are not copied, and pairs and scores still use the uncompiled network."""
    model = ZooModel("digits_fm_ot")
    net = model.net
    twin = model.compiled()
    assert model.net is net
    assert [id(weight) for weight in twin.net.parameters()] == [id(weight) for weight in net.parameters()]
    assert twin.digest == model.digest


@pytest.mark.slow  # the compiler takes a minute
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo reads it, the test does not
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_a_compiled_network_gives_the_same_gradient(
    make_host: Callable[..., Host], facts: ModelFacts, train_digest: str
) -> None:
    """They are equal up to rounding, with checkpointing too."""
    theta = theta_of(facts)
    expected_loss, expected = make_host().loss_and_gradient(theta, train_digest, INDICES)
    host = make_host(compile=True, checkpoint=True)
    loss, gradient = host.loss_and_gradient(theta, train_digest, INDICES)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert relative_error(gradient, expected) < 1e-3


# --- Configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "problem"),
    [
        ({"precision": "fp16"}, r"resources\.precision: Input should be 'float32', 'bfloat16' or 'float16'"),
        ({"checkpoint": "yes"}, r"resources\.checkpoint: Input should be a valid boolean"),
        ({"compile": 1}, r"resources\.compile: Input should be a valid boolean"),
    ],
)
def test_a_wrong_option_is_refused_by_name(experiment: dict[str, Any], resources: Any, problem: str) -> None:
    experiment["resources"] = resources
    with pytest.raises(ConfigError, match=problem):
        parse_config(experiment, "x.yaml")


def test_the_default_resources_change_no_step(experiment: dict[str, Any]) -> None:
    """Own precision of the network, no second evaluation, no compiler."""
    resources = parse_config(experiment, "x.yaml").resources
    assert (resources.precision, resources.checkpoint, resources.compile) == ("float32", False, False)
