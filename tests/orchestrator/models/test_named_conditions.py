"""Networks with named conditions: observations, values with a mask, ids of different lengths; through a host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import conditioned_networks
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from trial_example import trial_context

from orchestrator import plugins
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey, pair_specs
from orchestrator.config.reading import parse_config
from orchestrator.errors import ConfigError
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.models._described import Call
from orchestrator.pairs import Conditions, PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage
from solvers.grids import Grid
from sweeps.point import SolverChoice
from sweeps.points.execute import run_point
from sweeps.space import learned_points

SUPPORT = str(Path(conditioned_networks.__file__).parent)
FLOW = {"prediction": "velocity", "native_scheduler": "cond_ot", "path": SUPPORT}

IMPUTATION = {"function": "conditioned_networks:imputation_arrays", "path": SUPPORT, "samples": "series"}


def policy(folder: Path) -> dict[str, Any]:
    """A trajectory given observations, by keyword, with guidance."""
    network = {"factory": "conditioned_networks:Policy", "shape": [16, 2], "call": "x, t, obs=c.obs"}
    model = FLOW | network | {"null": {"obs": 0}}
    return {"model": model, "conditioning": conditioned_networks.policy_data(folder), "guidance_scale": 2.0}


def imputer(folder: Path) -> dict[str, Any]:
    """A series given some of its values and a mask, by position."""
    network = {"factory": "conditioned_networks:Imputer", "shape": [6, 2], "call": "x, t, c.values, c.missing"}
    return {"model": FLOW | network, "conditioning": IMPUTATION, "guidance_scale": 1.0}


def reader(folder: Path) -> dict[str, Any]:
    """A vector given a list of ids with padding."""
    network = {"factory": "conditioned_networks:Reader", "shape": [3], "call": "x, t, ids=c.ids, present=c.present"}
    return {"model": FLOW | network, "conditioning": conditioned_networks.reader_data(folder), "guidance_scale": 1.0}


Example = Callable[[Path], dict[str, Any]]


def experiment(example: dict[str, Any], model: str = "torch_module", **changed: Any) -> ExperimentConfig:
    """A small experiment with Levenberg-Marquardt, checked."""
    config = parse_config(
        {
            "name": "named",
            "model": {"name": model, "options": example["model"]},
            "conditioning": {"name": "tensors", "options": example["conditioning"]},
            "guidance_scale": example["guidance_scale"],
            "pairs": {"train": 32, "validation": 16, "test": 16, "batch_size": 16, "shard_size": 16},
            "nfe": 4,
            "fixed": ["euler"],
            "grid_search": None,
            "learned": [{"family": "bns", "start": "euler", "method": "levenberg_marquardt", "iterations": 6}],
        }
        | changed,
        "the experiment",
    )
    config.check()
    return config


def made(config: ExperimentConfig, storage: Storage) -> tuple[LocalPool, Host, dict[PairKey, PairSpec]]:
    """All pairs, and the host that made them."""
    host = Host(HostSettings(adapter=config.model.name, options=config.model.options, storage=storage.root))
    pool = LocalPool(host)
    specs = pair_specs(config, pool.call(Request.of(HostProtocol.facts)))
    ensure_pairs(storage, list(specs.values()), pool, wait=True, announce=lambda sentence: None)
    return pool, host, specs


@pytest.mark.parametrize("example", [policy, imputer, reader])
def test_a_solver_is_distilled_for_a_network_with_named_conditions(
    example: Example, tmp_path: Path, storage: Storage
) -> None:
    """Pairs, scores and Levenberg-Marquardt see each pair's conditions: the solver gains decibels on test pairs."""
    config = experiment(example(tmp_path))
    pool, host, specs = made(config, storage)
    facts = host.facts()
    scale = config.guidance_scale[0]
    euler = SolverChoice(family="euler", options={}, label="Euler", grid=Grid())
    (point,) = learned_points(config, specs, {(4, scale, 1.0): [euler]}, facts.scheduler)
    result = run_point(point, trial_context(storage, facts), pool, storage, lambda values: None)
    assert result.metrics["psnr_db"]["mean"] > result.start_metrics["psnr_db"]["mean"] + 3


