"""The host answers questions about a frozen model; what it answers depends on the question alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from orchestrator import plugins
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import StoreError
from orchestrator.hosts import distillation
from orchestrator.hosts import host as host_module
from orchestrator.hosts.distillation import BLOCK, LearnedRun, blocks, mean_of_blocks, to_numpy
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage
from solvers.distil.adam import AdamSettings, AdamState
from solvers.distil.batches import batch_indices
from solvers.families import GridSolver
from solvers.families.bns import BNS
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.losses import psnr_loss
from solvers.ns import NSSolver

TRAIN, TEST = PairKey("train", 1.0, 0), PairKey("test", 1.0, 0)
INDICES = [3, 0, 17, 40, 21]


@pytest.fixture
def host(pool: LocalPool) -> Host:
    """The host in this process."""
    return pool.host


@pytest.fixture
def train(specs: dict[PairKey, PairSpec]) -> str:
    """Digest of the training pairs."""
    return specs[TRAIN].digest


@pytest.fixture
def theta(facts: ModelFacts) -> npt.NDArray[np.float64]:
    """Midpoint at 4 evaluations, a little off, so that no gradient is zero."""
    flat = GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler).flat()
    return to_numpy(flat + 0.01 * torch.linspace(0.2, 1, len(flat), dtype=torch.float64))


def test_the_facts_are_those_of_the_model(facts: ModelFacts) -> None:
    """What everybody else knows of the model is what the host says of it."""
    assert (facts.name, facts.shape, facts.data_range, facts.device_class) == ("digits_fm_ot", (1, 8, 8), 2.0, "cpu")
    assert (facts.prediction, facts.scheduler.name, facts.native_scheduler) == ("velocity", "cond_ot", "cond_ot")
    assert len(facts.digest) == 64


def test_a_host_keeps_to_its_threads(host: Host) -> None:
    """More torch threads than its share of cores would make every step many times slower."""
    assert torch.get_num_threads() == host.settings.threads == 1


def test_loss_and_gradient_are_those_of_autograd_on_the_model(
    host: Host, train: str, theta: npt.NDArray[np.float64]
) -> None:
    """Summed over the pairs: the loss of eq. 13 and its derivative in every number of theta."""
    loss, gradient = host.loss_and_gradient(theta, train, INDICES)
    pairs = PairStore.open(host.storage, train).load().select(INDICES)
    flat = torch.from_numpy(theta).clone().requires_grad_(True)
    samples = NSSolver.from_flat(flat).sample(host.model.field(pairs.condition, 1.0), pairs.x0)
    expected = psnr_loss(samples, pairs.x1).double().sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, flat.grad.numpy(), rtol=1e-10, atol=1e-12)
    assert np.count_nonzero(gradient) == len(theta)


def test_the_gradient_is_the_slope_of_the_loss(host: Host, train: str, theta: npt.NDArray[np.float64]) -> None:
    """Against finite differences, along random directions of theta."""
    chance = np.random.default_rng(0)
    _, gradient = host.loss_and_gradient(theta, train, INDICES)
    for _ in range(5):
        direction = chance.standard_normal(len(theta))
        step = 1e-3 / np.linalg.norm(direction)
        up, _ = host.loss_and_gradient(theta + step * direction, train, INDICES)
        down, _ = host.loss_and_gradient(theta - step * direction, train, INDICES)
        assert (up - down) / (2 * step) == pytest.approx(direction @ gradient, rel=2e-2)


def test_sums_over_blocks_do_not_depend_on_who_computes_them(
    host: Host, train: str, theta: npt.NDArray[np.float64], made: Storage, host_settings: Callable[..., HostSettings]
) -> None:
    """Data parallelism: whichever host answers for a block, and in whatever order, the mean is the same to the bit."""
    indices = list(range(48))
    parts = [indices[first : first + 16] for first in range(0, 48, 16)]
    here = [host.loss_and_gradient(theta, train, part) for part in parts]
    other = Host(host_settings(made))
    split: dict[int, Any] = {2: other.loss_and_gradient(theta, train, parts[2])}
    split[0] = other.loss_and_gradient(theta, train, parts[0])
    split[1] = host.loss_and_gradient(theta, train, parts[1])
    one, many = mean_of_blocks(here, indices), mean_of_blocks([split[i] for i in range(3)], indices)
    assert one.loss == many.loss
    assert torch.equal(one.gradient, many.gradient)
    whole_loss, whole_gradient = host.loss_and_gradient(theta, train, indices)
    assert one.loss == pytest.approx(whole_loss / 48, rel=1e-5)
    np.testing.assert_allclose(one.gradient.numpy(), whole_gradient / 48, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_blocks_are_cut_by_position_alone(count: int) -> None:
    """The unit of every sum is fixed: it must not follow the number of hosts."""
    indices = [7 * i % 1000 for i in range(count)]
    cut = blocks(indices)
    assert [index for block in cut for index in block] == indices
    assert all(len(block) == BLOCK for block in cut[:-1])
    assert 1 <= len(cut[-1]) <= BLOCK


def _run(train: str, **settings: Any) -> LearnedRun:
    adam = AdamSettings(**{"learning_rate": 5e-3, "iterations": 6, "batch_size": 16, "training_pairs": 48, **settings})
    return LearnedRun(family="bns", options={}, sigma0=1.0, train=train, settings=adam)


def _start(facts: ModelFacts) -> AdamState:
    return AdamState.begin(BNS().start(GridSolver(Midpoint(), 4, Grid()), facts.scheduler))


def test_advance_is_adam_on_the_loss_as_one_would_write_it(host: Host, train: str, facts: ModelFacts) -> None:
    """Algorithm 2 by hand: draw a batch, take the gradient through the family, step at the decayed rate, project."""
    run = _run(train)
    parameters = torch.tensor(_start(facts).parameters, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=5e-3)
    pairs = PairStore.open(host.storage, train).load()
    for iteration in range(4):
        chosen = pairs.select(batch_indices(48, 16, 0, iteration))
        solver = BNS().to_ns(parameters, facts.scheduler, 1.0)
        samples = solver.sample(host.model.field(chosen.condition, 1.0), chosen.x0)
        optimizer.zero_grad()
        psnr_loss(samples, chosen.x1).double().mean().backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - iteration / 6)
        optimizer.step()
        with torch.no_grad():
            parameters[:3].clamp_(0, 1)
    state = host.advance(run, _start(facts), 4)
    assert (state.iteration, state.status) == (4, "running")
    np.testing.assert_allclose(state.parameters, parameters.detach().numpy(), rtol=1e-6, atol=1e-9)


def test_steps_taken_in_two_calls_are_those_of_one(host: Host, train: str, facts: ModelFacts) -> None:
    """A trial that is interrupted between calls, or moved to another host, loses nothing: equal to the last bit."""
    run = _run(train)
    once = host.advance(run, _start(facts), 6)
    twice = host.advance(run, host.advance(run, _start(facts), 2), 4)
    assert twice.parameters == once.parameters
    assert (once.iteration, once.status) == (6, "finished")


def test_the_last_iterate_is_validated_in_the_same_call(host: Host, train: str, facts: ModelFacts) -> None:
    """A trial asks for both at once: the PSNR is that of a call by itself, alone and together with others."""
    run = _run(train)
    start = _start(facts)
    alone = host.advance(run, start, 4, validation=train)
    assert alone.parameters == host.advance(run, start, 4).parameters
    solver = BNS().to_ns(torch.tensor(alone.parameters, dtype=torch.float64), facts.scheduler, 1.0)
    scores = host.score(solver.flat().numpy(), train, ["psnr"])["psnr"]
    assert alone.validated == [{"iteration": 4, "psnr_db": float(scores.mean()), "parameters": alone.parameters}]
    first, second = host.advance_batched(
        [{"run": run, "state": start, "steps": 4, "validation": train}, {"run": run, "state": start, "steps": 4}]
    )
    assert first.validated[0]["psnr_db"] == pytest.approx(alone.validated[0]["psnr_db"], abs=1e-3)
    assert second.validated == []


def test_a_larger_batch_than_a_block_is_summed_by_blocks(
    host: Host, train: str, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory a step takes is bounded by the block; the step is the same but for rounding."""
    whole = host.advance(_run(train, batch_size=40), _start(facts), 2)
    sizes: list[int] = []
    real = Host.loss_and_gradient

    def watched(self: Host, **arguments: Any) -> Any:
        sizes.append(len(arguments["indices"]))
        return real(self, **arguments)

    monkeypatch.setattr(distillation, "BLOCK", 16)
    monkeypatch.setattr(Host, "loss_and_gradient", watched)
    cut = host.advance(_run(train, batch_size=40), _start(facts), 2)
    assert sizes == [16, 16, 8] * 2
    np.testing.assert_allclose(cut.parameters, whole.parameters, rtol=1e-4, atol=1e-6)


