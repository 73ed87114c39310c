"""``torch_module``: a user's own network gives its authors' samples, and invalid options are rejected at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_examples
import own_networks
import pytest
import torch
from adapter_examples import DROPPED, FLOW, HERE
from proofs import GUIDANCE, LABELS, distance, noise
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.errors import ConfigError
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.torch_module import TorchModule
from orchestrator.pool.requests import Request

ECHO = {k: FLOW[k] for k in ("path", "shape", "prediction", "native_scheduler")} | {"factory": "own_networks:Echo"}


def build(options: dict[str, Any], **changes: Any) -> Any:
    """Build the adapter after its configuration check; None removes an option."""
    return adapter_examples.build("torch_module", options | changes)


# ---- agreement with the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "scheduler", "scale", "expected"),
    [
        ("t", "cond_ot", 1, 0.25),
        ("1-t", "cond_ot", 1, 0.75),
        ("1-t", "cond_ot", 1000, 750),
        ("timestep", "discrete_vp", 1, 749),
        ("sigma", "edm", 1, 60),
        ("sigma", {"name": "edm", "options": {"sigma_max": 8}}, 2, 12),
    ],
)
def test_time_is_converted_to_the_networks_own(time: str, scheduler: Any, scale: float, expected: float) -> None:
    """The time that the network receives for t = 0.25."""
    model = build(ECHO, time=time, native_scheduler=scheduler, time_scale=scale)
    prediction = model.predict(noise((1, 2, 3)), torch.tensor(0.25, dtype=torch.float64), LABELS)
    torch.testing.assert_close(prediction, torch.full_like(prediction, expected), rtol=1e-6, atol=0)


def test_a_half_precision_network_gets_exact_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, 748.5 would be rounded to 748, so the time is passed as float32."""
    monkeypatch.setattr(TorchModule, "network_dtype", torch.bfloat16)
    model = build(ECHO, time="timestep", native_scheduler="discrete_vp")
    assert float(model.predict(noise((1, 2, 3)), torch.tensor(0.2505).double(), LABELS)[0, 0, 0, 0]) == 748.5


# ---- weights ------------------------------------------------------------------------------------------------------


def other_weights(seed: int = 7) -> dict[str, Tensor]:
    """Weights of another seed than the factory's default."""
    return own_networks.Flow(seed).state_dict()


def save_weights(folder: Path, suffix: str, weights: Any = None) -> str:
    """Write a weights file; by default with another seed than the factory's."""
    path = folder / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights or other_weights(), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_are_loaded_from_the_file(tmp_path: Path, suffix: str) -> None:
    """Each supported format is loaded."""
    model = build(FLOW, weights=save_weights(tmp_path, suffix))
    assert all(torch.equal(value, other_weights()[name]) for name, value in model.net.state_dict().items())
    assert model.name == "weights"


def test_a_tied_weight_may_be_stored_once(tmp_path: Path) -> None:
    """safetensors stores shared memory once."""
    tied = own_networks.Tied()
    weights = {name: value for name, value in tied.state_dict().items() if name != "second.weight"}
    model = build(ECHO, factory="own_networks:Tied", weights=save_weights(tmp_path, ".safetensors", weights))
    assert torch.equal(model.net.second.weight, tied.first.weight)


class Bomb:
    """An object whose pickle runs code."""

    def __reduce__(self) -> Any:
        return print, ("boom",)


