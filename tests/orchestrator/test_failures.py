"""Errors in a line: what failed, where, and whether a retry makes sense."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError

from orchestrator import plugins
from orchestrator.errors import (
    CodeError,
    ConfigError,
    Failure,
    PoolError,
    UnreachableStorageError,
    describe,
    describe_outside,
    may_pass,
)
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.log import logged_to, record
from orchestrator.metrics.base import EXACT_DB, shown_db, summarise
from orchestrator.pool.requests import PoolSettings
from orchestrator.pool.router import Router, _reporting_failure
from orchestrator.storage import Storage, canonical_json

NETWORK = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 6)
    def forward(self, x, t):
        {body}
"""


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConfigError("wrong"), False),
        (PoolError("set aside"), False),
        (UnreachableStorageError("no answer"), True),
        (ValueError("wrong"), False),
        (RuntimeError("shapes"), False),
        (RuntimeError("CUDA error: launch failure"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (OSError(errno.EIO, "input/output error"), True),
        (MemoryError(), True),
        (KeyError("a"), False),
    ],
    ids=str,
)
def test_only_errors_of_machines_and_services_are_retried(error: Exception, passes: bool) -> None:
    """Input and code fail in the same way again."""
    assert may_pass(error) is passes


def _raised(code: str, folder: Path) -> Exception:
    path = folder / "mine.py"
    path.write_text(code, encoding="utf-8")
    try:
        exec(compile(code, str(path), "exec"), {})
    except Exception as error:
        return error
    raise AssertionError("the code raises")


def test_the_line_of_an_error_is_the_users_and_not_a_librarys(tmp_path: Path) -> None:
    """json raises deep inside the library; the line that called it is the one to fix."""
    error = _raised("import json\n\njson.loads('{')\n", tmp_path)
    assert describe(error).startswith(f"{tmp_path}/mine.py, line 3, in <module>: JSONDecodeError: ")
    failure = Failure.of(error)
    assert "\n" not in failure.reason
    assert "json/decoder.py" in failure.details


def test_errors_of_the_system_name_the_file_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        tmp_path.read_bytes()
    assert describe_outside(caught.value) == f"{tmp_path}: is a directory; name a file"


# ---- a network of the user's --------------------------------------------------------------------------------------


