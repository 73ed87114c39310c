"""Precision, checkpointing and compilation of distillation steps: what they change, and what they leave alone."""

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
from orchestrator.hosts.distillation import LearnedRun, to_numpy
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.base import AUTOCAST, AutocastField, CompiledNetwork, Precision
from orchestrator.models.facts import ModelFacts
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs import PairSpec
from orchestrator.storage import Storage
from solvers.distil.adam import AdamSettings, AdamState
from solvers.families import GridSolver
from solvers.families.bns import BNS
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid

TRAIN = PairKey("train", 1.0, 0)
INDICES = list(range(16))
LOWERED: list[Precision] = ["bfloat16", "float16"]
# Twice the largest error seen on this model, where a theta's loss is about -3 a pair.
GRADIENT_ERROR = {"bfloat16": 0.1, "float16": 0.01}


@pytest.fixture(scope="module")
def make_host(
    made: Storage, specs: dict[PairKey, PairSpec], host_settings: Callable[..., HostSettings]
) -> Callable[..., Host]:
    """A host of the small experiment's pairs, with other settings; each is made once."""
    known: dict[str, Host] = {}

    def make(**settings: Any) -> Host:
        key = repr(sorted(settings.items()))
        if key not in known:
            known[key] = Host(replace(host_settings(made), **settings))
        return known[key]

    return make


@pytest.fixture
def train(specs: dict[PairKey, PairSpec]) -> str:
    """Digest of the training pairs."""
    return specs[TRAIN].digest


def theta_of(facts: ModelFacts, nfe: int = 4) -> npt.NDArray[np.float64]:
    """Midpoint, a little off, so that no gradient is zero."""
    flat = GridSolver(Midpoint(), nfe, Grid()).to_ns(facts.scheduler).flat()
    return to_numpy(flat + 0.01 * torch.linspace(0.2, 1, len(flat), dtype=torch.float64))


