"""Figures of samples: what a person looks at follows from the kind, and a failure costs no more than a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey
from orchestrator.hosts.host import Host
from orchestrator.models.facts import ModelFacts
from orchestrator.models.kinds import Kind, guess_kind
from orchestrator.pairs import PairSpec
from orchestrator.pool.requests import LocalPool
from orchestrator.reports.drawing import kinds
from orchestrator.reports.drawing.kinds import DRAWINGS, Drawing
from orchestrator.reports.drawing.plane import Plane
from orchestrator.reports.folder import ReportFolder
from orchestrator.reports.gallery import SCATTERED, Panel, Strip
from orchestrator.reports.sweep import write_report
from orchestrator.results.store import Row
from solvers.schedulers.cond_ot import CondOT


def _facts(kind: Kind, smallest: float = -1.0, largest: float = 1.0) -> ModelFacts:
    return ModelFacts(
        name="any",
        digest="0" * 64,
        shape=(2,),
        prediction="velocity",
        scheduler=CondOT(),
        native_scheduler="cond_ot",
        data_range=largest - smallest,
        device_class="cpu",
        parameters=1,
        rate=8000 if kind == "sound" else None,
        kind=kind,
        data_min=smallest,
        data_max=largest,
    )


def _panel(truth: npt.NDArray[Any], *solvers: npt.NDArray[Any]) -> Panel:
    names = ["Euler", "Midpoint"]
    strips = [Strip(name, samples.astype(np.float32), 20.0) for name, samples in zip(names, solvers, strict=False)]
    return Panel(8, 1.0, (Strip("Ground truth", truth.astype(np.float32), None), *strips))


def _draw(panel: Panel, facts: ModelFacts) -> Figure:
    """The figure, rendered, so that what matplotlib finds only then is found here."""
    figure = DRAWINGS[facts.kind].draw(panel, facts)
    figure.canvas.draw()
    plt.close(figure)
    return figure


def _texts(figure: Figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title])


def _random(*shape: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal(shape)


SHAPES: list[tuple[Kind | None, tuple[int, ...]]] = [
    (None, (1,)),
    (None, (2,)),
    (None, (7,)),
    (None, (16, 2)),
    (None, (1, 32)),
    (None, (20, 12)),
    (None, (1, 8, 8)),
    (None, (2, 8, 8)),
    (None, (3, 8, 8)),
    (None, (4, 8, 8)),
    (None, (20, 3, 40)),
    (None, (3, 4, 8, 8)),
    (None, (1, 9, 4, 6)),
    (None, (2, 2, 2, 2, 2)),
    ("vectors", (3, 4, 4)),
    ("series", (24,)),
    ("trajectory", (16, 1)),
    ("trajectory", (16, 2)),
    ("trajectory", (16, 3)),
    ("trajectory", (2, 40)),
    ("trajectory", (8, 10)),
    ("points", (12, 3)),
    ("points", (2, 50)),
    ("points", (5, 9)),
    ("image", (8, 8)),
    ("video", (4, 8, 8)),
    ("sound", (40, 30)),
    ("sound", (8, 6, 10)),
    ("sound", (64,)),
]


@pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=lambda value: str(value))
def test_samples_of_every_shape_are_drawn(kind: Kind | None, shape: tuple[int, ...]) -> None:
    """Every solver is named with its PSNR, and the figure fits the report, also if samples are not finite or huge."""
    truth = _random(3, *shape)
    close, far = truth + 0.1, truth * 1e30
    far[1] = np.nan
    far[2].flat[0] = np.inf
    figure = _draw(_panel(truth, close, far), _facts(kind or guess_kind(shape)))
    assert {"Euler\n20.0 dB", "Midpoint\n20.0 dB"} <= {
        text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title]
    }
    alone = _draw(_panel(truth), _facts(kind or guess_kind(shape)))
    assert "Ground truth" in _texts(alone)
    width, height = figure.get_size_inches()
    assert 1 <= width <= 12
    assert height <= 8


def test_images_are_shown_on_the_range_of_the_data() -> None:
    """Data in [0, 1] is not grey: 0 is black and 1 is white, and a difference of a tenth of the range is amplified."""
    truth = np.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    figure = _draw(_panel(truth, truth - 0.1), _facts("image", 0.0, 1.0))
    shown, sample, difference = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    assert (shown.min(), shown.max()) == (-1, 1)
    np.testing.assert_allclose(sample[-1, -1], 0.8, atol=1e-6)
    np.testing.assert_allclose(difference, -4 * 0.1 * 2, atol=1e-6)


def test_channels_that_are_not_colours_lie_side_by_side() -> None:
    """Two or four channels are not a colour: each is a grey picture of its own."""
    for channels, shape in ((2, (48, 98)), (4, (98, 98))):
        figure = _draw(_panel(_random(1, channels, 8, 8)), _facts("image"))
        assert np.asarray(figure.axes[0].images[0].get_array()).shape == shape


def test_time_is_the_longer_axis_of_a_series() -> None:
    """Waves of a flow are (C, T), tables of a forecaster (T, D): both are drawn against time."""
    for shape in ((1, 32), (32, 1)):
        truth = np.cumsum(_random(2, 32), axis=1).reshape(2, *shape)
        figure = _draw(_panel(truth, truth + 0.5), _facts("series"))
        upper, lower = figure.axes[:2]
        np.testing.assert_allclose(_line(upper, 1), truth[0].ravel() + 0.5, rtol=1e-6)
        np.testing.assert_allclose(_line(lower, 0), 0.5, rtol=1e-5)


def _line(axes: Axes, number: int) -> npt.NDArray[Any]:
    return np.asarray(axes.lines[number].get_ydata())


def test_only_the_coordinates_that_vary_most_are_drawn() -> None:
    """Lines of a dozen coordinates could not be told apart; the legend names those that are drawn."""
    figure = _draw(_panel(_random(2, 30, 12) * 2.0 ** np.arange(12), _random(2, 30, 12)), _facts("series"))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][1:] == [f"coordinate {n}" for n in range(5, 13)]
    assert legend.get_title().get_text() == "the 8 of 12 coordinates that vary most"


def test_a_trajectory_is_also_a_path_in_the_plane() -> None:
    """With two coordinates the path is x against y, in equal units."""
    truth = np.cumsum(_random(1, 16, 2), axis=1)
    path = _draw(_panel(truth, truth), _facts("trajectory")).axes[0]
    np.testing.assert_allclose(np.stack([path.lines[0].get_xdata(), path.lines[0].get_ydata()], 1), truth[0], rtol=1e-6)
    assert path.get_aspect() == 1
    turned = _draw(_panel(*2 * [truth.swapaxes(1, 2)]), _facts("trajectory")).axes[0]
    np.testing.assert_array_equal(turned.lines[0].get_xydata(), path.lines[0].get_xydata())


def test_the_plane_of_vectors_holds_most_of_their_variance() -> None:
    """It is spanned by ground truth's two leading principal components; two coordinates are shown as they are."""
    points = _random(500, 5) * [0.1, 3, 0.1, 1, 0.1]
    plane = Plane.of(points)
    assert plane.names == ("principal component 1 (89 %)", "principal component 2 (11 %)")
    np.testing.assert_allclose(np.abs(plane.axes), np.eye(5)[[1, 3]], atol=0.05)
    np.testing.assert_allclose(plane.project(points).mean(axis=0), 0, atol=1e-12)
    np.testing.assert_array_equal(Plane.of(points[:, :2]).project(points[:, :2]), points[:, :2])


