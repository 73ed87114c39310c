"""The digests of models: everything that samples depend on, and nothing else.

Each adapter lists a change of every option and of every kind of file and code that it uses; an adapter or an option
that is missing in the list fails.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from adapter_examples import graph, write_pickle, write_torchscript

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.models.edm import EDMNetwork, export_safetensors
from orchestrator.models.torch_module import TorchModule

Options = dict[str, Any]
Change = Callable[[Path, Options], Options]

NETWORK = """
import torch
from torch import nn
from ident_parts.layers import squash

class Net(nn.Module):
    def __init__(self, sizes, table=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, sizes.pop())  # changes what it is given
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x, t, y):
        from ident_late import gain
        self.calls += 1
        return gain() * squash(self.layer(x.flatten(1)) + t[:, None] + y[:, None]).view(x.shape)
"""
DENOISER = """
from torch import nn
from ident_late import gain

class Denoiser(nn.Module):
    def __init__(self, img_resolution=2, img_channels=3, label_dim=0):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max = 0.0, float("inf")
        self.layer = nn.Linear(12, 12)

    def forward(self, x, sigma, class_labels=None):
        return gain() * self.layer(x.flatten(1)).view(x.shape)
"""
PATH = """
def alpha(t):
    return 0.05 + 0.9 * t

def sigma(t):
    return 1 - 0.9 * t
"""
DESCRIBED: Options = {
    "shape": [1, 2, 3],
    "prediction": "velocity",
    "native_scheduler": {
        "name": "custom",
        "options": {"alpha_function": "ident_path:alpha", "sigma_function": "ident_path:sigma"},
    },
    "call": "x, t, y",
    "classes": 3,
}


def _write_code(folder: Path) -> Path:
    code = folder / "code"
    (code / "ident_parts").mkdir(parents=True)
    for name, text in {
        "ident_net.py": NETWORK,
        "ident_edm.py": DENOISER,
        "ident_path.py": PATH,
        "ident_late.py": "def gain():\n    return 2\n",
        "ident_other.py": "",
        "ident_alias.py": "from ident_edm import Denoiser\nfrom ident_net import Net\n",
        "ident_parts/__init__.py": "",
        "ident_parts/layers.py": "from .deeper import scale\n\ndef squash(x):\n    return scale(x).tanh()\n",
        "ident_parts/deeper.py": "def scale(x):\n    return 0.5 * x\n",
    }.items():
        (code / name).write_text(text, encoding="utf-8")
    return code


def _torch_module(folder: Path) -> Options:
    code = _write_code(folder)
    weights = {"layer.weight": torch.ones(6, 6), "layer.bias": torch.ones(6), "calls": torch.zeros(1)}
    torch.save(weights, folder / "w.pt")
    (folder / "table.txt").write_text("1", encoding="utf-8")
    kwargs = {"sizes": [6], "table": str(folder / "table.txt")}
    factory = {"factory": "ident_net:Net", "kwargs": kwargs, "path": str(code), "weights": str(folder / "w.pt")}
    return {**DESCRIBED, **factory}


def _torchscript(folder: Path) -> Options:
    _write_code(folder)
    return {**DESCRIBED, "file": str(write_torchscript(folder))}


def _onnx_session(folder: Path) -> Options:
    _write_code(folder)
    path = folder / "large.onnx"
    onnx.save(graph(), path, save_as_external_data=True, location="large.bin", size_threshold=100)
    return {**DESCRIBED, "file": str(path)}


def _edm(folder: Path) -> Options:
    """A safetensors file; the class is the user's."""
    code = _write_code(folder)
    sys.path.insert(0, str(code))
    net = importlib.import_module("ident_edm").Denoiser()
    file = export_safetensors(net, folder / "net.safetensors", "ident_edm:Denoiser", {}, str(code))
    return {"file": str(file), "factory": "ident_edm:Denoiser", "path": str(code)}


def _pickled_edm(folder: Path) -> Options:
    code = _write_code(folder)
    sys.path.insert(0, str(code))
    net = importlib.import_module("ident_edm").Denoiser()
    return {"file": str(write_pickle(folder, net)), "path": str(code), "trust_pickle": True}


