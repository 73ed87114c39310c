"""Trains the small networks of :mod:`kinds`, each in seconds, and writes their files as their authors would.

The code of the networks lies in ``code``, and imports nothing from this project. Data are real (the wines and digits of
scikit-learn) or drawn from a closed form.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits, load_wine
from torch import Tensor, nn

CODE = Path(__file__).with_name("code")
"""Folder of the networks' code."""

Draw = Callable[[int], Any]
"""Draws a batch of so many training samples."""


def network(name: str, *arguments: Any, **options: Any) -> nn.Module:
    """Build a network, ``"module:class"``, from the folder of code."""
    if str(CODE) not in sys.path:
        sys.path.insert(0, str(CODE))
    module, _, factory = name.partition(":")
    made: nn.Module = getattr(importlib.import_module(module), factory)(*arguments, **options)
    return made


def fit(loss: Callable[[], Tensor], net: nn.Module, steps: int, rate: float = 2e-3) -> nn.Module:
    """Minimise a random loss by Adam with a rate that falls to 0; returns the average of the last weights."""
    optimiser = torch.optim.Adam(net.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    for step in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()
        if step >= steps // 2:
            averaged.update_parameters(net)
    inner: nn.Module = averaged.module
    return inner.eval()


def alphas_cumprod(betas: Tensor) -> Tensor:
    """The running products of 1 - beta, float32."""
    return (1 - betas.double()).cumprod(0).float()


def linear_betas(count: int, first: float, last: float) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64)


def cosine_betas(count: int) -> Tensor:
    """diffusers' 'squaredcos_cap_v2' (Nichol & Dhariwal 2021)."""
    share = torch.arange(count + 1, dtype=torch.float64) / count
    bar = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


def quadratic_betas(count: int, first: float, last: float) -> Tensor:
    """CSDI's 'quad': betas whose roots rise linearly."""
    return torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64) ** 2


def noised(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The noised samples alpha x + sigma noise, and their noise; alpha and sigma are one number per sample."""
    noise = torch.randn_like(x)
    shape = (-1, *(1,) * (x.ndim - 1))
    return alpha.view(shape) * x + sigma.view(shape) * noise, noise


def discrete(x: Tensor, bars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples noised at random timesteps, these timesteps (int64), and the noise."""
    k = torch.randint(len(bars), (len(x),))
    noisy, noise = noised(x, bars[k].sqrt(), (1 - bars[k]).sqrt())
    return noisy, k, noise


# ---- data -----------------------------------------------------------------------------------------------------------


def wines() -> tuple[Tensor, Tensor]:
    """The 178 wines, standardised, (178, 13), and their cultivars, numbered from 1."""
    rows, cultivars = load_wine(return_X_y=True)
    rows = (rows - rows.mean(0)) / rows.std(0)
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(cultivars + 1)


def digits(low: float = -1.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    """The 1797 digits of scikit-learn, (1797, 1, 8, 8), from low to high, and their classes."""
    images, classes = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return low + (high - low) * pixels, torch.tensor(classes)


def two_moons(count: int) -> Tensor:
    """Points of two half circles with some noise, (B, 2), of spread about 1."""
    angle, upper = math.pi * torch.rand(count), torch.rand(count) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, 1.5 * y], dim=1) + 0.06 * torch.randn(count, 2)


def sines(count: int, length: int, channels: int = 2) -> Tensor:
    """Sine waves of random frequency, with a phase and an amplitude per channel, (B, C, T)."""
    time = torch.linspace(0, 1, length)
    frequency = 1 + 2 * torch.rand(count, 1, 1)
    phase, amplitude = 2 * math.pi * torch.rand(count, channels, 1), 0.6 + 0.4 * torch.rand(count, channels, 1)
    return amplitude * torch.sin(2 * math.pi * frequency * time + phase)


def reaches(count: int) -> tuple[Tensor, Tensor]:
    """Arcs from a start to a goal that pass an obstacle on the left or right, (B, 16, 2), and both ends, (B, 4)."""
    ends = 1.6 * torch.rand(count, 2, 2) - 0.8
    share = torch.linspace(0, 1, 16).view(1, 16, 1)
    along = ends[:, 1:] - ends[:, :1]
    across = torch.stack([-along[..., 1], along[..., 0]], dim=2)
    side = torch.where(torch.rand(count, 1, 1) < 0.5, 1.0, -1.0) * (0.3 + 0.05 * torch.randn(count, 1, 1))
    return ends[:, :1] + share * along + side * torch.sin(math.pi * share) * across, ends.flatten(1)


def gaps(count: int) -> tuple[Tensor, Tensor]:
    """Series (B, 24, 2), and masks of known entries: all but a gap of 4 to 12 steps in each feature."""
    series = sines(count, 24).transpose(1, 2)
    first, length = torch.randint(0, 13, (count, 1, 2)), torch.randint(4, 13, (count, 1, 2))
    step = torch.arange(24).view(1, 24, 1)
    return series, (step < first) | (step >= first + length)