def test_a_file_that_would_run_code_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are always loaded with weights_only, and what is not a tensor is held by an object without content."""
    path = save_weights(tmp_path, ".pt", {"core.time": Bomb(), "core.label": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"beside tensors it holds core\.time \(a pickled builtins\.print\)"):
        build(FLOW, weights=path)
    assert "boom" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("suffix", "weights", "message"),
    [
        (".safetensors", {"core.time": torch.zeros(2, 16)}, r"missing: core\.inward, core\.label, core\.outward; set"),
        (".safetensors", other_weights() | {"head": torch.zeros(1)}, r"do not fit Flow: unexpected: head; set kwargs"),
        (
            ".pt",
            other_weights() | {"core.time": torch.zeros(2, 8)},
            r"wrong shape: core\.time \(2, 8\) instead of \(2, 16\)",
        ),
        (
            ".safetensors",
            {f"layer{i}": torch.zeros(1) for i in range(9)},
            r"unexpected: layer0, .*layer4 and 4 more; se",
        ),
        (
            ".pt",
            {"state_dict": other_weights()},
            r"is not a state dictionary but a mapping with state_dict; add beside ",
        ),
        (".pt", [torch.zeros(1)], r"is a list of 1 tensors, but Flow has 4 parameters; save only the mo"),
    ],
)
def test_weights_that_do_not_fit_are_rejected_by_name(tmp_path: Path, suffix: str, weights: Any, message: str) -> None:
    """Names and shapes are compared before anything starts."""
    with pytest.raises(ConfigError, match=message):
        build(FLOW, weights=save_weights(tmp_path, suffix, weights))


def test_a_module_may_place_its_own_parts() -> None:
    """The module's own `to` is called, as networks on several devices need; predictions have x's device and dtype."""
    model = build(ECHO, factory="own_networks:Spread").to("cpu")
    assert model.net.second.weight.dtype == torch.float64
    x = torch.zeros(2, *model.shape)
    assert model.field(torch.zeros(2, dtype=torch.int64), 1.0)(x, torch.tensor(0.5)).dtype == x.dtype


def test_without_a_file_the_constructor_is_seeded() -> None:
    """Constructors without a seed are seeded, and the global random state is left unchanged."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = (build(ECHO, factory="own_networks:Unset").net.layer.weight for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(3)
    _ = build(ECHO, factory="own_networks:Unset").net
    assert torch.equal(torch.rand(2), expected)


def test_a_constructor_that_reads_its_weights_is_checked_too() -> None:
    """It cannot run on meta tensors, so the check runs it with real ones."""
    assert build(ECHO, factory="own_networks:Computing").parameters == 42


# ---- the digest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"data_range": 1.0}, {"time": "1-t"}, {"null_label": 0}, {"kwargs": {"seed": 1}}])
def test_another_option_changes_the_digest(changes: dict[str, Any], tmp_path: Path) -> None:
    """Stored pairs of one must not be used for the other."""
    path = save_weights(tmp_path, ".safetensors")
    assert build(FLOW, weights=path).digest != build(FLOW, weights=path, **changes).digest


def test_other_weights_change_the_digest(tmp_path: Path) -> None:
    """The digest depends on the bytes of the file."""
    first = build(FLOW, weights=save_weights(tmp_path, ".safetensors")).digest
    assert build(FLOW, weights=save_weights(tmp_path, ".safetensors", other_weights(8))).digest != first


# ---- import in other processes ------------------------------------------------------------------------------------


