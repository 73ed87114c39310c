"""Where a command is run does not decide what its workers import, nor whether Ray starts."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest
import ray

from orchestrator.cluster.surroundings import LONGEST_NAME, SOCKET_BYTES, WorkerPath, import_path, ray_folder
from orchestrator.errors import PoolError

LIBRARY = sysconfig.get_path("stdlib")


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