def rings(count: int, points: int = 64) -> Tensor:
    """Points on an ellipse of random axes in the x-y plane, (B, N, 3)."""
    angle, axes = 2 * math.pi * torch.rand(count, points, 1), 0.5 + torch.rand(count, 1, 2)
    flat = axes * torch.cat([angle.cos(), angle.sin()], dim=2)
    return torch.cat([flat, 0.1 * torch.randn(count, points, 1)], dim=2)


def falling_drops(count: int) -> Tensor:
    """Four frames of a blob that moves on a straight line, (B, 1, 4, 8, 8), in [-1, 1]."""
    start, speed = 1 + 5 * torch.rand(count, 2, 1), torch.randn(count, 2, 1)
    centre = start + speed * torch.linspace(0, 1, 4)
    grid = torch.arange(8.0)
    rows, columns = (torch.exp(-((grid - centre[:, i, :, None]) ** 2) / 2.5) for i in (0, 1))
    return (2 * rows[..., :, None] * columns[..., None, :] - 1)[:, None]


# ---- the networks ---------------------------------------------------------------------------------------------------


def train_wine(folder: Path) -> None:
    """Noise prediction at 100 integer timesteps, wrapped by DataParallel; saved beside the optimiser."""
    rows, cultivars = wines()
    bars = alphas_cumprod(linear_betas(100, 1e-3, 0.2))
    net = network("wine_table:TableDenoiser", columns=13, classes=3, steps=100)

    def loss() -> Tensor:
        chosen = torch.randint(len(rows), (256,))
        labels = torch.where(torch.rand(256) < 0.15, 0, cultivars[chosen])
        noisy, k, noise = discrete(rows[chosen], bars)
        return (net(noisy, k, labels) - noise).square().mean()

    trained = fit(loss, net, 1500)
    model = {f"module.{name}": value for name, value in trained.state_dict().items()}
    torch.save(
        {"epoch": 12, "model": model, "optimizer": {"state": {}, "param_groups": [{"lr": 0.002}]}}, folder / "wine.pt"
    )


def train_moons(folder: Path) -> None:
    """Score of noised points in continuous time, on the vp path."""
    net: Any = network("moons:ScoreNet")

    def loss() -> Tensor:
        s = 1e-3 + (1 - 1e-3) * torch.rand(512, 1)
        std = net.marginal_std(s)
        noisy, noise = noised(two_moons(512), (1 - std**2).sqrt(), std)
        return (std * net(noisy, s) + noise).square().mean()

    torch.save(fit(loss, net, 2500).state_dict(), folder / "moons.pth")


def train_waves(folder: Path) -> None:
    """v-prediction on the cosine path, at times in thousandths that count down; a checkpoint of Lightning."""
    net = network("waves:SeriesUNet")

    def loss() -> Tensor:
        t, x = torch.rand(64), sines(64, 32)
        alpha, sigma = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
        noisy, noise = noised(x, alpha, sigma)
        v = alpha.view(-1, 1, 1) * noise - sigma.view(-1, 1, 1) * x
        return (net(noisy, 1000 * (1 - t)) - v).square().mean()

    trained = fit(loss, net, 600, 4e-3)
    torch.save(
        {
            "epoch": 3,
            "global_step": 600,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {f"net.{name}": value for name, value in trained.state_dict().items()},
            "loops": {},
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
            "hyper_parameters": {"hidden": 24, "lr": 4e-3},
        },
        folder / "waves.ckpt",
    )


def train_reach(folder: Path) -> None:
    """A policy on 100 steps of the squared-cosine betas; its averaged weights are a list, as torch_ema saves them."""
    bars = alphas_cumprod(cosine_betas(100))
    net = network("reach_policy:PolicyNet")
    _fit_policy(net, bars, folder / "reach.ckpt")
    _, observations = reaches(600)
    np.savez(folder / "observations.npz", obs=observations.numpy())


def train_early_reach(folder: Path) -> None:
    """The same on DDPM's betas cut to 50 steps: 0.6 of the signal's variance is left where sampling starts."""
    bars = alphas_cumprod(linear_betas(50, 1e-4, 0.02))
    _fit_policy(network("reach_policy:PolicyNet"), bars, folder / "early_reach.ckpt")
    _, observations = reaches(600)
    np.savez(folder / "observations.npz", obs=observations.numpy())


def _fit_policy(net: nn.Module, bars: Tensor, file: Path) -> None:
    def loss() -> Tensor:
        trajectories, observations = reaches(256)
        noisy, k, noise = discrete(trajectories, bars)
        return (net(noisy, k, observations) - noise).square().mean()

    raw = copy.deepcopy(net.state_dict())
    trained = fit(loss, net, 2500)
    shadow = [parameter.detach().clone() for parameter in trained.parameters()]
    ema = {"decay": 0.99, "num_updates": 1250, "shadow_params": shadow, "collected_params": None}
    torch.save({"cfg": {"horizon": 16}, "state_dicts": {"model": raw, "ema": ema}}, file)


