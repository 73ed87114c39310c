"""FID and KID from stored features agree with torch-fidelity, however the samples are split into shards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from orchestrator import plugins
from orchestrator.datasets.base import Dataset
from orchestrator.datasets.digits import Digits
from orchestrator.datasets.labels import Labels
from orchestrator.errors import ConfigError
from orchestrator.features.inception import Inception, to_uint8
from orchestrator.features.moments import Moments, feature_moments
from orchestrator.metrics import kid
from orchestrator.metrics.base import Array, Batch
from orchestrator.metrics.fid import FID
from orchestrator.metrics.kid import KID

DIGITS = Digits()


@pytest.fixture(scope="module")
def real() -> Tensor:
    """The real digits, (1797, 1, 8, 8)."""
    return torch.from_numpy(DIGITS.reference().samples)


@pytest.fixture(scope="module")
def samples(real: Tensor) -> Tensor:
    """Digits with added noise."""
    return real[:600] + 0.3 * torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _fid(**options: Any) -> FID:
    return plugins.build("metrics", "fid", {"features": "digits_cnn", **options})


def _kid(**options: Any) -> KID:
    return plugins.build("metrics", "kid", {"features": "digits_cnn", **options})


def _shards(metric: FID | KID, images: Tensor, size: int, batch: int = 64) -> list[Array]:
    """Features of every shard, measured in batches, as a scorer stores them."""
    measured = torch.cat([metric.measure(Batch(part, None, DIGITS)) for part in images.split(batch)])
    return [part.numpy() for part in measured.split(size)]


def test_fid_agrees_with_torch_fidelity(samples: Tensor, real: Tensor) -> None:
    """Equal to 1e-6 to torch-fidelity's statistics and formula on the same features."""
    metric = _fid()
    mine, theirs = (torch.from_numpy(np.concatenate(_shards(metric, x, 100))) for x in (samples, real))
    expected = fid_statistics_to_metric(*(fid_features_to_statistics(f) for f in (mine, theirs)), verbose=False)
    summary = metric.summarise(_shards(metric, samples, 100), DIGITS, _shards(metric, real, 1000))
    assert summary.mean == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert (summary.count, summary.not_finite) == (600, 0)
    assert math.isnan(summary.stderr)


def test_fid_depends_on_neither_shards_nor_their_order(samples: Tensor, real: Tensor) -> None:
    """Sums of features are exact, so FID is equal to the last bit."""
    metric = _fid()
    reference = _shards(metric, real, 1000)
    shards = _shards(metric, samples, 7)
    unsplit = metric.summarise(_shards(metric, samples, 600), DIGITS, reference)
    assert metric.summarise(shards, DIGITS, reference).mean == unsplit.mean
    assert metric.summarise(shards[::-1], DIGITS, reference).mean == unsplit.mean


def test_the_batch_size_of_a_scorer_changes_fid_only_by_rounding(samples: Tensor, real: Tensor) -> None:
    """The last bits of a network's outputs depend on the batch; the distance agrees to 1e-5."""
    metric = _fid()
    reference = _shards(metric, real, 1000)
    one, many = (metric.summarise(_shards(metric, samples, 100, batch), DIGITS, reference).mean for batch in (33, 600))
    assert one == pytest.approx(many, rel=1e-5)


def test_shipped_statistics_replace_the_real_digits(samples: Tensor, real: Tensor) -> None:
    """With them no real images are measured, and the distances are the same."""
    for make in (_fid, _kid):
        measured, shipped = make(), make(reference="digits")
        assert measured.real(DIGITS) is DIGITS
        assert shipped.real(DIGITS) is None
        shards = _shards(measured, samples, 100)
        expected = measured.summarise(shards, DIGITS, _shards(measured, real, 1000)).mean
        assert shipped.summarise(shards, DIGITS).mean == pytest.approx(expected, rel=1e-3)


def test_kid_is_the_mean_over_blocks_of_torch_fidelitys_estimator(samples: Tensor, real: Tensor) -> None:
    """A single block of all samples gives the value of torch-fidelity for a subset of that size."""
    metric = _kid(block=600)
    mine, theirs = _shards(metric, samples, 100), _shards(metric, real[900:1500], 250)
    expected = kid_features_to_metric(
        *(torch.from_numpy(np.concatenate(x).astype(np.float64)) for x in (mine, theirs)),
        kid_subsets=1,
        kid_subset_size=600,
        verbose=False,
    )
    summary = metric.summarise(mine, DIGITS, theirs)
    assert summary.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert math.isnan(summary.stderr)
    blocks = _kid(block=100).summarise(mine, DIGITS, theirs)
    assert blocks.count == 600
    assert abs(blocks.mean - summary.mean) < 4 * blocks.stderr