EXAMPLES: dict[str, Callable[[Path], Options]] = {
    "torch_module": _torch_module,
    "torchscript": _torchscript,
    "onnx_session": _onnx_session,
    "edm": _edm,
    "edm, pickled": _pickled_edm,
}


def _option(name: str, value: Any) -> tuple[str, Change]:
    return name, lambda folder, options: {**options, name: value}


def _edited(name: str, old: str, new: str) -> tuple[str, Change]:
    def change(folder: Path, options: Options) -> Options:
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        return options

    return name, change


def _flipped(name: str, place: int = 40) -> tuple[str, Change]:
    """One bit of a file is another."""

    def change(folder: Path, options: Options) -> Options:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1
        (folder / name).write_bytes(data)
        return options

    return name, change


def _renamed(option: str, name: str) -> tuple[str, Change]:
    def change(folder: Path, options: Options) -> Options:
        return {**options, option: str(Path(options[option]).rename(folder / name))}

    return option, change


PATH_CODE = _edited("code/ident_path.py", "0.9 * t", "0.8 * t")
LATE = _edited("code/ident_late.py", "2", "3")
COMMON = [
    PATH_CODE,
    _option("shape", [1, 3, 2]),
    _option("prediction", "sample"),
    _option("native_scheduler", {"name": "cond_ot"}),
    _option("data_range", 1.0),
    _option("call", "x, t, y=y"),
    _option("time", "1-t"),
    _option("time_scale", 2.0),
    _option("classes", 4),
    _option("null_label", 2),
]
SHOWN: list[tuple[str, Change]] = [
    _option("kind", "vectors"),
    ("data_min", lambda folder, options: {**options, "data_min": -1, "data_max": 1}),
    ("data_max", lambda folder, options: {**options, "data_min": 0, "data_max": 2}),
]
"""How samples are shown, with the same range of data."""
CHANGES: dict[str, list[tuple[str, Change]]] = {
    "torch_module": [
        *COMMON,
        _option("factory", "ident_alias:Net"),
        _option("kwargs", {"sizes": [6]}),
        _edited("table.txt", "1", "2"),
        _flipped("w.pt"),
        _edited("code/ident_net.py", "+ t[", "- t["),
        _edited("code/ident_parts/layers.py", "tanh", "sin"),
        _edited("code/ident_parts/deeper.py", "0.5", "0.6"),
        LATE,
    ],
    "torchscript": [*COMMON, _option("dtype", "float64"), _flipped("flow.pt")],
    "onnx_session": [*COMMON, _flipped("large.onnx", 1), _flipped("large.bin")],
    "edm": [
        _option("factory", "ident_alias:Denoiser"),
        _option("sigma_min", 0.1),
        _option("sigma_max", 20.0),
        _option("data_range", 1.0),
        _flipped("net.safetensors", -1),
        _edited("code/ident_edm.py", "gain() *", "gain() +"),
        LATE,
    ],
    "edm, pickled": [_edited("code/ident_edm.py", "gain() *", "gain() +"), LATE],
}
NOTHING: dict[str, list[tuple[str, Change]]] = {
    "torch_module": [
        _renamed("weights", "other.pt"),
        _renamed("path", "library"),
        _edited("code/ident_other.py", "", "x = 1\n"),
        *SHOWN,
    ],
    "torchscript": [_renamed("file", "other.pt"), *SHOWN],
    "onnx_session": [_renamed("file", "other.onnx"), *SHOWN],
    "edm": [_renamed("file", "other.safetensors"), _renamed("path", "library")],
    "edm, pickled": [_renamed("file", "other.pkl"), _renamed("path", "library")],
}
"""Changes of places and names, of what is shown, and of code that the network does not import."""

ELSEWHERE = dict.fromkeys(("weights_key", "weights_prefix", "trust_pickle"), "test_checkpoints.py")
ELSEWHERE |= dict.fromkeys(("output", "output_channels"), "test_outputs.py")
ELSEWHERE |= {"decoder": "test_encodec.py", "null": "test_named_conditions.py", "path": "test_torch_module.py"}
"""Options with tests of their own."""


@pytest.fixture(autouse=True)
def _own_process() -> Iterator[None]:
    """Forgets the imports of the networks, as another process would."""
    before = list(sys.path)
    yield
    _forget(before)


def _forget(path: list[str]) -> None:
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("ident_")]:
        del sys.modules[name]


