"""Where a command is run does not decide what its workers import, nor whether Ray starts."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import ray
import yaml

from orchestrator.cluster.surroundings import LONGEST_NAME, SOCKET_BYTES, WorkerPath, import_path, ray_folder
from orchestrator.errors import PoolError

LIBRARY = sysconfig.get_path("stdlib")
SHADOWS = ("solvers", "sweeps", "orchestrator", "torch", "numpy", "ray", "mlflow", "types", "json", "typing")
"""Modules that the program, its packages and Python itself import."""

SPECIAL = "50% a%20b?c#d ü \"e' ;f&g=1[h]{i}$j"
"""A folder's name with characters that mean something in URIs, shells, SQL, globs and formats."""


@pytest.mark.parametrize(
    ("started_with", "expected"),
    [
        (["/venv/bin", LIBRARY, "/venv/site-packages"], ["/venv/bin"]),
        (["", "/mine", "/usr/lib/python311.zip", LIBRARY], [os.getcwd(), "/mine"]),
        ([LIBRARY], []),
    ],
    ids=["a command", "python -m with PYTHONPATH", "nothing"],
)
def test_workers_import_from_the_folders_that_the_driver_imports_from(
    started_with: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in front of the standard library; what follows belongs to the installation, which a node has itself."""
    zip_of_library = os.path.basename(LIBRARY).replace(".", "") + ".zip"
    entries = [entry.replace("python311.zip", zip_of_library) for entry in started_with]
    assert import_path(entries) == expected


def test_ray_does_not_add_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray adds it unless the job has a path of its own; a model's folder in ``sys.path`` is not passed on either."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config = WorkerPath()
    assert config._runtime_env_has_working_dir()
    assert str(tmp_path) not in config._py_driver_sys_path
    assert config._py_driver_sys_path == import_path()[::-1]
    assert ray.job_config.JobConfig.__dict__.keys() >= {"_runtime_env_has_working_dir"}, "overrides Ray's own method"


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("folder", ["/" + "d" * 90, "/scratch/ü"], ids=["long", "not ASCII"])
def test_a_folder_that_sockets_cannot_have_is_replaced(
    variable: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's own TMPDIR on a cluster is often long. Ray would end in a traceback."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, folder)
    chosen = ray_folder()
    assert chosen is not None
    assert chosen.isascii()
    assert len(chosen.rpartition("/")[0]) + len(LONGEST_NAME) <= SOCKET_BYTES


def test_a_folder_that_sockets_can_have_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that Ray's own tools find its session."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/scratch/1234")
    assert ray_folder() is None


def test_without_any_such_folder_the_error_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the folder and the remedy."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/scratch/ü")
    monkeypatch.setattr("orchestrator.cluster.surroundings.SHORT_FOLDERS", ("/none",))
    with pytest.raises(PoolError, match=r"in '/scratch/ü'.*nor in /none; set TMPDIR to a folder .* at most \d+"):
        ray_folder()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_command_works_in_any_folder_whatever_lies_in_it(tmp_path: Path) -> None:
    """Its name has special characters, TMPDIR is too long and not ASCII, and modules of all names lie there.

    The paths of the configuration are relative, one with special characters itself.
    """
    folder, temporary = tmp_path / SPECIAL, tmp_path / ("ü" * 60)
    (folder / "net #1%").mkdir(parents=True)
    temporary.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('the {name} of the current folder')\n")
    (folder / "net #1%" / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.a = torch.nn.Parameter(torch.ones(()))\n"
        "    def forward(self, x, t):\n        return torch.tanh(self.a * x)\n"
    )
    model = {"factory": "net:Net", "path": "net #1%", "shape": [1, 2, 3], "native_scheduler": "cond_ot"}
    config = {
        "name": "tiny",
        "model": {"name": "torch_module", "options": {**model, "prediction": "velocity"}},
        "conditioning": {"name": "labels", "options": {"classes": 1}},
        "pairs": {"train": 8, "validation": 8, "test": 8, "batch_size": 8, "shard_size": 8},
        "nfe": [2],
        "fixed": ["euler"],
        "storage": "data %20?",
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.run(
        [Path(sys.executable).with_name("bespoke"), "sweep", "c.yaml", "--force"],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert set(tmp_path.iterdir()) == {folder, temporary}
    assert {path.name for path in folder.iterdir()} == {*(f"{n}.py" for n in SHADOWS), "c.yaml", "net #1%", "data %20?"}
    assert list((folder / "data %20?").rglob("theta.json"))