def test_kid_does_not_depend_on_shards(samples: Tensor, real: Tensor) -> None:
    """Blocks are consecutive rows, wherever shards end. Real samples are reused if there are too few."""
    metric = _kid(block=100)
    few = _shards(metric, real[:150], 40)
    by_seven = metric.summarise(_shards(metric, samples, 7, 600), DIGITS, few)
    assert by_seven == metric.summarise(_shards(metric, samples, 600, 600), DIGITS, few)


def test_kid_of_the_same_distribution_is_about_zero(real: Tensor) -> None:
    """Unlike FID it is unbiased: between halves of the real digits it is within three standard errors of zero."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    metric = _kid(block=100)
    a, b = (_shards(metric, real[part], 100) for part in (order[:800], order[800:1600]))
    summary = metric.summarise(a, DIGITS, b)
    assert abs(summary.mean) < 3 * summary.stderr


@pytest.mark.parametrize("arrange", ["sorted", "in turn"])
def test_kid_does_not_depend_on_the_order_of_real_data(real: Tensor, arrange: str) -> None:
    """Data sets come sorted by class or with classes in turn, so a block of real data is drawn from all classes."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    metric, labels = _kid(block=150), torch.from_numpy(DIGITS.reference().labels)
    theirs = order[897:][labels[order[897:]].argsort(stable=True)]
    if arrange == "in turn":
        theirs = theirs.view(10, 90).T.flatten()
    summary = metric.summarise(_shards(metric, real[order[:897]], 100), DIGITS, _shards(metric, real[theirs], 70))
    assert abs(summary.mean) < 4 * summary.stderr
    assert summary.stderr < 10


def test_real_blocks_are_disjoint_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows repeat only after all blocks are used. The blocks do not depend on how many fit in memory at once."""
    rows = np.arange(1050, dtype=np.float64)[:, None]
    shards = [rows[i : i + 37] for i in range(0, 1050, 37)]
    blocks = list(itertools.islice(kid._drawn(shards, 100), 13))
    assert len(set(np.concatenate(blocks[:10]).ravel().tolist())) == 1000
    monkeypatch.setattr(kid, "AT_ONCE", 3)
    for first, again in zip(blocks, itertools.islice(kid._drawn([rows], 100), 13), strict=True):
        np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(blocks[10], blocks[0])


@pytest.mark.parametrize("make", [_fid, _kid])
@pytest.mark.parametrize("side", ["samples", "real"])
def test_features_that_are_not_finite_are_refused(real: Tensor, make: Callable[[], FID | KID], side: str) -> None:
    """By either distance, both for samples and for real data."""
    metric = make()
    shards = {"samples": _shards(metric, real, 1000), "real": _shards(metric, real, 1000)}
    shards[side][1][5, 3] = np.nan
    with pytest.raises(ValueError, match=r"features of 1 of (797|1797) samples are not finite"):
        metric.summarise(shards["samples"], DIGITS, shards["real"])


def test_files_of_statistics_are_accepted_as_reference(tmp_path: Path, samples: Tensor, real: Tensor) -> None:
    """Files of `bespoke reference`, and pytorch-fid's files of ``mu`` and ``sigma``, which KID cannot use."""
    moments = feature_moments(_fid().extractor, real, keep=500)
    (tmp_path / "digits.safetensors").write_bytes(moments.to_bytes())
    np.savez(tmp_path / "digits.npz", mu=moments.mean, sigma=moments.covariance)
    shards = _shards(_fid(), samples, 100)
    files = [str(tmp_path / name) for name in ("digits.safetensors", "digits.npz")]
    values = [_fid(reference=file).summarise(shards, DIGITS).mean for file in files]
    assert values[0] == values[1] == pytest.approx(_fid(reference="digits").summarise(shards, DIGITS).mean, rel=1e-6)
    _kid(reference=str(tmp_path / "digits.safetensors")).check(DIGITS)
    with pytest.raises(ConfigError, match=r"holds only mean and covariance, but .* needs features of samples"):
        _kid(reference=str(tmp_path / "digits.npz")).check(DIGITS)


