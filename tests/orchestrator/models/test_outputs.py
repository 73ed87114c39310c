"""Networks that return more than their prediction, and code of the user's that fails: one clear message each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import plugins
from orchestrator.errors import CodeError, ConfigError
from orchestrator.models.torch_module import TorchModule

HEAD = """
import sys
from types import SimpleNamespace

import torch
from torch import nn


class Net(nn.Module):
    def forward(self, x, t):
        {body}
"""


def _options(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"net_{folder.name}"
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    options = {"factory": f"{name}:Net", "path": str(folder), "shape": [1, 2, 3]}
    return options | {"prediction": "velocity", "native_scheduler": "cond_ot"}


def _predict(options: dict[str, Any]) -> Any:
    model = plugins.build("models", "torch_module", options)
    return model.predict(torch.ones(4, 1, 2, 3), torch.tensor(0.5).double(), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("body", "remedy", "options"),
    [
        ("return x[:, 0], 2 * x", "set the option 'output: 1', the part of that shape", {"output": 1}),
        ("return {'t': t, 'sample': 2 * x}", "set the option 'output: sample'", {"output": "sample"}),
        ("return SimpleNamespace(sample=2 * x)", "set the option 'output: sample'", {"output": "sample"}),
        ("return torch.cat([2 * x, x], 1)", "set the option 'output_channels: 2'", {"output_channels": 2}),
    ],
    ids=["tuple", "dictionary", "object", "learned variance"],
)
def test_the_part_that_is_the_prediction_is_proposed_and_taken(
    body: str, remedy: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal names the option, with which the prediction is that part."""
    given = _options(tmp_path, HEAD.format(body=body), monkeypatch)
    with pytest.raises(ConfigError) as caught:
        _predict(given)
    assert remedy in str(caught.value)
    assert torch.equal(_predict(given | options), torch.full((4, 1, 2, 3), 2.0))
    digests = {plugins.build("models", "torch_module", changed).digest for changed in (given, given | options)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": 2}, r"output=2 is not in what the network returned, tuple \(0: shape \(4, 1, 2, 3\), 1: shape"),
        ({"output": "sample"}, r"output='sample' is not in what the network returned, tuple"),
        ({"output": True}, r"output must be a position, a key or an attribute, got True"),
        ({"output": 0, "output_channels": 4}, r"output_channels is 4, but the network returned shape \(4, 1, 2, 3\)"),
        ({"output_channels": 1}, r"output_channels must be a number above the 1 channels of a sample, got 1"),
    ],
)
def test_a_part_that_is_not_there_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _options(tmp_path, HEAD.format(body="return x, t"), monkeypatch)
    with pytest.raises(ConfigError, match=message):
        _predict(given | options)


def test_an_exit_in_a_network_is_an_error_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the host, which would be started again and again."""
    given = _options(tmp_path, HEAD.format(body="sys.exit(7)"), monkeypatch)
    with pytest.raises(
        CodeError, match=r"net_.*\.py, line 11, in forward: SystemExit: 7; it was called with x float32"
    ):
        _predict(given)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys\nsys.exit('no GPU')\n", r"cannot be imported \(.*\.py, line 2, in <module>: SystemExit: no GPU\)"),
        ("def Net():\n    raise SystemExit(3)\n", r"fails: .*\.py, line 2, in Net: SystemExit: 3"),
        ("x = 1\ndef f(:\n", r"cannot be imported \(.*/net_.*\.py, line 2: SyntaxError: invalid syntax\)"),
        ("import json\njson.loads('{')\n", r"cannot be imported \(.*\.py, line 2, in <module>: JSONDecodeError: "),
    ],
    ids=["exit on import", "exit of the factory", "syntax", "error on import"],
)
def test_an_error_before_the_network_runs_names_its_line(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a host starts."""
    with pytest.raises(ConfigError, match=message):
        TorchModule.check(_options(tmp_path, source, monkeypatch))


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (
            "return t.nothing",
            r"a function of native_scheduler 'custom' fails: .*\.py, line 15, in alpha: AttributeError: ",
        ),
        ("raise KeyError('betas')", r"line 15, in alpha: KeyError: 'betas'"),
        ("sys.exit(2)", r"line 15, in alpha: SystemExit: 2"),
        ("return torch.log(t, t)", r"line 15, in alpha: TypeError: "),
    ],
)
def test_an_error_of_a_custom_scheduler_names_its_line(
    alpha: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its functions lie beside the model's code."""
    source = HEAD.format(body="return x") + f"\n\ndef alpha(t):\n    {alpha}\n"
    given = _options(tmp_path, source, monkeypatch)
    functions = {"alpha_function": f"net_{tmp_path.name}:alpha"}
    with pytest.raises(ConfigError, match=message):
        TorchModule.check(given | {"native_scheduler": {"name": "custom", "options": functions}})
