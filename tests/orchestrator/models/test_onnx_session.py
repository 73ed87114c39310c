"""``onnx_session``: a black box can be sampled, scored and distilled, and differentiating it is an error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import own_networks
import pytest
import torch
from adapter_examples import EXAMPLES, FILE, graph
from onnx import TensorProto
from proofs import LABELS, noise
from torch.autograd import forward_ad
from trial_example import trial_context

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import pair_specs
from orchestrator.config.reading import parse_config
from orchestrator.errors import ConfigError
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage
from solvers.grids import Grid
from solvers.theta import ThetaArtifact, load_theta
from sweeps.point import SolverChoice
from sweeps.points.execute import run_point
from sweeps.space import learned_points

EXAMPLE = EXAMPLES["onnx_session"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flow network as an ONNX file."""
    return EXAMPLE.write(tmp_path_factory.mktemp("exported"))


# ---- agreement with the network -----------------------------------------------------------------------------------


def test_it_predicts_as_the_exported_module(exported: Path) -> None:
    """Up to rounding in float32, with a time per sample."""
    x, t = noise((1, 2, 3)), torch.tensor([0.1, 0.9, 0.4, 0.6], dtype=torch.float64)
    prediction = EXAMPLE.build(exported).predict(x, t, LABELS)
    with torch.no_grad():
        expected = own_networks.Flow()(x.float(), t.float(), LABELS)
    torch.testing.assert_close(prediction, expected.double(), rtol=1e-5, atol=1e-6)


def test_inputs_can_be_named_in_any_order(exported: Path) -> None:
    """The option ``call`` may name the inputs."""
    x, t = noise((1, 2, 3)), torch.tensor(0.3)
    first, second = (EXAMPLE.build(exported, call=call).predict(x, t, LABELS) for call in ("x, t, y", "y=y, x=x, t=t"))
    assert torch.equal(first, second)


def test_the_facts_are_read_from_the_file(exported: Path) -> None:
    """The number of weights is that of the graph's initialisers."""
    assert (
        EXAMPLE.build(exported).parameters == sum(p.numel() for p in own_networks.Flow().parameters()) + 2
    )  # two constants


def test_external_weights_are_part_of_the_digest(tmp_path: Path) -> None:
    """Large models keep their weights in a second file; other weights make another model."""
    path = tmp_path / "large.onnx"
    onnx.save(
        graph(), path, save_as_external_data=True, location="large.bin", size_threshold=100, convert_attribute=False
    )
    model = EXAMPLE.build(path)
    before = model.digest
    assert torch.isfinite(model.predict(noise((1, 2, 3)), torch.tensor(0.3), LABELS)).all()
    data = bytearray((tmp_path / "large.bin").read_bytes())
    data[3] ^= 1
    (tmp_path / "large.bin").write_bytes(data)
    assert EXAMPLE.build(path).digest != before


# ---- derivatives are rejected -------------------------------------------------------------------------------------

NO_DERIVATIVES = r"flow is a black box without derivatives; distil with 'method: levenberg_marquardt' and jacobian"


@pytest.mark.parametrize("of", ["state", "time"])
def test_a_gradient_is_rejected(exported: Path, of: str) -> None:
    """The part of the velocity outside the network is differentiable, so the gradient would be silently wrong."""
    x, t = noise((1, 2, 3)), torch.tensor(0.3, dtype=torch.float64)
    (x if of == "state" else t).requires_grad_()
    with pytest.raises(ConfigError, match=NO_DERIVATIVES):
        EXAMPLE.build(exported).field(LABELS, 1.0)(x, t)


@pytest.mark.parametrize("of", ["state", "time"])
def test_a_forward_derivative_is_rejected(exported: Path, of: str) -> None:
    """Levenberg–Marquardt's 'jvp' needs forward derivatives."""
    x, t = noise((1, 2, 3)), torch.tensor(0.3, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x if of == "state" else t, torch.ones_like(x if of == "state" else t))
        inputs = (dual, t) if of == "state" else (x, dual)
        with pytest.raises(ConfigError, match=NO_DERIVATIVES):
            EXAMPLE.build(exported).field(LABELS, 1.0)(*inputs)


# ---- distillation -------------------------------------------------------------------------------------------------


