"""The configuration of a comparison: invalid settings are refused before any work, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import ConfigError
from orchestrator.network_distillation.comparison import ComparisonRow, draw, markdown_table
from orchestrator.network_distillation.config import NetworkDistillationConfig, load_network_config


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The configuration file of a small comparison."""
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": "zoo", "options": {"weights": "digits_fm_ot"}},
        "pairs": {"train": 16, "validation": 16, "test": 80, "batch_size": 8, "shard_size": 16},
        "nfe": [4],
        "fixed": ["midpoint"],
        "learned": ["bns"],
        "weights": [{"loss": "lte", "iterations": 4, "validate_every": 2}],
        "progressive": {"start_steps": 8},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_the_shipped_comparison_is_valid(repository: Path) -> None:
    """It has methods of both kinds, at NFEs that all of them support."""
    config = load_network_config(str(repository / "sweeps/configs/network_distillation/digits.yaml"))
    assert config.nfe == (4, 8)
    assert {entry.loss for entry in config.weights} == {"lte", "rmse"}
    assert config.progressive is not None


def test_bare_names_are_families(small: Path) -> None:
    """As in the configuration of a sweep."""
    config = load_network_config(str(small))
    assert ([s.family for s in config.fixed], [s.family for s in config.learned]) == (["midpoint"], ["bns"])


def test_the_solvers_form_an_experiment_on_the_same_pairs(small: Path) -> None:
    """Its points are therefore points of a sweep and can be shared with one."""
    config = load_network_config(str(small), ["seed=3"])
    experiment = config.experiment()
    assert (experiment.pairs, experiment.seeds, experiment.guidance_scale) == (config.pairs, (3,), (1.0,))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model={name: base}",
            r"model adapter 'base' has no weights that can be trained here.*\{weights: NAME or PATH",
        ),
        ("learned=[]", r"'learned' is empty: the comparison needs a distilled solver"),
        ("nfe=[4,5]", r"fixed family 'midpoint' at nfe 5"),
        ("weights.0.validate_every=9", r"validate_every is 9, above its 4 iterations.*use at most 4"),
        ("weights.0.loss=mse", r"weights\.0\.loss: Input should be 'lte' or 'rmse'"),
        ("weights.0.rate=1", r"weights\.0\.rate: unknown key"),
        ("progressive.start_steps=12", r"4 is not reached from start_steps 12; use start_steps 16"),
        ("model.options.weights=digits_eps_vp", r"digits_eps_vp predicts epsilon"),
        ("features=inception", r"features 'inception' need weights-inception"),
        ("dataset=labels", r"no reference statistics digits_cnn\.labels; there are: .*digits_cnn\.digits"),
        ("pairs.test=64", r"pairs\.test is 64, but digits_cnn has 64 features: .* more samples than features"),
        ("wieghts=[]", r"wieghts: unknown key \(did you mean 'weights'\?\)"),
    ],
)
def test_invalid_settings_are_refused(small: Path, override: str, message: str) -> None:
    """The message names the key, the value and the remedy."""
    with pytest.raises(ConfigError, match=message):
        load_network_config(str(small), [override])


def test_midpoint_students_need_an_even_nfe(small: Path) -> None:
    """Even if no fixed solver needs one."""
    with pytest.raises(ConfigError, match=r"'weights' trains midpoint steps, but nfe has 5: .* use 4 or 6"):
        load_network_config(str(small), ["nfe=[5]", "fixed=[ddim]", "progressive=null"])


def test_the_same_student_twice_is_refused(small: Path) -> None:
    """The table would have two rows of the same name."""
    entry = "{loss: lte, iterations: 4, validate_every: 2}"
    with pytest.raises(ConfigError, match="'weights' lists the same settings twice"):
        load_network_config(str(small), [f"weights=[{entry}, {entry}]"])


def test_only_the_name_the_model_and_the_nfe_are_required() -> None:
    """Every other key has a default."""
    needed = {name for name, field in NetworkDistillationConfig.model_fields.items() if field.is_required()}
    assert needed == {"name", "model", "nfe"}


SPENT_BNS = {"forwards": 250_000, "backwards": 16_000, "training_set": 520, "parameters": 17, "bytes": 914}
SPENT_PD = {
    "forwards": 3_000_000,
    "backwards": 1_000_000,
    "training_set": 1797,
    "parameters": 648_640,
    "bytes": 2_597_248,
}
ROWS = [
    ComparisonRow(method="Ground truth (dopri5)", nfe=160, psnr_db=float("inf"), psnr_stderr=0, fid=0.5),
    ComparisonRow(method="Midpoint", nfe=4, psnr_db=30.0, psnr_stderr=0.1, fid=2.0, bytes=626),
    ComparisonRow(method="BNS", nfe=4, psnr_db=40.0, psnr_stderr=0.1, fid=0.7, **SPENT_BNS),
    ComparisonRow(method="Progressive Distillation", nfe=4, psnr_db=20.0, psnr_stderr=0.1, fid=0.6, **SPENT_PD),
]


def test_the_table_has_the_columns_of_the_papers() -> None:
    """Distance, forwards, training set and parameters (BNS Table 3). The best value per NFE is bold."""
    lines = markdown_table(ROWS, "digits_cnn", "real digits").splitlines()
    assert "| NFE | PSNR (dB) | fid[digits_cnn] | forwards | backwards | training set | trained | bytes |" in lines[0]
    assert lines[2] == "| Ground truth (dopri5) | 160 | — | 0.500 | — | — | — | — | — |"
    assert lines[4] == "| BNS | 4 | **40.0 ± 0.10** | 0.700 | 0.25 M | 16.0 k | 520 trajectories | 17 | 914 |"
    assert "| **0.600** | 3.00 M | 1.00 M | 1,797 real digits | 648,640 |" in lines[5]


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    """It is drawn even if all solvers have the same NFE."""
    draw(ROWS, "digits_cnn", tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