def test_pairs_are_those_of_the_network_outside(tmp_path: Path, storage: Storage) -> None:
    """The store keeps row numbers; the velocity is the network's own with the arrays of those rows, guided by null."""
    config = experiment(policy(tmp_path))
    _, host, specs = made(config, storage)
    spec = specs[PairKey("test", 2.0, 0)]
    rows = PairStore.open(storage, spec.name).load().stored
    assert rows.dtype == torch.int64
    assert rows.ndim == 1
    obs = torch.from_numpy(np.load(tmp_path / "episodes.npz")["obs"][rows.numpy()]).float()
    loaded = host._load(spec.name)[1].condition
    assert isinstance(loaded, Conditions)
    x, t = torch.randn(16, 16, 2), torch.tensor(0.3, dtype=torch.float64)
    network, times = conditioned_networks.Policy(), torch.full((16,), 0.3)
    with torch.no_grad():
        velocity = host.model.field(loaded, 2.0)(x, t)
        kept, dropped = network(x, times, obs=obs), network(x, times, obs=torch.zeros_like(obs))
    torch.testing.assert_close(velocity, dropped + 2 * (kept - dropped), rtol=1e-5, atol=1e-6)


def test_the_splits_draw_from_different_rows(tmp_path: Path, storage: Storage) -> None:
    """No row of the test pairs is one of the training pairs, and the digests of their specs differ."""
    config = experiment(policy(tmp_path))
    _, _, specs = made(config, storage)
    rows = {key.split: set(PairStore.open(storage, spec.name).load().stored.tolist()) for key, spec in specs.items()}
    assert not rows["train"] & (rows["validation"] | rows["test"])
    assert not rows["validation"] & rows["test"]
    assert len({spec.content for spec in specs.values()}) == 3


