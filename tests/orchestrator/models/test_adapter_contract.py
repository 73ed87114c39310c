"""What every adapter of a single network guarantees, whatever its file format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_examples import EXAMPLES, Example
from proofs import GUIDANCE, LABELS, errors, influences, noise

from orchestrator import plugins
from orchestrator.errors import ConfigError

OTHERS = {"diffusers", "zoo"}
"""Adapters with tests of their own: pipelines have several networks each, and the zoo's files cannot be chosen."""


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]


@pytest.fixture
def file(example: Example, tmp_path: Path) -> Path:
    """The network in the adapter's format."""
    return example.write(tmp_path)


@pytest.fixture
def model(example: Example, file: Path) -> Any:
    return example.build(file)


def test_every_adapter_is_here() -> None:
    """A new adapter needs an example."""
    assert {example.adapter for example in EXAMPLES.values()} | OTHERS == set(plugins.names("models"))


@pytest.mark.parametrize("scale", [1.0, GUIDANCE])
def test_the_librarys_own_sampler_converges_to_the_ground_truth(
    example: Example, file: Path, model: Any, scale: float
) -> None:
    """Both solve the same equation: the sampler comes as close as its order says when it takes more steps."""
    coarse, middle, fine = errors(model, example.sampler(file, scale), example.steps, scale)
    low, high = example.order
    assert fine < example.error
    assert low < coarse / middle < high
    assert middle / fine > low


def test_the_velocity_depends_on_every_input(model: Any) -> None:
    """State, time, label and guidance each change it by more than 1 %, so the agreement above covers all of them."""
    assert min(influences(model).values()) > 0.01


def test_a_prediction_depends_on_its_own_sample_alone(model: Any) -> None:
    """Batched predictions, with a time and a label per sample, equal separate ones."""
    x, times = noise(model.shape), torch.tensor([0.1, 0.8, 0.3, 0.5], dtype=torch.float64)
    batched = model.predict(x, times, LABELS)
    separate = torch.cat([model.predict(x[i : i + 1], times[i], LABELS[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(batched, separate, rtol=1e-5, atol=1e-5)


def test_the_same_question_has_the_same_answer(model: Any) -> None:
    """And the question is left as it was."""
    x, t, labels = noise(model.shape), torch.tensor(0.3, dtype=torch.float64), LABELS.clone()
    before = x.clone()
    assert torch.equal(model.predict(x, t, labels), model.predict(x, t, labels))
    assert torch.equal(x, before)
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_prediction_has_the_dtype_of_the_state(model: Any, dtype: torch.dtype) -> None:
    """Ground truth keeps a float64 state around a float32 network."""
    assert model.predict(noise(model.shape).to(dtype), torch.tensor(0.5), LABELS).dtype == dtype


def test_the_weights_are_frozen(model: Any) -> None:
    """Only theta is trained."""
    parameters = model.net.parameters() if isinstance(model.net, torch.nn.Module) else ()
    assert not any(parameter.requires_grad for parameter in parameters)


def test_the_digest_is_that_of_content_and_options(example: Example, file: Path, model: Any, tmp_path: Path) -> None:
    """It is the same before and after the network is loaded, and for a copy elsewhere; not for another option."""
    before = model.digest
    _ = model.net
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(file, tmp_path / "elsewhere")
    assert example.build(Path(copy)).digest == model.digest == before
    assert example.build(file, **example.other).digest != before


def test_a_file_with_other_content_is_rejected(example: Example, file: Path) -> None:
    """The message names the file."""
    file.write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match=rf"{file.name} .*{example.damaged}"):
        _ = example.build(file).net
