"""The host answers requests to a frozen model; each answer depends only on its request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from orchestrator import plugins
from orchestrator.audio.spectrogram import spectrogram
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import StoreError
from orchestrator.hosts import distillation
from orchestrator.hosts import host as host_module
from orchestrator.hosts.distillation import BLOCK, blocks, mean_of_blocks, to_numpy
from orchestrator.hosts.host import Host
from orchestrator.hosts.runs import LearnedRun, State
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage
from solvers.distil.batches import batch_indices
from solvers.distil.methods.adam import Adam
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
def train_digest(specs: dict[PairKey, PairSpec]) -> str:
    """Digest of the training pairs."""
    return specs[TRAIN].name


@pytest.fixture
def theta(facts: ModelFacts) -> npt.NDArray[np.float64]:
    """Midpoint at 4 evaluations, slightly perturbed, so that no gradient is zero."""
    flat = GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler).flat()
    return to_numpy(flat + 0.01 * torch.linspace(0.2, 1, len(flat), dtype=torch.float64))


def test_the_facts_are_those_of_the_model(facts: ModelFacts) -> None:
    """Clients learn about the model only from the host's facts."""
    assert (facts.name, facts.shape, facts.data_range, facts.device_class) == ("digits_fm_ot", (1, 8, 8), 2.0, "cpu")
    assert (facts.prediction, facts.scheduler.name, facts.native_scheduler) == ("velocity", "cond_ot", "cond_ot")
    assert len(facts.digest) == 64


def test_a_host_uses_only_its_threads(host: Host) -> None:
    """With more torch threads than its share of cores, every step would be many times slower."""
    assert torch.get_num_threads() == host.settings.threads == 1


def test_the_facts_of_ground_truth_have_its_range_its_cost_and_its_own_error(
    host: Host, specs: dict[PairKey, PairSpec]
) -> None:
    """Pairs at a tolerance of 1e-4 have an error between those of 1e-3 and of 1e-5; the forwards are all counted."""
    host.truth(specs[TEST].name)  # the network has been checked
    before = host.work.forwards
    truth = host.truth(specs[TEST].name)
    pairs = PairStore.open(host.storage, specs[TEST].name).load()
    assert (truth.low, truth.high) == (float(pairs.x1.min()), float(pairs.x1.max()))
    assert truth.mean == pytest.approx(float(pairs.x1.mean()), rel=1e-5)
    assert truth.std == pytest.approx(float(pairs.x1.std(correction=0)), rel=1e-5)
    assert truth.nfe == pytest.approx(float(pairs.nfe.float().mean()))
    assert truth.accuracy_db is not None
    assert 20 * np.log10(2 / 1e-3) < truth.accuracy_db < 20 * np.log10(2 / 1e-6)
    assert truth.again == 8
    assert truth.evaluations == truth.forwards == host.work.forwards - before > 8 * truth.nfe


def test_loss_and_gradient_equal_those_of_autograd_on_the_model(
    host: Host, train_digest: str, theta: npt.NDArray[np.float64]
) -> None:
    """Summed over the pairs: the loss of eq. 13 and its derivative in every element of theta."""
    loss, gradient = host.loss_and_gradient(theta, train_digest, INDICES)
    pairs = PairStore.open(host.storage, train_digest).load().select(INDICES)
    flat = torch.from_numpy(theta).clone().requires_grad_(True)
    samples = NSSolver.from_flat(flat).sample(host.model.field(pairs.condition, 1.0), pairs.x0)
    expected = psnr_loss(samples, pairs.x1).double().sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, flat.grad.numpy(), rtol=1e-10, atol=1e-12)
    assert np.count_nonzero(gradient) == len(theta)


def test_the_gradient_is_the_slope_of_the_loss(host: Host, train_digest: str, theta: npt.NDArray[np.float64]) -> None:
    """Against finite differences, along random directions of theta."""
    rng = np.random.default_rng(0)
    _, gradient = host.loss_and_gradient(theta, train_digest, INDICES)
    for _ in range(5):
        direction = rng.standard_normal(len(theta))
        step = 1e-3 / np.linalg.norm(direction)
        up, _ = host.loss_and_gradient(theta + step * direction, train_digest, INDICES)
        down, _ = host.loss_and_gradient(theta - step * direction, train_digest, INDICES)
        assert (up - down) / (2 * step) == pytest.approx(direction @ gradient, rel=2e-2)