def test_null_may_name_an_array(tmp_path: Path) -> None:
    """The array that stands for a dropped condition may be shared by all rows."""
    options = policy(tmp_path)["model"] | {"null": {"obs": "nothing"}}
    dataset = plugins.build("datasets", "tensors", policy(tmp_path)["conditioning"])
    model = plugins.build("models", "torch_module", options)
    model.check_conditioning(options, dataset)
    condition = model.encode_conditions(torch.tensor([3, 1]), dataset)
    null = model.null_condition(condition).tensors["obs"]
    assert null.shape == (2, 2, 5)
    assert bool((null == 0.5).all())


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"call": "x, t, obs=c.observation"}, r"takes the named arrays observation, .* has obs \(float64 \(2, 5\)\)"),
        ({"null": {"observation": 0}}, r"null names 'observation', which is not in call=.*, whose conditions are obs"),
        ({"null": {"obs": "zero"}}, r"null names the array 'zero', but the arrays are: obs, actions, nothing"),
        ({"null": {"obs": "actions"}}, r"both must have one type and shape"),
        ({"null": {}}, r"guidance scale 2 needs a value for dropped conditions.*set null"),
        ({"null": {"obs": [0]}}, r"null must give a number or the name of an array for 'obs', got \[0\]"),
        ({"call": "x, t, c.obs, c.obs"}, r"each named condition, such as c.obs, at most once"),
    ],
)
def test_what_does_not_fit_is_refused_from_the_options(model: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """Before anything starts: names that are missing or left over, null values that do not fit, guidance without."""
    example = policy(tmp_path)
    example["model"] |= {"null": {}} if "call" in model else {}
    with pytest.raises(ConfigError, match=problem):
        experiment(example | {"model": example["model"] | model})


def test_a_dataset_without_named_arrays_is_refused(tmp_path: Path) -> None:
    """The message names the dataset that has them."""
    with pytest.raises(ConfigError, match=r"takes the named arrays obs, .* Labels has none; set conditioning.name to"):
        experiment(policy(tmp_path), conditioning={"name": "labels"})


# ---- entries that count -------------------------------------------------------------------------------------------


def _start(host: Host) -> Any:
    return (
        SolverChoice(family="euler", options={}, label="Euler", grid=Grid())
        .solver(4, 1.0)
        .to_ns(host.model.scheduler)
        .flat()
        .numpy()
    )


def test_entries_that_are_left_out_no_longer_decide_psnr(tmp_path: Path, storage: Storage) -> None:
    """Given entries run off in the network. With the mask, PSNR, RMSE and SNR are those of the missing ones alone."""
    example = imputer(tmp_path)
    scores = {}
    for name, mask in (("all", None), ("missing", "missing")):
        config = experiment(example | {"conditioning": IMPUTATION | {"mask": mask}})
        _, host, specs = made(config, storage)
        spec = specs[PairKey("test", 1.0, 0)]
        scores[name] = host.score(_start(host), spec.name, ["psnr", "snr", "rmse"])
        samples, pairs = (
            torch.from_numpy(host.sample(_start(host), spec.name, range(16))).double(),
            host._load(spec.name),
        )
    missing = pairs[1].condition.tensors["missing"]
    error, signal = ((samples - pairs[1].x1.double()) ** 2).where(missing, 0), pairs[1].x1.double().where(missing, 0)
    mse, count = error.sum((1, 2)), missing.sum((1, 2))
    np.testing.assert_allclose(scores["missing"]["psnr"], 20 * np.log10(2) - 10 * torch.log10(mse / count), rtol=1e-5)
    np.testing.assert_allclose(scores["missing"]["rmse"], (mse / count).sqrt(), rtol=1e-5)
    snr = 10 * torch.log10(signal.square().sum((1, 2)) / mse)
    np.testing.assert_allclose(scores["missing"]["snr"], snr, rtol=1e-4, atol=1e-4)
    assert scores["missing"]["psnr"].mean() > scores["all"]["psnr"].mean() + 3


@pytest.mark.parametrize("objective", ["psnr", "rmse", "trajectory"])
def test_losses_and_their_gradients_leave_entries_out(objective: str, tmp_path: Path, storage: Storage) -> None:
    """With the mask a loss no longer depends on what is left out: another ground truth there changes nothing."""
    config = experiment(
        imputer(tmp_path) | {"conditioning": IMPUTATION | {"mask": "missing"}},
        learned=[{"family": "bns", "start": "euler", "objective": "trajectory", "method": "adam"}],
    )
    _, host, specs = made(config, storage)
    name = specs[PairKey("train", 1.0, 0)].name
    before = host.loss_and_gradient(_start(host), name, range(16), objective)
    spec, pairs = host._load(name)
    path = pairs.path
    assert path is not None
    missing = pairs.condition.tensors["missing"]
    changed = replace(
        pairs,
        x1=pairs.x1.where(missing, torch.inf),
        path=replace(path, states=path.states.where(missing[:, None], 7.0)),
    )
    host._pairs[name] = spec, changed
    after = host.loss_and_gradient(_start(host), name, range(16), objective)
    assert np.isfinite(before[0])
    np.testing.assert_allclose(after[0], before[0], rtol=1e-6)
    np.testing.assert_allclose(after[1], before[1], rtol=1e-5, atol=1e-6)
    assert host.loss(_start(host), name, range(16)) == pytest.approx(
        host.loss_and_gradient(_start(host), name, range(16))[0], rel=1e-6
    )


def test_starts_and_grids_leave_entries_out(tmp_path: Path, storage: Storage) -> None:
    """The least-squares start and the GITS grid are fitted to the entries that count."""
    config = experiment(
        imputer(tmp_path) | {"conditioning": IMPUTATION | {"mask": "missing"}},
        learned=[{"family": "bns", "start": "least_squares"}],
    )
    _, host, specs = made(config, storage)
    name, times = specs[PairKey("train", 1.0, 0)].name, np.linspace(0, 1, 5)
    fitted = host.least_squares(name, times)
    grid, _ = host.gits_grid(name, 4, 1.0, "error", 8, 17)
    spec, pairs = host._load(name)
    host._pairs[name] = spec, replace(pairs, mask=None)
    assert not np.allclose(host.least_squares(name, times), fitted, rtol=1e-3)
    assert not np.allclose(host.gits_grid(name, 4, 1.0, "error", 8, 17)[0], grid)
    better = host.score(fitted, name, ["psnr"])["psnr"]
    host._pairs[name] = spec, pairs
    assert host.score(fitted, name, ["psnr"])["psnr"].mean() > better.mean()


def test_a_mask_that_leaves_nothing_is_refused_by_row(tmp_path: Path) -> None:
    """And one that does not fit the samples, or holds anything but 0 and 1."""
    arrays = {"values": np.zeros((20, 6, 2)), "missing": np.ones((20, 6, 2), bool), "wide": np.ones((20, 5))}
    arrays["none"] = np.ones((20, 6, 2), dtype=bool)
    arrays["none"][[3, 11]] = False
    np.savez(tmp_path / "rows.npz", **arrays)
    example = imputer(tmp_path)
    for mask, problem in (
        ("none", r"mask: no entry counts in row 3, 11 of 'none'"),
        ("wide", r"a row of 'wide' has shape \(5,\), which does not fit samples of shape \(6, 2\)"),
    ):
        with pytest.raises(ConfigError, match=problem):
            experiment(example | {"conditioning": {"file": str(tmp_path / "rows.npz"), "mask": mask}})


def test_entries_of_a_dictionary_are_named_with_a_dot() -> None:
    """An argument that is a dictionary is filled entry by entry; given as a whole too, it is refused."""
    call = Call.parse("x, t, cond.obs=c.obs, cond.mask=c.mask, y=y")
    assert call.conditions == ("obs", "mask")
    values = {"x": 0, "t": 1, "y": 2, "c.obs": 3, "c.mask": 4}
    assert call.arguments(values) == ([0, 1], {"cond": {"obs": 3, "mask": 4}, "y": 2})
    with pytest.raises(ValueError, match="gives cond as a whole and by its entries; leave one out"):
        Call.parse("x, t, cond=c.all, cond.obs=c.obs")
    with pytest.raises(ValueError, match=r"'cond\.a\.b=c\.obs' is not valid here"):
        Call.parse("x, t, cond.a.b=c.obs")


# ---- networks in files --------------------------------------------------------------------------------------------


def test_torchscript_takes_named_conditions(tmp_path: Path) -> None:
    """A scripted network has the guided velocities of the module; a frozen one needs its dtype."""
    example = policy(tmp_path)
    torch.jit.script(conditioned_networks.Policy().eval()).save(tmp_path / "policy.ts")
    options = {key: value for key, value in example["model"].items() if key not in ("factory", "path")}
    scripted = options | {"file": str(tmp_path / "policy.ts")}
    experiment(example | {"model": scripted}, "torchscript")
    model = plugins.build("models", "torchscript", scripted)
    module = plugins.build("models", "torch_module", example["model"])
    dataset = plugins.build("datasets", "tensors", example["conditioning"])
    condition = model.encode_conditions(torch.arange(4), dataset)
    x, t = torch.randn(4, 16, 2), torch.tensor(0.6, dtype=torch.float64)
    torch.testing.assert_close(model.field(condition, 2.0)(x, t), module.field(condition, 2.0)(x, t))
    frozen = torch.jit.freeze(torch.jit.script(conditioned_networks.Policy().eval()))
    frozen.save(tmp_path / "frozen.ts")
    unknown = plugins.build("models", "torchscript", options | {"file": str(tmp_path / "frozen.ts")})
    with pytest.raises(ConfigError, match=r"is frozen, so that the dtype of its weights is not known; set dtype"):
        _ = unknown.network_dtype


def onnx_gated(folder: Path) -> dict[str, Any]:
    """velocity = where(keep, obs, row of the table at id) - x, as an ONNX graph; options of the adapter."""
    kinds = {"x": (TensorProto.FLOAT, 3), "t": (TensorProto.FLOAT,), "obs": (TensorProto.FLOAT, 3)}
    kinds |= {"keep": (TensorProto.BOOL, 3), "id": (TensorProto.INT64,)}
    table = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    nodes = [
        helper.make_node("Gather", ["table", "id"], ["row"]),
        helper.make_node("Where", ["keep", "obs", "row"], ["target"]),
        helper.make_node("Sub", ["target", "x"], ["still"]),
        helper.make_node("Unsqueeze", ["t", "axis"], ["times"]),
        helper.make_node("Add", ["still", "times"], ["velocity"]),
    ]
    graph = helper.make_graph(
        nodes,
        "gated",
        [helper.make_tensor_value_info(name, kind, ["B", *size]) for name, (kind, *size) in kinds.items()],
        [helper.make_tensor_value_info("velocity", TensorProto.FLOAT, ["B", 3])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")],
    )
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), folder / "gated.onnx"
    )
    network = {"file": str(folder / "gated.onnx"), "shape": [3], "call": "x, t, obs=c.obs, keep=c.keep, id=c.ids"}
    return FLOW | network | {"null": {"obs": 0, "ids": 3}}