@pytest.fixture
def external_options(tmp_path: Path) -> dict[str, Any]:
    """Options of a network in a folder that is on no process's search path."""
    source = (HERE / "own_networks.py").read_text(encoding="utf-8")
    module = f"network_{tmp_path.name}"  # a process cannot import two modules of one name
    (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
    return FLOW | {"factory": f"{module}:Flow", "path": str(tmp_path)}


def test_a_new_process_imports_the_module_from_its_folder(external_options: dict[str, Any]) -> None:
    """A host starts in the same way: from settings alone, in another working directory."""
    code = (
        "import sys; from orchestrator import plugins; "
        f"print(plugins.build('models', 'torch_module', {external_options!r}).digest)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == build(external_options).digest


@pytest.mark.cluster
def test_a_host_actor_imports_the_module_from_its_folder(
    external_options: dict[str, Any], ray_pool: Callable[..., Any], tmp_path: Path
) -> None:
    """The same for a Ray actor."""
    pool = ray_pool(HostSettings(adapter="torch_module", options=external_options, storage=str(tmp_path / "store")), 1)
    assert pool.call(Request.of(HostProtocol.facts)).digest == build(external_options).digest


PATH_FUNCTIONS = """
def alpha(t):
    return t**2


def sigma(t):
    return 1 - t
"""


def test_several_folders_are_searched_for_the_code_and_for_the_path_of_a_custom_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network in one folder, its helper and the functions alpha and sigma in another; neither is installed."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    unique = tmp_path.name
    for name in ("net", "library"):
        (tmp_path / name).mkdir()
    source = f"from helper_{unique} import Flow\n\n\nclass Mine(Flow):\n    pass\n"
    (tmp_path / f"net/mine_{unique}.py").write_text(source, encoding="utf-8")
    (tmp_path / f"library/helper_{unique}.py").write_text((HERE / "own_networks.py").read_text(), encoding="utf-8")
    (tmp_path / f"library/schedule_{unique}.py").write_text(PATH_FUNCTIONS, encoding="utf-8")
    functions = {f"{name}_function": f"schedule_{unique}:{name}" for name in ("alpha", "sigma")}
    options = FLOW | {
        "factory": f"mine_{unique}:Mine",
        "path": [str(tmp_path / "net"), str(tmp_path / "library")],
        "native_scheduler": {"name": "custom", "options": functions},
    }
    code = f"from orchestrator import plugins; print(plugins.build('models', 'torch_module', {options!r}).digest)"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    model = build(options)
    assert float(model.native(0.5).alpha) == 0.25
    assert done.stdout.strip() == model.digest
    with pytest.raises(
        ConfigError, match=r"is imported from .*json/__init__\.py, not from path .*net and .*library: an"
    ):
        TorchModule.check(options | {"factory": "json:JSONEncoder"})


# ---- rejections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (FLOW, {"factry": "x"}, r"no option 'factry' \(did you mean 'factory'\?\); its options are: "),
        (FLOW, {"shape": None}, r"needs shape. shape: "),
        (FLOW, {"shape": [1, 0]}, r"shape must list the sizes of one sample, e\.g\. \[3, 32, 32\], got \[1, 0\]"),
        (
            FLOW,
            {"prediction": "epsilo"},
            r"unknown prediction 'epsilo' \(did you mean 'epsilon'\?\); choose one of eps",
        ),
        (FLOW, {"native_scheduler": "condot"}, r"unknown scheduler 'condot' \(did you mean 'cond_ot'\?\)"),
        (FLOW, {"native_scheduler": {"name": "vp", "options": {"beta": 1}}}, r"scheduler 'vp' has no option 'beta'"),
        (FLOW, {"native_scheduler": {"nam": "vp"}}, r"native_scheduler must be a name or \{name: \.\.\., options: "),
        (FLOW, {"prediction": "epsilon"}, r"an epsilon prediction on 'cond_ot' does not determine the data where samp"),
        (
            FLOW,
            {"prediction": "sample"},
            r"a sample prediction on 'cond_ot' does not determine the noise where samplin",
        ),
        (
            FLOW,
            {"prediction": "v_prediction"},
            r"v_prediction needs alpha\^2 \+ sigma\^2 = 1, but 'cond_ot' has 0\.5; c",
        ),
        (FLOW, {"time": "timestep"}, r"time 'timestep' counts the training timesteps of 'discrete_vp', but the schedu"),
        (FLOW, {"time": "T"}, r"time must be one of 't', '1-t', 'timestep', 'sigma', got 'T'"),
        (FLOW, {"time_scale": 0}, r"time_scale must be a positive number, got 0"),
        (FLOW, {"data_range": "2"}, r"data_range must be a positive number, got '2'"),
        (FLOW, {"call": "x"}, r"call='x' must name x \(the state\) and t \(the time\) once each"),
        (FLOW, {"call": "x, t, y, y"}, r"must name x \(the state\) and t \(the time\) once each, and y"),
        (FLOW, {"call": "x=x, t"}, r"call='x=x, t': 't' is not valid here; write it like 'x, t, class_labels=y'"),
        (FLOW, {"call": "x, t"}, r"classes has no effect: call='x, t' has no y; add y, or remove the option"),
        (FLOW, {"classes": None}, r"call='x, t, y' takes labels; set classes to their number, got None"),
        (FLOW, {"null_label": "none"}, r"null_label must be an integer, got 'none'"),
        (FLOW, {"kwargs": [1]}, r"kwargs must be a mapping of argument names to values, got \[1\]"),
        (FLOW, {"kwargs": {"width": 3}}, r"own_networks:Flow with kwargs \{'width': 3\} fails: TypeError: .*'width'"),
        (FLOW, {"factory": "own_networks"}, r"does not name a class or function; write it as 'package\.module:name'"),
        (FLOW, {"factory": "own_networks:Flo"}, r"the module 'own_networks' has no 'Flo'"),
        (FLOW, {"factory": "own_networks:SHAPE"}, r"has no class or function 'SHAPE', only tuple"),
        (
            FLOW,
            {"factory": "nowhere:Net"},
            r"'nowhere:Net' cannot be imported \(ModuleNotFoundError: .*; path .* was sear",
        ),
        (FLOW, {"factory": "nowhere:Net", "path": None}, r"set path to the folder that holds it"),
        (
            FLOW,
            {"factory": "json:JSONEncoder"},
            r"is imported from .*json/__init__\.py, not from path .*: another module h",
        ),
        (FLOW, {"path": "/no/such/folder"}, r"path: there is no folder /no/such/folder; every machine that runs a ho"),
        (FLOW, {"weights": "/no/such.pt"}, r"weights: there is no file /no/such\.pt; every machine that runs a host "),
        (
            FLOW,
            {"weights": "net.npz"},
            r"weights must be a file that ends in \.safetensors or \.pt or \.pth or \.ckpt or \.bin or \.tar, got 'net",
        ),
        (ECHO, {"factory": "own_networks:not_a_module"}, r"must return a torch\.nn\.Module, got int"),
    ],
)
def test_invalid_options_are_rejected_by_the_check(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """The error is raised before any actor starts and names the option, its value and a remedy."""
    all_options = {name: value for name, value in (options | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        TorchModule.check(all_options)


@pytest.mark.parametrize(
    ("prediction", "scheduler"),
    [
        ("epsilon", {"name": "cond_ot", "options": {"t_min": 0.001}}),
        ("sample", {"name": "cond_ot", "options": {"t_max": 0.999}}),
        ("v_prediction", "cosine"),
        ("epsilon", "vp"),
        ("sample", "edm"),
    ],
)
def test_the_remedies_in_the_errors_are_accepted(prediction: str, scheduler: Any) -> None:
    """Each remedy named in those errors works."""
    assert build(ECHO, prediction=prediction, native_scheduler=scheduler).prediction == prediction


@pytest.mark.parametrize(
    ("what", "got"),
    [("twice", r"shape \(4, 2, 2, 3\); if its"), ("tuple", r"tuple \(0: .*\); set the option 'output: 0'")],
)
def test_a_prediction_of_another_shape_is_rejected(what: str, got: str) -> None:
    """The user must remove a learned variance, for example; the adapter does not know its position."""
    with pytest.raises(ConfigError, match=rf"Echo must return one tensor of shape \(4, 1, 2, 3\), .*, got {got}"):
        build(ECHO, kwargs={"what": what}).predict(noise((1, 2, 3)), torch.tensor(0.5), LABELS)


def test_guidance_needs_a_dropped_label() -> None:
    """There is no default for it."""
    with pytest.raises(
        ConfigError, match=r"guidance scale 2\.5 needs a label for the dropped condition, but Flow has n"
    ):
        build(FLOW, null_label=None).field(LABELS, GUIDANCE)


def test_a_label_outside_the_networks_classes_is_rejected() -> None:
    """The message names the option to set."""
    with pytest.raises(
        ConfigError, match=r"label 3 is not one of Flow's 3 classes; set conditioning\.options\.classes to 3"
    ):
        build(FLOW).check_condition(torch.tensor([0, 3]))


def test_a_network_without_labels_ignores_them() -> None:
    """Predictions are the same for every conditioning."""
    model, t = build(ECHO, factory="own_networks:Unset"), torch.tensor(0.5)
    model.check_condition(LABELS + 100)
    assert distance(*(model.predict(noise((1, 2, 3)), t, labels) for labels in (LABELS, DROPPED))) == 0
