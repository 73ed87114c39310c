"""An evaluation that cannot succeed is refused before a host starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.config.reading import parse_config
from orchestrator.errors import ConfigError
from orchestrator.evaluation.check import check_evaluation
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.models.kinds import Kind


def check(experiment: dict[str, Any], **evaluation: Any) -> None:
    """Check the small experiment with this evaluation."""
    check_evaluation(parse_config(experiment | {"evaluation": evaluation}, "small.yaml"))


def fid(folder: Path, **options: Any) -> dict[str, Any]:
    """A Frechet distance to a folder of images."""
    reference = {"name": "image_folder", "options": {"folder": str(folder), "grayscale": True}}
    return {"name": "fid", "options": {"features": "digits_cnn", "reference": reference} | options}


def pictures(folder: Path, count: int) -> Path:
    """Write some images."""
    for i in range(count):
        Image.new("L", (8, 8), 10 * i).save(folder / f"{i}.png")
    return folder


def test_an_unreadable_image_of_a_reference_is_named(experiment: dict[str, Any], tmp_path: Path) -> None:
    """Not after the pairs are made, and once for all metrics that compare with it."""
    metrics = [fid(pictures(tmp_path, 3)), fid(tmp_path) | {"name": "kid"}]
    check(experiment, metrics=metrics)
    (tmp_path / "2.png").write_text("no")
    with pytest.raises(ConfigError, match=r"evaluation on 'labels': .*2\.png is not a readable image"):
        check(experiment, metrics=metrics)


@pytest.mark.parametrize("metric", ["fid", "kid"])
def test_one_sample_has_no_distance(experiment: dict[str, Any], tmp_path: Path, metric: str) -> None:
    """Neither one sample nor one real sample determines a covariance or an unbiased kernel distance."""
    pictures(tmp_path, 1)
    metrics = [fid(tmp_path) | {"name": metric}]
    with pytest.raises(ConfigError, match=r"needs at least 2 samples, but the real samples of ImageFolder are 1"):
        check(experiment, metrics=metrics)
    pictures(tmp_path, 2)
    check(experiment, metrics=metrics, samples=2)
    with pytest.raises(ConfigError, match=rf"{metric}\[digits_cnn\] needs at least 2 samples, but evaluation\.samples"):
        check(experiment, metrics=metrics, samples=1)


def test_statistics_of_two_sizes_are_refused(experiment: dict[str, Any], tmp_path: Path) -> None:
    """A file whose mean and covariance do not belong together."""
    np.savez(tmp_path / "a.npz", mu=np.zeros(64), sigma=np.eye(63))
    with pytest.raises(ConfigError, match=r"a\.npz is not a statistics file: 'mu' is of shape \(64,\) and 'sigma' of"):
        check(experiment, metrics=[fid(tmp_path, reference=str(tmp_path / "a.npz"))])


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"metrics": ["fidd"]}, r"^evaluation\.metrics\.0: unknown metric 'fidd' \(did you mean 'fid'\?\)"),
        (
            {"metrics": [{"name": "kid", "options": {"block": 2.5}}]},
            r"^evaluation\.metrics\.0: .*block must be",
        ),
        ({"metrics": ["psnr", "psnr"]}, r"evaluation\.metrics has 'psnr_db' twice"),
        ({"baselines": ["bns"]}, r"^evaluation\.baselines\.0: family 'bns' is learned"),
        (
            {"datasets": {"a": {"name": "labels", "options": {"classes": 99}}}},
            r"^evaluation\.datasets\.a: condit",
        ),
    ],
)
def test_errors_name_the_full_key(experiment: dict[str, Any], evaluation: dict[str, Any], message: str) -> None:
    """Of a metric, a dataset or a baseline."""
    with pytest.raises(ConfigError, match=message):
        check(experiment, **evaluation)


@pytest.mark.parametrize(
    ("kind", "metric", "reason"),
    [
        (
            "vectors",
            "fid",
            r"metric 'fid' measures images, but samples of the model are vectors, of shape \(1, 8, 8\); remove it, or "
            r"choose one for any kind: .* set the model's option kind to image",
        ),
        ("series", "wer", r"metric 'wer' measures sound, but samples of the model are series, of shape \(1, 8, 8\)"),
        ("image", "wer", r"metric 'wer' measures sound, but samples of the model are images, of shape"),
        ("sound", "psnr_uint8", r"metric 'psnr_uint8' measures images, but samples of the model are sound, of"),
    ],
)
def test_a_metric_of_another_kind_is_refused_by_name(kind: Kind, metric: str, reason: str) -> None:
    """A model of vectors makes neither images nor sound; metrics of raw samples work for every kind."""
    for raw in ("psnr", "rmse"):
        MetricSpec(raw).check_samples(kind, (1, 8, 8), (1, 8, 8), 40)
    with pytest.raises(ConfigError, match=reason):
        MetricSpec(metric).check_samples(kind, (1, 8, 8), (1, 8, 8), 40)