def test_sums_over_blocks_do_not_depend_on_the_hosts_that_compute_them(
    host: Host,
    train_digest: str,
    theta: npt.NDArray[np.float64],
    made: Storage,
    host_settings: Callable[..., HostSettings],
) -> None:
    """Data parallelism: whichever host computes a block, and in whatever order, the mean has the same bits."""
    indices = list(range(48))
    parts = [indices[first : first + 16] for first in range(0, 48, 16)]
    on_one_host = [host.loss_and_gradient(theta, train_digest, part) for part in parts]
    other = Host(host_settings(made))
    on_two_hosts: dict[int, Any] = {2: other.loss_and_gradient(theta, train_digest, parts[2])}
    on_two_hosts[0] = other.loss_and_gradient(theta, train_digest, parts[0])
    on_two_hosts[1] = host.loss_and_gradient(theta, train_digest, parts[1])
    one, two = mean_of_blocks(on_one_host, indices), mean_of_blocks([on_two_hosts[i] for i in range(3)], indices)
    assert one.loss == two.loss
    assert torch.equal(one.gradient, two.gradient)
    unsplit_loss, unsplit_gradient = host.loss_and_gradient(theta, train_digest, indices)
    assert one.loss == pytest.approx(unsplit_loss / 48, rel=1e-5)
    np.testing.assert_allclose(one.gradient.numpy(), unsplit_gradient / 48, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_blocks_depend_only_on_position(count: int) -> None:
    """The terms of a sum must not depend on the number of hosts."""
    indices = [7 * i % 1000 for i in range(count)]
    parts = blocks(indices)
    assert [index for block in parts for index in block] == indices
    assert all(len(block) == BLOCK for block in parts[:-1])
    assert 1 <= len(parts[-1]) <= BLOCK


def _run(train_digest: str, **settings: Any) -> LearnedRun:
    adam = Adam(**{"learning_rate": 5e-3, "iterations": 6, "batch_size": 16, "training_pairs": 48, **settings})
    return LearnedRun(family="bns", options={}, sigma0=1.0, train=train_digest, method=adam)


def _start(facts: ModelFacts) -> State:
    return Adam().begin(BNS().start(GridSolver(Midpoint(), 4, Grid()), facts.scheduler))


def test_advance_equals_adam_written_out_by_hand(host: Host, train_digest: str, facts: ModelFacts) -> None:
    """Algorithm 2: draw a batch, take the gradient through the family, step at the decayed rate, project."""
    run = _run(train_digest)
    parameters = torch.tensor(_start(facts).parameters, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=5e-3)
    pairs = PairStore.open(host.storage, train_digest).load()
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


def test_steps_in_two_calls_equal_those_of_one_call(host: Host, train_digest: str, facts: ModelFacts) -> None:
    """A trial interrupted between calls, or moved to another host, ends with the same bits."""
    run = _run(train_digest)
    once = host.advance(run, _start(facts), 6)
    twice = host.advance(run, host.advance(run, _start(facts), 2), 4)
    assert twice.parameters == once.parameters
    assert (once.iteration, once.status) == (6, "finished")


def test_the_last_iterate_is_validated_in_the_same_call(host: Host, train_digest: str, facts: ModelFacts) -> None:
    """A trial requests both at once. The PSNR is that of a separate call, for a run alone and in a batch."""
    run = _run(train_digest)
    start = _start(facts)
    alone = host.advance(run, start, 4, validation=train_digest)
    assert alone.parameters == host.advance(run, start, 4).parameters
    solver = BNS().to_ns(torch.tensor(alone.parameters, dtype=torch.float64), facts.scheduler, 1.0)
    scores = host.score(solver.flat().numpy(), train_digest, ["psnr"])["psnr"]
    assert alone.validated == [{"iteration": 4, "psnr_db": float(scores.mean()), "parameters": alone.parameters}]
    first, second = host.advance_batched(
        [{"run": run, "state": start, "steps": 4, "validation": train_digest}, {"run": run, "state": start, "steps": 4}]
    )
    assert first.validated[0]["psnr_db"] == pytest.approx(alone.validated[0]["psnr_db"], abs=1e-3)
    assert second.validated == []


def test_a_batch_larger_than_a_block_is_summed_by_blocks(
    host: Host, train_digest: str, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks bound the memory of a step and change it only by rounding."""
    unsplit = host.advance(_run(train_digest, batch_size=40), _start(facts), 2)
    sizes: list[int] = []
    real = Host.loss_and_gradient

    def watched(self: Host, **arguments: Any) -> Any:
        sizes.append(len(arguments["indices"]))
        return real(self, **arguments)

    monkeypatch.setattr(distillation, "BLOCK", 16)
    monkeypatch.setattr(Host, "loss_and_gradient", watched)
    split = host.advance(_run(train_digest, batch_size=40), _start(facts), 2)
    assert sizes == [16, 16, 8] * 2
    np.testing.assert_allclose(split.parameters, unsplit.parameters, rtol=1e-4, atol=1e-6)


def test_scores_do_not_depend_on_the_batch_size(
    host: Host, specs: dict[PairKey, PairSpec], theta: npt.NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PSNR of a pair does not depend on how many are sampled at once."""
    digest = specs[TEST].name
    in_one_batch = host.score(theta, digest, ["psnr", "rmse"])
    monkeypatch.setattr(host_module, "SCORING_BATCH", 7)
    in_small_batches = host.score(theta, digest, ["psnr", "rmse"])
    assert in_one_batch["psnr"].shape == (40,)
    np.testing.assert_allclose(in_small_batches["psnr"], in_one_batch["psnr"], atol=1e-3)
    np.testing.assert_allclose(in_small_batches["rmse"], in_one_batch["rmse"], rtol=1e-4)


def test_pictures_are_decoded_samples_and_of_sound_frames_or_a_spectrogram(
    host: Host, specs: dict[PairKey, PairSpec], theta: npt.NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A latent model decodes its samples; frames of audio stay as they are sampled; of decoded waves there is a
    spectrogram.
    """
    digest = specs[TEST].name
    samples = host.sample(theta, digest, INDICES[:2])
    monkeypatch.setattr(host.model, "decode", lambda latents: latents.repeat(1, 3, 2, 2))
    pictures = host.pictures(theta, digest, INDICES[:2])
    assert pictures.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(pictures[:, 1, 8:, :8], samples[:, 0])
    monkeypatch.setattr(host, "sample", lambda *arguments: samples[:, 0])
    monkeypatch.setattr(host.model, "kind", "sound")
    np.testing.assert_array_equal(host.pictures(theta, digest, INDICES[:2]), samples[:, 0])
    waves = torch.sin(torch.arange(4000.0)).expand(2, -1)
    monkeypatch.setattr(type(host.model), "decodes", True)
    monkeypatch.setattr(host.model, "rate", 8000)
    monkeypatch.setattr(host.model, "sound", lambda latents: waves)
    np.testing.assert_array_equal(host.pictures(theta, digest, INDICES[:2]), spectrogram(waves, 8000))


def test_scores_compare_samples_with_ground_truth(
    host: Host, specs: dict[PairKey, PairSpec], theta: npt.NDArray[np.float64]
) -> None:
    """They are in the order of the requested indices."""
    digest = specs[TEST].name
    samples, truth = host.sample(theta, digest, INDICES[:3]), host.pictures(None, digest, INDICES[:3])
    np.testing.assert_array_equal(truth, PairStore.open(host.storage, digest).load().x1.numpy()[INDICES[:3]])
    expected = 10 * np.log10(4 / np.square(samples - truth, dtype=np.float64).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(host.score(theta, digest, ["psnr"], INDICES[:3])["psnr"], expected, rtol=1e-6)


def test_scoring_several_theta_in_one_request_equals_scoring_each(
    host: Host, specs: dict[PairKey, PairSpec], theta: npt.NDArray[np.float64]
) -> None:
    """A grid search takes one round trip for many theta."""
    digest = specs[TEST].name
    other = theta * 0.99
    scores = host.score_thetas([theta, other], digest, "psnr", INDICES[:3])
    for one, expected in zip(scores, (theta, other), strict=True):
        np.testing.assert_array_equal(one, host.score(expected, digest, ["psnr"], INDICES[:3])["psnr"])


def test_a_guided_evaluation_is_one_forward_pass_of_a_doubled_batch(
    storage: Storage, specs: dict[PairKey, PairSpec], host_settings: Callable[..., HostSettings]
) -> None:
    """Half of it has the pairs' labels, half the label that means "dropped"; NFE counts one evaluation."""
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
    """The model's digest identifies it, even if another model has a similar name."""
    other = Host(host_settings(made, "digits_fm_v_cs"))
    with pytest.raises(StoreError, match=r"pair store \S+ was made by a different model than digits_fm_v_cs"):
        other.score(theta, specs[TEST].name, ["psnr"])


def test_missing_pairs_are_refused(host: Host, theta: npt.NDArray[np.float64]) -> None:
    """The error names the command that makes them."""
    with pytest.raises(StoreError, match=r"no complete pair store 0123 under .*; make it with `bespoke pairs`"):
        host.score(theta, "0123-4", ["psnr"])


def test_a_host_holds_a_frozen_model(host: Host) -> None:
    """A host never changes a weight: none has a gradient, and dropout is off."""
    net = host.model.net  # type: ignore[attr-defined]
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_the_device_class_is_the_device_name(
    made: Storage, host_settings: Callable[..., HostSettings], monkeypatch: Any
) -> None:
    """It is 'cpu' or the accelerator's name, and pair specs record it."""
    host = Host(host_settings(made))
    assert host.device_class == "cpu"
    other = Host(host_settings(made))
    object.__setattr__(other.settings, "device", "cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"an accelerator at {device}")
    assert other.device_class == "an accelerator at cuda:0"


def test_a_run_builds_its_family_from_the_name(train_digest: str) -> None:
    """A run is sent as names and numbers; the host builds the family."""
    assert isinstance(_run(train_digest).build(), BNS)
    assert plugins.load("families", "bns") is BNS