def train_imputer(folder: Path) -> None:
    """Noise of the missing entries only, on CSDI's 50 quadratic betas, given values and masks."""
    bars = alphas_cumprod(quadratic_betas(50, 1e-4, 0.5))
    net = network("imputer:Imputer")

    def loss() -> Tensor:
        series, known = gaps(256)
        noisy, k, noise = discrete(series, bars)
        error = net(noisy, k, {"values": series * known, "mask": known}) - noise
        return error[~known].square().mean()

    trained = fit(loss, net, 1500)
    model = {f"_orig_mod.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"step": 1500, "denoiser": {"params": model}}, folder / "imputer.pt")
    series, known = gaps(600)
    np.savez(folder / "series.npz", values=(series * known).numpy(), mask=known.numpy(), missing=~known.numpy())


def train_rings(folder: Path) -> None:
    """Noise minus data of point clouds, at times (B, 1)."""
    net = network("shapes:PointFlow")

    def loss() -> Tensor:
        s, x = torch.rand(48), rings(48)
        noisy, noise = noised(x, 1 - s, s)
        return (net(noisy, s[:, None]) - (noise - x)).square().mean()

    trained = fit(loss, net, 500, 4e-3)
    torch.save({"state_dict": trained.state_dict()}, folder / "rings.pth")


def train_latent_digits(folder: Path) -> None:
    """An autoencoder of digits, and a flow in its latents of spread 1; two checkpoints."""
    images, _ = digits(0, 1)
    autoencoder: Any = network("latent_digits:Autoencoder")

    def reconstruction() -> Tensor:
        x = images[torch.randint(len(images), (256,))]
        z = autoencoder.encode(x)
        spread = z.flatten(1)
        prior = spread.mean(0).square().mean() + (spread.var(0) - 1).square().mean()
        return (autoencoder.decode(z + 0.05 * torch.randn_like(z)) - x).square().mean() + 0.01 * prior

    fit(reconstruction, autoencoder, 600)
    with torch.no_grad():
        latents = autoencoder.encode(images)
    net = network("latent_digits:LatentFlow")

    def loss() -> Tensor:
        t, z = torch.rand(256), latents[torch.randint(len(latents), (256,))]
        noisy, noise = noised(z, t, 1 - t)
        return (net(noisy, t) - (z - noise)).square().mean()

    torch.save({"model": fit(loss, net, 1200).state_dict()}, folder / "latent_flow.pt")
    torch.save(autoencoder.state_dict(), folder / "decoder.pt")


def train_drops(folder: Path) -> None:
    """The clean video, on the cosine path."""
    net = network("drops:VideoNet")

    def loss() -> Tensor:
        t, x = torch.rand(128), falling_drops(128)
        noisy, _ = noised(x, torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t))
        return (net(noisy, t) - x).square().mean()

    torch.save(fit(loss, net, 1000).state_dict(), folder / "drops.pt")


def train_edm_digits(folder: Path) -> None:
    """EDM's loss on digits of spread 0.5."""
    images, _ = digits()
    net = network("edm_transformer:EDMPrecond")

    def loss() -> Tensor:
        sigma, x = (1.2 * torch.randn(64) - 1.2).exp(), images[torch.randint(len(images), (64,))] * 0.6
        noisy, _ = noised(x, torch.ones(64), sigma)
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        return (weight * (net(noisy, sigma) - x).square().flatten(1).mean(1)).mean()

    trained = fit(loss, net, 600, 3e-3)
    torch.save(trained.state_dict(), folder / "edm_digits.pt")


def train_digit_flow(folder: Path) -> None:
    """A class-conditional flow of digits, as a state dictionary, as TorchScript and as ONNX."""
    images, classes = digits()
    net = network("digit_flow:DigitFlow")

    def loss() -> Tensor:
        chosen, t = torch.randint(len(images), (256,)), torch.rand(256)
        labels = torch.where(torch.rand(256) < 0.1, 10, classes[chosen])
        noisy, noise = noised(images[chosen], t, 1 - t)
        return (net(noisy, t, labels) - (images[chosen] - noise)).square().mean()

    trained = fit(loss, net, 1200)
    torch.save(trained.state_dict(), folder / "digit_flow.pt")
    inputs = (torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    torch.jit.save(torch.jit.trace(trained, inputs), folder / "digit_flow.ts")
    torch.onnx.export(
        trained,
        inputs,
        folder / "digit_flow.onnx",
        input_names=["x", "t", "y"],
        output_names=["velocity"],
        dynamic_axes={"x": {0: "batch"}, "t": {0: "batch"}, "y": {0: "batch"}},
        dynamo=False,
    )
