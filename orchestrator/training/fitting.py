"""The training loop of the small shipped networks, and the disturbance of their training sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from orchestrator.audio.mel import SILENCE
from orchestrator.progress import bar

Net = TypeVar("Net", bound=nn.Module)


def fit(
    net: Net, loss_at: Callable[[int], Tensor], steps: int, what: str, *, rate: float, decay: float, clip: float
) -> Net:
    """Train a network by AdamW with a one-cycle learning rate.

    Args:
        net: The network; it is trained in place.
        loss_at: Draws the batch of a step and returns its 0-d loss.
        steps: Number of steps.
        what: The network's name on the progress bar.
        rate: Peak of the learning rate.
        decay: Weight decay.
        clip: Upper limit of the gradients' norm; infinite for none.

    Returns:
        The network, in evaluation mode.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    net.train()
    with bar(steps, "step", what) as progress:
        for step in range(steps):
            loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix_str(f" loss {loss.item():.3f}", refresh=False)
    return net.eval()


def disturbed(features: Tensor, tilt: float, level: float, generator: torch.Generator) -> Tensor:
    """Augment log-mel features (B, MELS, frames) with random gain, spectral tilt and noise.

    Args:
        features: The features.
        tilt: Standard deviation of the tilt, between the middle and either end of the spectrum.
        level: Largest standard deviation of the noise.
        generator: Source of all randomness.
    """
    count = len(features)
    gain, tilts = torch.randn(2, count, 1, 1, generator=generator) * torch.tensor([0.2, tilt]).view(2, 1, 1, 1)
    slope = torch.linspace(-1, 1, features.shape[1]).view(1, -1, 1)
    noise = level * torch.rand(count, 1, 1, generator=generator) * torch.randn(features.shape, generator=generator)
    return (features + gain + tilts * slope + noise).clamp_min(SILENCE)