def relative(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def dtypes_inside(host: Host) -> list[torch.dtype]:
    """The dtypes that the network's first matrix product gives from now on."""
    seen: list[torch.dtype] = []
    net = host.model.net  # type: ignore[attr-defined]
    net.inward.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    return seen


# --- Precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOWERED)
def test_the_network_computes_in_the_precision_asked_for(
    made: Storage,
    specs: dict[PairKey, PairSpec],
    facts: ModelFacts,
    train: str,
    host_settings: Callable[..., HostSettings],
    precision: Precision,
) -> None:
    """Autocast reaches the network's products, in gradients and in normal equations alike."""
    host = Host(replace(host_settings(made), precision=precision))
    seen = dtypes_inside(host)
    theta = theta_of(facts)
    host.loss_and_gradient(theta, train, INDICES)
    host.normal_equations(theta, train, INDICES[:2])
    host.loss(theta, train, INDICES)
    assert set(seen) == {AUTOCAST[precision]}


@pytest.mark.parametrize("precision", LOWERED)
def test_pairs_and_scores_are_the_networks_own_in_any_precision(
    made: Storage,
    specs: dict[PairKey, PairSpec],
    facts: ModelFacts,
    train: str,
    host_settings: Callable[..., HostSettings],
    storage: Storage,
    precision: Precision,
) -> None:
    """Ground truth and scores judge theta on the model as it was trained: bit for bit those of a plain host."""
    plain = Host(host_settings(made))
    lowered = Host(replace(host_settings(made), precision=precision))
    np.testing.assert_array_equal(
        lowered.sample(theta_of(facts), train, INDICES), plain.sample(theta_of(facts), train, INDICES)
    )
    spec = specs[TRAIN]
    there = Storage.at(shutil.copytree(made.root, storage.root))
    remade = Host(replace(host_settings(there), precision=precision)).make_shard(spec, 0)
    assert remade == plain.make_shard(spec, 0)


@pytest.mark.parametrize("precision", LOWERED)
def test_the_loss_is_taken_in_float32_of_float32_samples(make_host: Callable[..., Host], precision: Precision) -> None:
    """What leaves the network is float32 again before guidance, solver and loss see it."""
    model = make_host().model
    field = AutocastField(model.field(torch.arange(3), 3.0), AUTOCAST[precision] or torch.float32)
    x = torch.randn(3, 1, 8, 8)
    assert field(x, torch.tensor(0.4, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("precision", LOWERED)
def test_a_lower_precision_gives_nearly_the_same_gradient(
    make_host: Callable[..., Host], facts: ModelFacts, train: str, precision: Precision
) -> None:
    """theta's gradient is off by the rounding of the network's products (bfloat16: 8 bits, float16: 11)."""
    theta = theta_of(facts)
    _, expected = make_host().loss_and_gradient(theta, train, INDICES)
    loss, gradient = make_host(precision=precision).loss_and_gradient(theta, train, INDICES)
    assert np.isfinite(loss)
    assert 0 < relative(gradient, expected) < GRADIENT_ERROR[precision]


@pytest.mark.parametrize("jacobian", ["forward", "central"])
def test_normal_equations_take_their_steps_for_the_networks_precision(
    make_host: Callable[..., Host], facts: ModelFacts, train: str, jacobian: Any
) -> None:
    """A difference step made for float32 would drown in bfloat16's rounding; the gradient stays one to go by."""
    theta = theta_of(facts)
    expected = make_host().normal_equations(theta, train, INDICES, "jvp")
    found = make_host(precision="bfloat16").normal_equations(theta, train, INDICES, jacobian)
    assert relative(found.g.numpy(), expected.g.numpy()) < 0.3


def test_forward_mode_is_refused_where_autocast_breaks_it(
    make_host: Callable[..., Host], facts: ModelFacts, train: str
) -> None:
    """torch's autocast casts a value and not its tangent: told, with the differences that work instead."""
    match = r"this model has no forward-mode derivative \(.+\); use jacobian='central' or 'forward'"
    with pytest.raises(ValueError, match=match):
        make_host(precision="bfloat16").normal_equations(theta_of(facts), train, INDICES[:2], "jvp")


def test_a_run_in_bfloat16_learns(make_host: Callable[..., Host], facts: ModelFacts, train: str) -> None:
    """Adam goes down the same slope: a few steps lower the loss of the float32 model."""
    settings = AdamSettings(learning_rate=5e-3, iterations=10, batch_size=16, training_pairs=48)
    run = LearnedRun(family="bns", options={}, sigma0=1.0, train=train, settings=settings)
    start = AdamState.begin(BNS().start(GridSolver(Midpoint(), 4, Grid()), facts.scheduler))
    state = make_host(precision="bfloat16").advance(run, start, 10)

    def loss_at(parameters: list[float]) -> float:
        solver = BNS().to_ns(torch.tensor(parameters, dtype=torch.float64), facts.scheduler, 1.0)
        return make_host().loss(to_numpy(solver.flat()), train, list(range(48)))

    assert loss_at(state.parameters) < loss_at(start.parameters)


def test_runs_that_share_a_batch_compute_in_the_precision_too(
    made: Storage, specs: dict[PairKey, PairSpec], facts: ModelFacts, train: str, host_settings: Callable[..., Any]
) -> None:
    """Steps of several theta at once take the same field as those of one."""
    host = Host(replace(host_settings(made), precision="bfloat16"))
    seen = dtypes_inside(host)
    settings = AdamSettings(iterations=1, batch_size=16, training_pairs=48)
    run = LearnedRun(family="bns", options={}, sigma0=1.0, train=train, settings=settings)
    start = AdamState.begin(BNS().start(GridSolver(Midpoint(), 4, Grid()), facts.scheduler))
    host.advance_batched([{"run": run, "state": start, "steps": 1}] * 2)
    assert set(seen) == {torch.bfloat16}


# --- Checkpointing -----------------------------------------------------------------------------------------------


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of the distinct storages that autograd is given to save while ``run`` runs."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Held, so that no address is used twice.
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def growth(host: Host, facts: ModelFacts, train: str, fewer: int, more: int) -> float:
    """Bytes saved per further evaluation, between two NFEs."""
    few, many = (
        saved_bytes(lambda nfe=nfe: host.loss_and_gradient(theta_of(facts, nfe), train, ALL))  # type: ignore[misc]
        for nfe in (fewer, more)
    )
    return (many - few) / (more - fewer)


ALL = list(range(48))
STATE_BYTES = len(ALL) * 64 * 4


@pytest.mark.parametrize(("fewer", "more"), [(4, 8), (8, 16)])
def test_with_checkpointing_an_evaluation_costs_two_states_of_memory(
    make_host: Callable[..., Host], facts: ModelFacts, train: str, fewer: int, more: int
) -> None:
    """x_i and u_i; the few numbers of theta on top are less than a tenth of a state."""
    assert growth(make_host(checkpoint=True), facts, train, fewer, more) < 2.1 * STATE_BYTES


def test_without_checkpointing_an_evaluation_costs_the_networks_activations(
    make_host: Callable[..., Host], facts: ModelFacts, train: str
) -> None:
    """What checkpointing is for: this small network's activations are dozens of states."""
    assert growth(make_host(), facts, train, 4, 8) > 20 * STATE_BYTES


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointing_changes_no_gradient(
    make_host: Callable[..., Host], facts: ModelFacts, train: str, precision: Precision
) -> None:
    """The same operations, in the same precision the second time: equal to the last bit."""
    theta = theta_of(facts)
    loss, gradient = make_host(precision=precision, checkpoint=True).loss_and_gradient(theta, train, INDICES)
    expected_loss, expected = make_host(precision=precision).loss_and_gradient(theta, train, INDICES)
    assert loss == expected_loss
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("settings", [{}, {"checkpoint": True}, {"precision": "bfloat16", "checkpoint": True}])
def test_weights_never_get_gradients(
    made: Storage,
    specs: dict[PairKey, PairSpec],
    facts: ModelFacts,
    train: str,
    host_settings: Callable[..., HostSettings],
    settings: dict[str, Any],
) -> None:
    """The network is frozen in every mode: none of its weights has, or asks for, a gradient."""
    host = Host(replace(host_settings(made), **settings))
    host.loss_and_gradient(theta_of(facts), train, INDICES)
    weights = list(host.model.net.parameters())  # type: ignore[attr-defined]
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights)


# --- Compilation -------------------------------------------------------------------------------------------------


class _Splits(torch.nn.Module):
    """A network that no compiler takes whole: it looks at a number while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


class _NoNetwork(ZooModel):
    """An adapter that keeps its network elsewhere."""

    net = None  # type: ignore[assignment]

    def __init__(self) -> None:
        """Nothing to load."""


def test_a_network_that_cannot_be_compiled_whole_is_refused_and_not_run_as_it_is() -> None:
    """With the compiler's reason and the way out; a silent fallback would hide that the option has no effect."""
    match = r"the network of toy cannot be compiled \(\w+: .+\); set resources\.compile to false"
    with pytest.raises(ConfigError, match=match):
        CompiledNetwork(_Splits(), "toy")(torch.ones(2, 2))


def test_an_adapter_without_a_network_of_its_own_cannot_be_compiled() -> None:
    with pytest.raises(ConfigError, match="_NoNetwork has no network 'net' to compile; set it to false"):
        _NoNetwork().compiled()


def test_the_compiled_twin_shares_the_weights_and_leaves_the_model_alone() -> None:
    """No second copy in memory, and pairs and scores go on with the network as it is."""
    model = ZooModel("digits_fm_ot")
    net = model.net
    twin = model.compiled()
    assert model.net is net
    assert [id(weight) for weight in twin.net.parameters()] == [id(weight) for weight in net.parameters()]
    assert twin.digest == model.digest


@pytest.mark.slow  # the compiler takes a minute
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it; nobody reads it
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_a_compiled_network_gives_the_same_gradient(
    make_host: Callable[..., Host], facts: ModelFacts, train: str
) -> None:
    """To rounding, with checkpointing too."""
    theta = theta_of(facts)
    expected_loss, expected = make_host().loss_and_gradient(theta, train, INDICES)
    host = make_host(compile=True, checkpoint=True)
    loss, gradient = host.loss_and_gradient(theta, train, INDICES)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert relative(gradient, expected) < 1e-3


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


def test_the_defaults_change_nothing(experiment: dict[str, Any]) -> None:
    """The network's own precision, no second evaluation, no compiler."""
    found = parse_config(experiment, "x.yaml").resources
    assert (found.precision, found.checkpoint, found.compile) == ("float32", False, False)
