"""Every metric on samples of every kind: it is measured, or refused by its name with what to use instead."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from metric_examples import built

from orchestrator import plugins
from orchestrator.config.reading import parse_config
from orchestrator.datasets.labels import Labels
from orchestrator.errors import ConfigError
from orchestrator.metrics.base import Batch
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.metrics.psnr import PSNR
from orchestrator.models.kinds import guess_kind

COUNT = 200
SHAPES = [(1,), (5,), (12, 3), (2, 30), (20, 3), (1, 8, 8), (3, 32, 32), (4, 32, 32), (2, 3, 4, 4)]
ANY = {"psnr", "snr", "rmse", "coordinate_rmse", "sliced_wasserstein"}
OF_IMAGES = {
    "psnr_uint8": [(1, 8, 8), (3, 32, 32), (4, 32, 32)],
    "lpips": [(3, 32, 32)],
    "fid": [(1, 8, 8)],
    "kid": [(1, 8, 8)],
    "clip_score": [(1, 8, 8), (3, 32, 32)],
    "pick_score": [(1, 8, 8), (3, 32, 32)],
}
"""Shapes that metrics of images take; ``fid`` and ``kid`` with the features of digits."""
OPTIONS: dict[str, dict[str, Any]] = {"fid": {"features": "digits_cnn"}, "kid": {"features": "digits_cnn"}}
OF_SOUND = {"wer", "speaker_similarity"}
VECTORS = {
    "name": "torch_module",
    "options": {
        "factory": "own_networks:Flow",
        "shape": [6],
        "prediction": "velocity",
        "native_scheduler": "cond_ot",
        "call": "x, t, y",
        "classes": 3,
    },
}
"""A model of vectors of six values."""
OTHERWISE = "psnr, snr, rmse, coordinate_rmse, frechet or sliced_wasserstein"


def takes(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a metric is defined for :data:`COUNT` samples of a shape."""
    if name == "frechet":
        return math.prod(shape) < COUNT
    return name in ANY or shape in OF_IMAGES.get(name, [])


def spec_of(name: str) -> MetricSpec:
    spec = MetricSpec(name, OPTIONS.get(name, {}))
    if name == "lpips":
        spec.__dict__["metric"] = built(name)
    return spec


def test_every_metric_is_listed_here() -> None:
    """A new metric needs a line that says which samples it is for."""
    assert set(plugins.names("metrics")) == ANY | {"frechet"} | set(OF_IMAGES) | OF_SOUND


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", plugins.names("metrics"))
def test_a_metric_takes_a_shape_or_refuses_it_by_name(name: str, shape: tuple[int, ...]) -> None:
    """Before anything is sampled; what is taken has a finite value."""
    spec = spec_of(name)
    if not takes(name, shape):
        with pytest.raises(ConfigError, match=f"metric '{name}'") as refusal:
            spec.check_samples(guess_kind(shape), shape, shape, COUNT)
        if "image" not in guess_kind(shape) or name in OF_SOUND:
            assert (OTHERWISE in str(refusal.value)) != (name == "frechet")
        return
    spec.check_samples(guess_kind(shape), shape, shape, COUNT)
    if name in ("clip_score", "pick_score"):
        return  # their networks are not part of the package
    generator = torch.Generator().manual_seed(0)
    count = 4 if name == "lpips" else COUNT
    reference = torch.rand(count, *shape, generator=generator) * 2 - 1
    samples = (reference + 0.1 * torch.randn(count, *shape, generator=generator)).clamp(-1, 1)
    compared = spec.metric.compares
    measured = spec.metric.measure(Batch(samples, None, None, reference if compared else None)).numpy()
    real = None if compared else [spec.metric.measure(Batch(reference, None, None)).numpy()]
    assert measured.shape[0] == count
    summary = spec.metric.summarise([measured[: count // 3], measured[count // 3 :]], Labels(), real)
    assert math.isfinite(summary.mean)
    assert summary.count == count


@pytest.mark.parametrize("data_range", [1e-4, 1.0, 255.0, 3e5])
@pytest.mark.parametrize("shape", [(5,), (20, 3), (1, 8, 8)])
def test_psnr_does_not_depend_on_the_unit_of_the_data(data_range: float, shape: tuple[int, ...]) -> None:
    """An error of a hundredth of the range is 40 dB, in micrometres and in kilometres."""
    generator = torch.Generator().manual_seed(0)
    reference = data_range * torch.rand(4, *shape, generator=generator)
    values = PSNR().per_sample(reference + data_range / 100, reference, data_range)
    np.testing.assert_allclose(values.numpy(), 40, atol=0.01)


@pytest.mark.parametrize("metric", ["psnr_uint8", "lpips"])
def test_a_metric_of_images_is_refused_in_the_configuration_of_vectors(metric: str, experiment: dict[str, Any]) -> None:
    """Before a host starts, in a sweep's ``metrics``; the message has the shape."""
    config = parse_config(experiment | {"model": VECTORS, "metrics": ["psnr", metric]}, "vectors.yaml")
    with pytest.raises(ConfigError, match=rf"^metrics: metric '{metric}' measures images, but .* vectors, of shape"):
        config.check()


def test_a_perceptual_loss_is_refused_for_vectors(experiment: dict[str, Any]) -> None:
    """Its network takes images of one size; the message names both shapes."""
    learned = [{"family": "bns", "method": "adam", "objective": {"name": "perceptual"}}]
    config = parse_config(experiment | {"model": VECTORS, "learned": learned}, "vectors.yaml")
    with pytest.raises(ConfigError, match=r"learned\.0: features 'digits_cnn' are of samples of shape \(1, 8, 8\)"):
        config.check()