def _model(example: str, options: Options) -> Any:
    """The model, as another process would build it; the code of the path is found as if installed."""
    _forget([entry for entry in sys.path if not entry.endswith(("code", "library"))])
    code = Path(options["path"] if "path" in options else Path(options["file"]).parent / "code")
    sys.path.insert(0, str(code))
    return plugins.build("models", example.partition(",")[0], options)


def _cases(table: dict[str, list[tuple[str, Change]]]) -> list[Any]:
    return [
        pytest.param(name, change, id=f"{name}: {what}") for name, changes in table.items() for what, change in changes
    ]


def test_every_option_of_every_adapter_is_changed_here() -> None:
    """A new adapter or option needs a line that says whether it decides samples; pipelines and the zoo have others."""
    known = {name.partition(",")[0]: set(ELSEWHERE) for name in EXAMPLES}
    for table in (CHANGES, NOTHING):
        for name, changes in table.items():
            known[name.partition(",")[0]] |= {what for what, _ in changes}
    adapters = dict(plugins.every("models"))
    assert set(known) == set(adapters) - {"diffusers", "zoo"}
    covered = {"file"}  # its bytes are changed under the file's own name
    for name, options in known.items():
        assert {f.name for f in fields(adapters[name]) if f.init} <= options | covered, name


@pytest.mark.parametrize(("example", "change"), _cases(CHANGES))
def test_what_decides_samples_changes_the_digest(example: str, change: Change, tmp_path: Path) -> None:
    """Options, weights, and code: of the network, of what it imports, wherever it imports it, and of the path."""
    options = EXAMPLES[example](tmp_path)
    before = _model(example, options).digest
    assert _model(example, change(tmp_path, options)).digest != before


@pytest.mark.parametrize(("example", "change"), _cases(NOTHING))
def test_places_and_names_do_not_change_the_digest(example: str, change: Change, tmp_path: Path) -> None:
    """Nor does code that the network does not import."""
    options = EXAMPLES[example](tmp_path)
    before = _model(example, options).digest
    assert _model(example, change(tmp_path, options)).digest == before


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_copy_elsewhere_has_the_same_digest(example: str, tmp_path: Path) -> None:
    """Files are copied and touched; hidden files and caches lie beside them."""
    (tmp_path / "here").mkdir()
    options = EXAMPLES[example](tmp_path / "here")
    before = _model(example, options).digest
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for path in (tmp_path / "there").rglob("*"):
        os.utime(path, (1, 1))
    moved = {key: _elsewhere(value, tmp_path) for key, value in options.items()}
    shutil.rmtree(tmp_path / "here")
    assert _model(example, moved).digest == before


def _elsewhere(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _elsewhere(item, folder) for key, item in value.items()}
    return value.replace(str(folder / "here"), str(folder / "there")) if isinstance(value, str) else value


@pytest.mark.parametrize("weights", [True, False])
def test_the_digest_is_the_same_before_and_after_the_network_runs(weights: bool, tmp_path: Path) -> None:
    """The factory changes its argument, and the network a buffer."""
    options = _torch_module(tmp_path)
    if not weights:
        del options["weights"]
    first: TorchModule = _model("torch_module", options)
    digest = first.digest
    second: TorchModule = _model("torch_module", options)
    second.inspect()
    second.predict(torch.zeros(2, 1, 2, 3), torch.tensor(0.5), torch.zeros(2, dtype=torch.int64))
    assert second.digest == digest


def test_code_that_changes_while_a_process_runs_it_is_refused(tmp_path: Path) -> None:
    """A notebook would else store the samples of the old code under the digest of the new."""
    options = _torch_module(tmp_path)
    model: TorchModule = _model("torch_module", options)
    _ = model.digest
    (tmp_path / "code" / "ident_net.py").write_text(NETWORK.replace("+ t[", "- t["), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"ident_net.py has changed since this process loaded it; start the command"):
        _ = TorchModule(**options).digest


def test_a_pickle_names_its_modules_without_being_opened(tmp_path: Path) -> None:
    """The code of a pickled network is found from the pickle, and the digest is that of a loaded one."""
    options = _pickled_edm(tmp_path)
    model: EDMNetwork = _model("edm", options)
    before = model.digest
    _ = model.net
    assert _model("edm", options).digest == before