@pytest.mark.parametrize(
    ("options", "dataset", "message"),
    [
        ({}, Labels(), "Labels has no real samples to compare with; set the option 'reference'"),
        ({"reference": "digit"}, Labels(), "no reference statistics digits_cnn.digit; there are: "),
        (
            {"reference": "none.npz"},
            Labels(),
            "no reference statistics at none.npz; make them with `bespoke reference`",
        ),
        ({"features": "digits_cn"}, DIGITS, "unknown feature extractor 'digits_cn' .did you mean 'digits_cnn'"),
        (
            {"features": "inception", "features_options": {"weights": "w.pth"}},
            DIGITS,
            "there is none at w.pth; fetch it from https",
        ),
    ],
)
def test_missing_inputs_are_refused_before_anything_starts(
    options: dict[str, Any], dataset: Dataset, message: str
) -> None:
    """Weights, statistics or real samples: the message says where they were looked for, and the remedy."""
    with pytest.raises(ConfigError, match=message):
        _fid(**options).check(dataset)


def test_a_damaged_file_of_statistics_is_refused(tmp_path: Path) -> None:
    """A file of other features is refused too."""
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"a\.npz is not a statistics file"):
        _fid(reference=str(tmp_path / "a.npz")).check(DIGITS)
    other = Moments("other", 5, np.zeros(2), np.eye(2))
    (tmp_path / "b.safetensors").write_bytes(other.to_bytes())
    with pytest.raises(ConfigError, match="holds statistics of features 'other', but the metric uses 'digits_cnn'"):
        _fid(reference=str(tmp_path / "b.safetensors")).check(DIGITS)


def test_fid_and_kid_of_the_same_features_share_measurements() -> None:
    """Metrics of other features do not, because every name contains the name of the features."""
    assert _fid().measured == _kid().measured == "features[digits_cnn]"
    assert (_fid().column, _kid().column) == ("fid[digits_cnn]", "kid[digits_cnn]")


def test_images_are_rounded_as_a_viewer_saves_them() -> None:
    """-1 becomes 0, 1 becomes 255, and values beyond are clipped."""
    assert to_uint8(torch.tensor([-1.5, -1, 0, 0.0039, 1, 7])).tolist() == [0, 0, 128, 128, 255, 255]


# ---- torch-fidelity's own network, with random weights in its file format ----------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file in torch-fidelity's format, with random weights that give features of a realistic size."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patched.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: None)
        net = FeatureExtractorInceptionV3("inception", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for tensor in net.state_dict().values():
        if tensor.ndim == 4:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_inception_fid_through_shards_agrees_with_torch_fidelity(weights: Path) -> None:
    """calculate_metrics on the same images and weights agrees to 1e-3."""
    import torch_fidelity

    generator = torch.Generator().manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(24, 3, 4, 4, generator=generator), size=32) * 2 - 1
    noisy = (smooth[12:] + 0.5 * torch.randn(12, 3, 32, 32, generator=generator)).clamp(-1, 1)
    expected = torch_fidelity.calculate_metrics(
        input1=_Images(to_uint8(noisy)),
        input2=_Images(to_uint8(smooth[:12])),
        fid=True,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        verbose=False,
        batch_size=4,
    )["frechet_inception_distance"]
    metric = plugins.build("metrics", "fid", {"features_options": {"weights": str(weights)}})
    value = metric.summarise(_shards(metric, noisy, 5, 4), DIGITS, _shards(metric, smooth[:12], 8, 4)).mean
    assert expected > 1
    assert value == pytest.approx(expected, rel=1e-3)


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_a_file_without_inception_weights_is_refused(tmp_path: Path) -> None:
    """Pickled code is not run, and a file of other tensors is not accepted."""
    extractor: Callable[[Path], Inception] = lambda path: Inception(str(path))  # noqa: E731
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other\.pth holds no weights of torch-fidelity's Inception"):
        extractor(tmp_path / "other.pth")(torch.zeros(1, 3, 8, 8))
    torch.save({"code": Path("x")}, tmp_path / "pickle.pth")
    with pytest.raises(ConfigError, match=r"pickle\.pth holds no weights of torch-fidelity's Inception"):
        extractor(tmp_path / "pickle.pth")(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="features 'inception' are of images of 1 or 3 channels"):
        extractor(tmp_path / "other.pth")(torch.zeros(1, 2, 8, 8))
