"""Networks of the zoo: output shapes, and dependence on every input once the weights are not the initial ones."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor

from orchestrator.datasets.spoken_digits import FRAMES, SpokenDigits
from orchestrator.models.zoo.nets import build_net

UNET = {"net": "unet", "shape": [3, 16, 16], "classes": 5, "channels": 8, "multipliers": [1, 2], "blocks": 1}
INFILLING = {"net": "infilling", "shape": [40, 96], "tokens": 12, "width": 16, "depth": 1, "convolutions": 1}


def unet(**changes: Any) -> Any:
    """A tiny U-Net with random weights, instead of the initial ones."""
    return tiny_pipelines.liven(build_net({**UNET, **changes}))


def infilling(**changes: Any) -> Any:
    """A tiny infilling network with random weights, instead of the initial ones."""
    return tiny_pipelines.liven(build_net({**INFILLING, **changes}))


def strings(count: int) -> Tensor:
    """Conditioning of strings of spoken digits."""
    dataset = SpokenDigits()
    return dataset.infilling(dataset.conditions(0, range(count)))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative difference in the Euclidean norm."""
    return float(((actual - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": [16, 8]},
        {"multipliers": [1, 2, 2], "blocks": 2, "attention": [4]},
        {"patch": 2, "attention": [8]},
        {"shape": [1, 8, 16]},
    ],
    ids=str,
)
def test_a_unet_depends_on_every_input_and_keeps_the_shape(changes: dict[str, Any]) -> None:
    """State, time and label each change the output by more than 1 %."""
    net = unet(**changes)
    x = torch.randn(4, *(changes.get("shape") or UNET["shape"]))
    t, label = torch.full((4,), 0.3), torch.arange(4)
    output = net(x, t, label)
    assert output.shape == x.shape
    moved = {"x": net(1.2 * x, t, label), "t": net(x, t + 0.4, label), "label": net(x, t, label.flip(0))}
    assert {
        name: relative_error(other, output) for name, other in moved.items() if relative_error(other, output) < 0.01
    } == {}


@pytest.mark.parametrize("make", [unet, infilling], ids=["unet", "infilling"])
def test_a_new_network_outputs_zero(make: Any) -> None:
    """The last layer is initialised to zero, so training starts from the mean."""
    fresh = build_net(UNET if make is unet else INFILLING)
    inputs = (torch.randn(2, 3, 16, 16), torch.arange(2)) if make is unet else (torch.randn(2, 40, 96), strings(2))
    assert not fresh(inputs[0], torch.rand(2), inputs[1]).any()


def test_a_unet_treats_samples_of_a_batch_independently() -> None:
    """Normalisation is per sample."""
    net, x, t = unet(attention=[8]), torch.randn(3, 3, 16, 16), torch.rand(3)
    batched = net(x, t, torch.tensor([0, 3, 5]))
    torch.testing.assert_close(batched[1:2], net(x[1:2], t[1:2], torch.tensor([3])), rtol=1e-4, atol=1e-5)


def test_infilling_depends_on_every_input() -> None:
    """Each changes the output by more than 1 %."""
    net, condition, x = infilling(), strings(4), torch.randn(4, 40, FRAMES)
    t = torch.full((4,), 0.3)
    output = net(x, t, condition)
    assert output.shape == x.shape
    prompt, mask, tokens = condition.clone(), condition.clone(), condition.clone()
    prompt[:, :40] *= -1
    mask[:, 40] = 1 - mask[:, 40]
    tokens[:, 41] = 3
    moved = {"x": net(x.flip(0), t, condition), "t": net(x, t + 0.4, condition)}
    moved |= {name: net(x, t, c) for name, c in (("prompt", prompt), ("mask", mask), ("tokens", tokens))}
    assert {
        name: relative_error(other, output) for name, other in moved.items() if relative_error(other, output) < 0.01
    } == {}


def test_a_change_at_one_end_of_a_string_affects_the_other() -> None:
    """Attention spans the whole string; convolutions alone would not."""
    net, condition, x = infilling(), strings(2), torch.randn(2, 40, FRAMES)
    changed = condition.clone()
    changed[:, :40, :4] += 1
    difference = (net(x, torch.rand(2), changed) - net(x, torch.rand(2), condition)).abs()
    assert difference[:, :, -4:].max() > 0


def test_null_conditioning_is_independent_of_the_string() -> None:
    """Null conditioning does not depend on the dropped string, and is valid conditioning."""
    net, condition = infilling(), strings(3)
    null = net.null_condition(condition)
    assert torch.equal(null, net.null_condition(condition.flip(0)))
    assert (null.shape, net.condition_error(null)) == (condition.shape, None)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"conditioning has shape \(\), but the model takes \(42, 96\)"),
        (torch.zeros(2, 42, 64), r"conditioning has shape \(42, 64\), but the model takes \(42, 96\)"),
        (torch.full((2, 42, 96), 12.0), r"a token outside 0\.\.11"),
    ],
)
def test_invalid_conditioning_of_infilling_is_described(condition: Tensor, message: str) -> None:
    """Labels, a string of another length, and an unknown token."""
    assert re.search(message, infilling().condition_error(condition) or "")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            {**UNET, "shape": [3, 18, 17]},
            r"takes sides divisible by 2 and channels divisible by 8, got shape \[3, 18, 17",
        ),
        ({**UNET, "channels": 12}, r"channels divisible by 8, got .* 12 channels"),
        ({**UNET, "attention": [5]}, r"no level has height 5; choose the heights in attention from \[16, 8\]"),
        ({**INFILLING, "kernel": 4}, r"kernel odd; got .* kernel 4"),
        ({**INFILLING, "shape": [40, 95]}, r"frames must be divisible by patch.* got frames 95, patch 2"),
    ],
)
def test_an_invalid_architecture_is_rejected(architecture: dict[str, Any], message: str) -> None:
    """The message contains the sizes that do not fit."""
    with pytest.raises(ValueError, match=message):
        build_net(architecture)