def test_onnx_takes_named_conditions_of_every_type(tmp_path: Path) -> None:
    """Floats, booleans and ids are converted to the graph's types; guidance drops those that null names."""
    options = {key: value for key, value in onnx_gated(tmp_path).items() if key != "path"}
    random = np.random.default_rng(0)
    arrays = {"obs": random.standard_normal((20, 3)), "keep": random.random((20, 3)) < 0.5, "ids": np.arange(20) % 3}
    np.savez(tmp_path / "rows.npz", **arrays, wide=np.ones((20, 4)))
    dataset = plugins.build("datasets", "tensors", {"file": str(tmp_path / "rows.npz")})
    model = plugins.build("models", "onnx_session", options)
    model.inspect()
    model.check_conditioning(options, dataset)
    rows = np.array([4, 7, 1])
    condition = model.encode_conditions(torch.from_numpy(rows), dataset)
    x = torch.randn(3, 3)
    velocity = model.field(condition, 3.0)(x, torch.tensor(0.25, dtype=torch.float64))
    table = np.linspace(-1, 1, 12).reshape(4, 3)
    keep, obs, ids = (arrays[name][rows] for name in ("keep", "obs", "ids"))
    kept, dropped = np.where(keep, obs, table[ids]), np.where(keep, 0, table[np.full(3, 3)])
    expected = torch.from_numpy(dropped + 3 * (kept - dropped)).float() - x + 0.25
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (
            "x, t, obs=c.wide, keep=c.keep, id=c.ids",
            r"input 'obs' of gated.onnx is FLOAT of shape \(any, 3\), but c.wide",
        ),
        (
            "x, t, obs=c.obs, keep=c.ids, id=c.keep",
            r"input 'keep' of gated.onnx is BOOL of shape \(any, 3\), but c.ids is",
        ),
        ("x, t, obs=c.obs, keep=c.keep", r"whose inputs are x, t, obs, keep, id; name each once"),
    ],
)
def test_onnx_inputs_that_do_not_fit_are_refused_from_the_options(call: str, problem: str, tmp_path: Path) -> None:
    """Names, types and shapes are compared with the dataset before anything starts."""
    options = {key: value for key, value in onnx_gated(tmp_path).items() if key not in ("path", "null")} | {
        "call": call
    }
    arrays = {"obs": np.ones((20, 3)), "keep": np.ones((20, 3), bool), "ids": np.arange(20), "wide": np.ones((20, 4))}
    np.savez(tmp_path / "rows.npz", **arrays)
    conditioning = {"file": str(tmp_path / "rows.npz")}
    with pytest.raises(ConfigError, match=problem):
        experiment({"model": options, "conditioning": conditioning, "guidance_scale": 1.0}, "onnx_session")