def experiment(file: Path, **learned: Any) -> ExperimentConfig:
    """An experiment that distils 4 evaluations with guidance, starting from Euler."""
    config = parse_config(
        {
            "name": "black-box",
            "model": {"name": "onnx_session", "options": FILE | {"file": str(file)}},
            "conditioning": {"name": "labels", "options": {"classes": own_networks.CLASSES}},
            "guidance_scale": 2.0,
            "pairs": {
                "train": 32,
                "validation": 32,
                "test": 32,
                "rtol": 1e-5,
                "atol": 1e-5,
                "batch_size": 32,
                "shard_size": 32,
            },
            "nfe": 4,
            "fixed": ["euler"],
            "grid_search": None,
            "learned": [{"family": "bns", "start": "euler", "batch_size": 32} | learned],
        },
        "the experiment",
    )
    config.check()
    return config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """The store of this module; all experiments share its pairs."""
    return Storage.at(tmp_path_factory.mktemp("store"))


def distil(config: ExperimentConfig, storage: Storage) -> tuple[Any, ThetaArtifact]:
    """Make pairs and run one trial through a host, as a sweep does."""
    pool = LocalPool(Host(HostSettings(adapter="onnx_session", options=config.model.options, storage=storage.root)))
    facts = pool.call(Request.of(HostProtocol.facts))
    specs = pair_specs(config, facts)
    ensure_pairs(storage, list(specs.values()), pool, wait=True, announce=lambda sentence: None)
    euler = SolverChoice(family="euler", options={}, label="Euler", grid=Grid())
    (point,) = learned_points(config, specs, {(4, 2.0, 1.0): [euler]}, facts.scheduler)
    context = trial_context(storage, facts)
    result = run_point(point, context, pool, storage, lambda values: None)
    return result, load_theta(Path(storage.path(f"points/{point.key}/theta.json")))


def test_levenberg_marquardt_distils_a_black_box(exported: Path, store: Storage) -> None:
    """Ten iterations gain more than 10 dB over the start on test pairs, without a backward pass."""
    config = experiment(exported, method="levenberg_marquardt", iterations=10, validate_every=5)
    result, theta = distil(config, store)
    assert result.metrics["psnr_db"]["mean"] > result.start_metrics["psnr_db"]["mean"] + 10
    assert result.backwards == 0
    assert theta.model_digest == EXAMPLE.build(exported).digest


@pytest.mark.parametrize("method", [{"method": "adam"}, {"method": "levenberg_marquardt", "jacobian": "jvp"}])
def test_methods_that_need_derivatives_are_rejected_before_any_work(
    exported: Path, store: Storage, method: dict[str, Any]
) -> None:
    """The message names the methods that work."""
    with pytest.raises(
        ConfigError, match=r"models of adapter 'onnx_session' cannot be differentiated; distil 'bns' with"
    ):
        distil(experiment(exported, iterations=2, validate_every=1, **method), store)


# ---- rejections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            {},
            {"call": "x, t", "classes": None, "null_label": None},
            r"does not fit net\.onnx, whose inputs are x, t, y",
        ),
        ({}, {"call": "x, t, label=y"}, r"call='x, t, label=y' does not fit net\.onnx, whose inputs are x, t, y; name"),
        (
            {},
            {"shape": [1, 3, 3]},
            r"has shape \(any, 1, 2, 3\) instead of \(any, 1, 3, 3\); export it with a ",
        ),
        (
            {"batch": 4},
            {},
            r"input 'x' of net\.onnx, which takes x, has shape \(4, 1, 2, 3\) instead of \(any, 1, 2, 3\)",
        ),
        ({"time": TensorProto.INT64}, {}, r"input 't' .*, is INT64, but must be one of FLOAT, .*fractional timest"),
        ({}, {"output": "bent"}, r"output='bent' is not an output of net\.onnx: velocity"),
        ({"outputs": ("velocity", "bent")}, {}, r"net\.onnx has 2 outputs, velocity, bent; set output to the name of"),
    ],
)
def test_a_file_that_does_not_fit_the_options_is_rejected(
    tmp_path: Path, model: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """The check compares them with the file's declarations before any actor starts."""
    onnx.save(graph(**model), tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match=message):
        EXAMPLE.build(tmp_path / "net.onnx", **changes)


def test_a_device_without_a_provider_is_rejected(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise ONNX Runtime would silently run on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    model = EXAMPLE.build(exported).to("cuda:0")
    with pytest.raises(ConfigError, match=r"no CUDAExecutionProvider for device 'cuda:0'; install onnxruntime-gpu"):
        _ = model.net


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_reported_with_its_extra(
    exported: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra 'onnx' installs both packages."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package} .*pip install 'bespoke-solvers\[onnx\]'"):
        EXAMPLE.build(exported)