def _adapter(folder: Path, body: str, name: str) -> Any:
    (folder / f"{name}.py").write_text(NETWORK.format(body=body), encoding="utf-8")
    options = {"factory": f"{name}:Net", "path": str(folder), "shape": [1, 2, 3]}
    return options | {"prediction": "velocity", "native_scheduler": "cond_ot"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return self.layer(x.flatten(1))", "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x6 and 7x6)"),
        ("raise KeyError('scale')", "KeyError: 'scale'"),
        ("return x.nothing", "AttributeError: 'Tensor' object has no attribute 'nothing'"),
        ("return x[:, :, 7]", "IndexError: index 7 is out of bounds for dimension 2 with size 2"),
        ("assert x.ndim == 2, 'flat input'", "AssertionError: flat input"),
    ],
    ids=["shape", "key", "attribute", "index", "assertion"],
)
def test_an_error_of_a_network_names_its_line_and_its_inputs(
    tmp_path: Path, body: str, message: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception alone says neither where it was raised nor what the network was called with."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"net_{abs(hash(request.node.name))}"
    model = plugins.build("models", "torch_module", _adapter(tmp_path, body, name))
    field = model.field(torch.zeros(4, dtype=torch.int64), 1.0)
    with torch.no_grad(), pytest.raises(CodeError) as caught:
        field(torch.zeros(4, 1, 2, 3), torch.tensor(0.5, dtype=torch.float64))
    text = str(caught.value)
    assert text.startswith(f"network Net failed: {tmp_path}/{name}.py, line 8, in forward: {message}"), text
    assert text.endswith("it was called with x float32 (4, 1, 2, 3), time float32 (4,), label int64 (4,)")
    assert "again" not in text
    assert not may_pass(caught.value)


class _Broken:
    """A host class whose constructor fails."""

    def __init__(self, error: Exception):
        raise error

    def process_id(self) -> int:
        return 0


def test_a_host_that_cannot_be_built_says_why_and_is_not_started_again() -> None:
    """Ray would start it again and again, and would tell only a text with its own traceback."""
    host = _reporting_failure(_Broken)(ConfigError("no such file"))
    with pytest.raises(ConfigError, match="no such file"):
        host.process_id()
    with pytest.raises(OSError, match="away"):
        _reporting_failure(_Broken)(OSError("away"))


@pytest.mark.parametrize("error", [ConfigError("no such weights"), KeyError("scale")], ids=str)
def test_every_request_to_a_broken_host_is_answered_with_the_reason(error: Exception) -> None:
    """Once, without a retry."""
    started: list[int] = []

    class Actor:
        def __init__(self) -> None:
            started.append(1)
            self.process_id = self

        def options(self, **options: Any) -> Actor:
            return self

        async def remote(self) -> int:
            raise RayTaskError("process_id", 'File "/home/me/net.py", line 3, in build', error)

    async def ask() -> tuple[Any, Exception | None]:
        settings = HostSettings(adapter="none", options={}, storage="none")
        return await Router(Host, settings, PoolSettings(), start_host=Actor).request("facts", {})

    value, answer = asyncio.run(ask())
    assert value is None
    assert started == [1]
    expected = str(error) if isinstance(error, ConfigError) else "a host cannot be built: .*KeyError: 'scale'"
    assert answer is not None
    with pytest.raises(type(answer), match=expected):
        raise answer
    assert pickle.loads(pickle.dumps(answer)).details == answer.details != ""  # type: ignore[attr-defined]


# ---- the log ------------------------------------------------------------------------------------------------------


def test_the_log_holds_tracebacks_and_library_noise_without_secrets(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it on the terminal; with --debug all of it."""
    storage = Storage.at(tmp_path)
    for debug in ("", "1"):
        monkeypatch.setenv("BESPOKE_DEBUG", debug)
        with logged_to(storage, "experiments/x/sweep.log") as log:
            assert log.location is None
            record("Euler", "Traceback of http://user:password@server/")
            logging.getLogger("ray.tune").error("a trial failed")
            assert log.location == f"{tmp_path}/experiments/x/sweep.log"
        text = storage.read("experiments/x/sweep.log").decode()
        assert "Traceback of http://server/" in text
        assert "ray.tune: a trial failed" in text
        assert ("a trial failed" in capfd.readouterr().err) == bool(debug)
    with logged_to(storage, "experiments/x/sweep.log"):
        pass
    assert not storage.exists("experiments/x/sweep.log"), "a command without failures leaves no old log"


def test_the_log_holds_the_traceback_that_ends_the_command(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    with pytest.raises(ZeroDivisionError), logged_to(storage, "sweep.log"):
        1 / 0  # noqa: B018
    assert "ZeroDivisionError" in storage.read("sweep.log").decode()


# ---- exact solvers ------------------------------------------------------------------------------------------------


def test_a_solver_without_any_error_has_the_largest_psnr_in_place_of_infinity() -> None:
    """JSON and MLflow cannot hold an infinity; tables show it. One exact sample among others is left out, as before."""
    exact = summarise([math.inf] * 3)
    assert (exact.mean, exact.stderr, exact.count, exact.not_finite) == (EXACT_DB, 0.0, 3, 0)
    assert json.loads(canonical_json({"mean": exact.mean})) == {"mean": 300.0}
    assert summarise([math.inf, 40.0]).mean == 40.0
    assert math.isnan(summarise([math.inf, math.nan]).mean)
    assert [shown_db(value, 1) for value in (EXACT_DB, 299.0, 41.25)] == ["∞", "299.0", "41.2"]