def test_samples_beyond_ground_truth_are_counted() -> None:
    """A solver that diverges does not shrink ground truth to a dot; its samples outside are counted."""
    truth = _random(50, 2)
    wild = truth.copy()
    wild[:3] *= 1e6
    wild[3] = np.nan
    figure = _draw(_panel(truth, truth, wild), _facts("vectors"))
    assert "4 outside" in _texts(figure)
    assert np.ptp(figure.axes[1].get_xlim()) < 8


def test_frames_of_a_video_stand_in_a_row() -> None:
    """Six of nine frames, evenly spaced, with their numbers."""
    figure = _draw(_panel(_random(1, 1, 9, 4, 4)), _facts("video"))
    assert [axes.get_title() for axes in figure.axes] == [f"frame {n}" for n in (1, 3, 4, 6, 7, 9)]


def _raises(panel: Panel, facts: ModelFacts) -> Figure:
    plt.subplots()
    raise ValueError("Invalid shape (2,)\nfor image data")


def test_a_figure_that_cannot_be_drawn_costs_a_sentence(
    tmp_path: Path, config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has the sentence in its place, the user gets a note, and no file or open figure is left behind."""
    monkeypatch.setitem(kinds.DRAWINGS, "image", Drawing(_raises, "with differences"))
    notes: list[str] = []
    row = Row(
        label="Euler",
        kind="common grid",
        nfe=8,
        guidance_scale=1.0,
        sigma0=1.0,
        detail="uniform",
        metrics={"psnr_db": 20.0, "snr_db": 20.0, "rmse": 0.1},
        stderr={"psnr_db": 0.1, "snr_db": 0.1, "rmse": 0.1},
        seeds=1,
        forwards=0,
        backwards=0,
        keys=("k",),
    )
    panels = [_panel(_random(2, 1, 4, 4))]
    files = write_report(tmp_path, config, _facts("image"), [], [row], [], panels, notes.append)
    (sentence,) = notes
    title, reason = sentence.split(": this figure could not be drawn: ")
    assert title == "Samples at NFE 8 from the same noise, with differences"
    assert reason.endswith("in _raises: ValueError: Invalid shape (2,) for image data.")
    assert f"This figure could not be drawn: {reason}" in files[-1].read_text(encoding="utf-8")
    assert [file.name for file in files if file.name.startswith("samples")] == []
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert plt.get_fignums() == []


def test_a_decoder_that_fails_costs_a_sentence(
    tmp_path: Path, pool: LocalPool, facts: ModelFacts, specs: dict[PairKey, PairSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that cannot be decoded are missing from the report, with the decoder's reason."""

    def decode(samples: Any) -> Any:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    host = pool.host
    assert isinstance(host, Host)
    monkeypatch.setattr(host.model, "decode", decode)
    panel = Panel.sampled(pool, facts, specs[PairKey("test", 1.0, 0)], 8, [("Ground truth", None, None)])
    assert panel.strips == ()
    notes: list[str] = []
    picture = ReportFolder(tmp_path, notes.append).samples(panel, facts, "samples.png", "digits: ")
    assert picture.data is None
    assert picture.missing is not None
    assert "CUDNN_STATUS_NOT_SUPPORTED" in picture.missing
    (sentence,) = notes
    assert sentence.startswith("digits: samples at NFE 8 from the same noise: these samples could not be made: ")


def test_vectors_are_many_and_series_few(pool: LocalPool, facts: ModelFacts, specs: dict[PairKey, PairSpec]) -> None:
    """A scatter plot needs more samples than a row of pictures has room for, and lines need more room."""
    from dataclasses import replace

    test = specs[PairKey("test", 1.0, 0)]
    counts = {}
    for kind in ("vectors", "image", "series"):
        panel = Panel.sampled(pool, replace(facts, kind=kind), test, 8, [("Ground truth", None, None)])  # type: ignore[arg-type]
        counts[kind] = len(panel.strips[0].samples)
    assert counts == {"vectors": min(SCATTERED, test.count), "image": 12, "series": 4}
