"""Keys of the storage and the password of the tracking server are in nothing that a sweep writes or prints."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import yaml
from s3_server import S3Server

from orchestrator.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]

BESPOKE = Path(sys.executable).with_name("bespoke")
SECRETS = [b"hunter2", b"AKIDEXAMPLE", b"SECRETEXAMPLE"]

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)

    def forward(self, x, t):
        if (x.shape[0] == 5) and FAILS:
            raise RuntimeError("no batches of five")
        return torch.tanh(self.linear(x.flatten(1)) + t[:, None]).view(x.shape)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An `mlflow server` that keeps its store and its artifacts in ``tmp_path / 'mlflow'``; its host and port."""
    (tmp_path / "mlflow").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow/store.db"]
    process = subprocess.Popen(
        [*command, *store, "--artifacts-destination", str(tmp_path / "mlflow/artifacts")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _experiment(folder: Path, fails: bool) -> dict[str, Any]:
    """Two solvers and a distillation on a network of six numbers; with ``fails``, the distillation cannot work."""
    folder.mkdir()
    (folder / "secret_net.py").write_text(NETWORK.replace("FAILS", str(fails)), encoding="utf-8")
    options = {"factory": "secret_net:Net", "path": str(folder), "shape": [1, 2, 3], "prediction": "velocity"}
    return {
        "name": "secrets",
        "model": {"name": "torch_module", "options": options | {"native_scheduler": "cond_ot"}},
        "conditioning": {"name": "labels", "options": {"classes": 1}},
        "pairs": {"train": 16, "validation": 16, "test": 16, "batch_size": 16, "shard_size": 16, "rtol": 1e-4},
        "nfe": [2],
        "fixed": ["euler", "midpoint"],
        "grid_search": {"p": [1.0], "q": [1.0], "also": [], "pairs": 16},
        "learned": [{"family": "bns", "method": "adam", "iterations": 2, "validate_every": 1, "batch_size": 5}],
        "resources": {"hosts": 1},
    }


@pytest.mark.parametrize("fails", [False, True], ids=["success", "failure"])
def test_no_artifact_and_no_output_holds_a_secret(
    tmp_path: Path, server: str, s3_server: S3Server, s3_storage: Storage, fails: bool
) -> None:
    """Report, tables, runs, artifacts, manifests, states and the terminal; Tune's own files are not in the storage."""
    config = _experiment(tmp_path / "network", fails)
    (tmp_path / "secrets.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    bucket = s3_storage.shown.removeprefix("s3://")
    root = f"s3://AKIDEXAMPLE:SECRETEXAMPLE@{bucket}?scheme=http&region=us-east-1&endpoint_override={s3_server.address}"
    hidden = {"RAY_ADDRESS", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    done = subprocess.run(
        [
            BESPOKE,
            "sweep",
            "secrets.yaml",
            "--force",
            "--storage",
            root,
            "--tracking-uri",
            f"http://alice:hunter2@{server}",
        ],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in hidden},
        capture_output=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == int(fails), done.stderr.decode()
    written = {"stdout": done.stdout, "stderr": done.stderr}
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.name != "secrets.yaml":
            written[str(file)] = file.read_bytes()
    objects = s3_storage.filesystem.get_file_info(pafs.FileSelector(bucket, recursive=True))
    for info in objects:
        if info.is_file:
            written[info.path] = s3_storage.filesystem.open_input_stream(info.path).read()
    assert any(name.endswith("artifacts/report.html") for name in written), (done.stdout + done.stderr).decode()
    assert len(written) > 20
    leaks = [(name, secret) for name, content in written.items() for secret in SECRETS if secret in content]
    assert leaks == []
    shown = [name for name, content in written.items() if s3_server.address.encode() in content]
    assert shown == []