def test_scores_do_not_depend_on_the_batch_size(
    host: Host, specs: dict[PairKey, PairSpec], theta: npt.NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair's PSNR is its own, however many are sampled at once."""
    digest = specs[TEST].digest
    whole = host.score(theta, digest, ["psnr", "rmse"])
    monkeypatch.setattr(host_module, "SCORING_BATCH", 7)
    cut = host.score(theta, digest, ["psnr", "rmse"])
    assert whole["psnr"].shape == (40,)
    np.testing.assert_allclose(cut["psnr"], whole["psnr"], atol=1e-3)
    np.testing.assert_allclose(cut["rmse"], whole["rmse"], rtol=1e-4)


def test_pictures_are_decoded_samples(
    host: Host, specs: dict[PairKey, PairSpec], theta: npt.NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model of latents decodes; frames of sound stay as they are sampled."""
    digest = specs[TEST].digest
    samples = host.sample(theta, digest, INDICES[:2])
    monkeypatch.setattr(host.model, "decode", lambda latents: latents.repeat(1, 3, 2, 2))
    pictures = host.pictures(theta, digest, INDICES[:2])
    assert pictures.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(pictures[:, 1, 8:, :8], samples[:, 0])
    monkeypatch.setattr(host, "sample", lambda *asked: samples[:, 0])
    np.testing.assert_array_equal(host.pictures(theta, digest, INDICES[:2]), samples[:, 0])


def test_scores_are_those_of_the_samples_against_ground_truth(
    host: Host, specs: dict[PairKey, PairSpec], theta: npt.NDArray[np.float64]
) -> None:
    """In the order of the indices that were asked for."""
    digest = specs[TEST].digest
    samples, truth = host.sample(theta, digest, INDICES[:3]), host.pictures(None, digest, INDICES[:3])
    np.testing.assert_array_equal(truth, PairStore.open(host.storage, digest).load().x1.numpy()[INDICES[:3]])
    expected = 10 * np.log10(4 / np.square(samples - truth, dtype=np.float64).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(host.score(theta, digest, ["psnr"], INDICES[:3])["psnr"], expected, rtol=1e-6)


def test_a_grid_search_in_one_request_is_the_scores_of_each(
    host: Host, specs: dict[PairKey, PairSpec], theta: npt.NDArray[np.float64]
) -> None:
    """One round trip for many theta."""
    digest = specs[TEST].digest
    other = theta * 0.99
    found = host.score_thetas([theta, other], digest, "psnr", INDICES[:3])
    for one, expected in zip(found, (theta, other), strict=True):
        np.testing.assert_array_equal(one, host.score(expected, digest, ["psnr"], INDICES[:3])["psnr"])


def test_with_guidance_one_evaluation_is_one_forward_of_a_doubled_batch(
    storage: Storage, specs: dict[PairKey, PairSpec], host_settings: Callable[..., HostSettings]
) -> None:
    """Half with the pairs' labels, half with the label that means "dropped"; NFE counts it once."""
    host = Host(host_settings(storage))
    labels: list[list[int]] = []
    host.model.net.register_forward_pre_hook(lambda net, arguments: labels.append(arguments[2].tolist()))  # type: ignore[attr-defined]
    condition = torch.tensor([1, 2, 3])
    x = torch.zeros(3, 1, 8, 8)
    t = torch.tensor(0.3, dtype=torch.float64)
    plain = host.model.field(condition, 1.0)(x, t)
    guided = host.model.field(condition, 3.0)(x, t)
    dropped = host.model.field(torch.tensor([10, 10, 10]), 1.0)(x, t)
    assert labels == [[1, 2, 3], [1, 2, 3, 10, 10, 10], [10, 10, 10]]
    torch.testing.assert_close(guided, dropped + 3 * (plain - dropped), rtol=1e-4, atol=1e-5)
    assert [host.model.forwards_per_evaluation(scale) for scale in (1.0, 3.0)] == [1, 2]


def test_pairs_of_another_model_are_refused(
    made: Storage, specs: dict[PairKey, PairSpec], host_settings: Callable[..., HostSettings], theta: Any
) -> None:
    """A store beside ours, of a model whose name is like ours: its digest tells."""
    other = Host(host_settings(made, "digits_fm_v_cs"))
    with pytest.raises(StoreError, match=r"pair store \w+ was made by a different model than digits_fm_v_cs"):
        other.score(theta, specs[TEST].digest, ["psnr"])


def test_pairs_that_are_not_there_are_refused(host: Host, theta: npt.NDArray[np.float64]) -> None:
    """With the command that makes them."""
    with pytest.raises(StoreError, match=r"no complete pair store 0123 under .*; make it with `bespoke pairs`"):
        host.score(theta, "0123", ["psnr"])


def test_a_host_holds_a_frozen_model(host: Host) -> None:
    """Nothing that a host does changes a weight: no gradient is kept for any, and dropout is off."""
    net = host.model.net  # type: ignore[attr-defined]
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_a_device_names_its_class(made: Storage, host_settings: Callable[..., HostSettings], monkeypatch: Any) -> None:
    """'cpu', or the accelerator's name: what a pair spec records."""
    host = Host(host_settings(made))
    assert host.device_class == "cpu"
    other = Host(host_settings(made))
    object.__setattr__(other.settings, "device", "cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"an accelerator at {device}")
    assert other.device_class == "an accelerator at cuda:0"


def test_every_learnable_family_is_built_from_its_name(train: str) -> None:
    """A run crosses the wire as names and numbers; the host builds the family."""
    assert isinstance(_run(train).build(), BNS)
    assert plugins.load("families", "bns") is BNS
