"""A user's session (`ray up`, a sweep as a job, MLflow, `ray down`) on three machines made of namespaces of this one.

Opt-in, since it needs root and changes the machine's network while it runs:

    BESPOKE_RAY_UP=1 python -m pytest tests/test_ray_up.py -s

"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_place import Place, check_complete
from machines import HOME, Machine, Machines, foreign_ray, missing_tools

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("BESPOKE_RAY_UP"), reason="opt-in: BESPOKE_RAY_UP=1, as root"),
]

MOUNTED = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "solvers", "orchestrator", "sweeps")
BIN = Path(sys.executable).parent


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """A head and two workers."""
    if os.geteuid() != 0 or missing_tools():
        pytest.fail(f"needs root and {', '.join(missing_tools()) or 'nothing else'}")
    if running := foreign_ray():
        pytest.fail(
            f"Ray is already running on this machine (processes {running[:3]} …); stop it, then rerun this test"
        )
    with Machines(3, tmp_path) as started:
        yield started


class Laptop:
    """The user's machine: the repository's files, a home with the cluster's token, and the completed cluster file."""

    def __init__(self, folder: Path, repository: Path, machines: Machines):
        self.folder, self.machines = folder, machines
        folder.mkdir()
        for name in MOUNTED:
            copy = shutil.copytree if (repository / name).is_dir() else shutil.copy
            copy(repository / name, folder / name)
        head, *workers = [machine.address for machine in machines.machines]
        text = (repository / "docs/ray_cluster.ssh.yaml").read_text(encoding="utf-8")
        for old, new in (
            ("head_ip: REPLACE-ME", f"head_ip: {head}"),
            ("worker_ips: [REPLACE-ME, REPLACE-ME-2]", f"worker_ips: [{', '.join(workers)}]"),
            ("ssh_user: REPLACE-ME", "ssh_user: root"),
            ("ssh_private_key: ~/.ssh/id_ed25519", f"ssh_private_key: {machines.key}"),
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "cluster.yaml").write_text(text, encoding="utf-8")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "HOME": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_UP_enable_autoscaler_v2": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def run(self, *command: str, succeeds: bool = True, **variables: str) -> str:
        """Run a command, check whether it succeeds, and return its output."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=900,
            check=False,
        )
        print(f"$ {' '.join(command)}\n{done.stdout}")
        assert (done.returncode == 0) == succeeds, command
        return done.stdout

    @contextmanager
    def tunnels(self) -> Iterator[tuple[str, str]]:
        """SSH tunnels to the dashboard and MLflow on the head, as in docs/cluster.md."""
        ends = {8265: "127.0.0.1:8265", 5000: "bespoke-head:5000"}
        options = [part for port, end in ends.items() for part in ("-L", f"{port}:{end}")]
        tunnel = subprocess.Popen(self.machines.ssh_command(self.machines.machines[0], "-N", *options))
        try:
            for port in ends:
                _wait_for(port)
            yield "http://localhost:8265", "http://localhost:5000"
        finally:
            tunnel.kill()
            tunnel.wait()


def _wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.2)


def test_ray_up_a_sweep_as_a_job_and_ray_down(machines: Machines, repository: Path, tmp_path: Path) -> None:
    """The commands of docs/cluster.md, with only the lines marked EDIT in docs/ray_cluster.ssh.yaml changed."""
    laptop = Laptop(tmp_path / "laptop", repository, machines)
    laptop.run("bash", "-c", "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token")
    laptop.run("bespoke", "cluster", "check", "cluster.yaml", "--for-launch")
    laptop.run("ray", "up", "-y", "cluster.yaml")
    storage, tracking = "/mnt/bespoke", "http://bespoke-head:5000"
    with laptop.tunnels() as (dashboard, mlflow):
        place = Place(machines.shared, root="bespoke", tracking_uri=mlflow)
        refused = laptop.run("ray", "job", "list", "--address", dashboard, succeeds=False, RAY_AUTH_MODE="disabled")
        assert "token" in refused.lower()
        submit = ("ray", "job", "submit", "--address", dashboard)
        options = ("--address", "auto", "--storage", storage, "--tracking-uri", tracking)
        _wait_for_nodes(laptop, 3)
        doctor = laptop.run(*submit, "--", "bespoke", "doctor", *options)
        for machine in machines.machines:
            assert machine.address in doctor
        output = laptop.run(*submit, "--submission-id", "tiny-1", "--", "bespoke", "sweep", "/mnt/tiny.yaml", *options)
        assert f"report: {storage}/experiments/tiny/report.html" in output
        check_complete(place)
    laptop.run("ray", "down", "-y", "cluster.yaml")
    # It stops Ray on the head only; Ray on the workers ends by itself a minute after the connection is lost.
    end = time.monotonic() + 180
    while running := [machine.name for machine in machines.machines if _runs_ray(machines, machine)]:
        assert time.monotonic() < end, running
        time.sleep(2)


def _runs_ray(machines: Machines, machine: Machine) -> bool:
    return "raylet/raylet" in machines.ssh(machine, "ps ax -o args=")


def _wait_for_nodes(laptop: Laptop, count: int) -> None:
    """Wait until ``count`` machines have joined."""
    head = laptop.machines.machines[0]
    end = time.monotonic() + 300
    code = "import ray; ray.init(logging_level=40); print(sum(n['Alive'] for n in ray.nodes()))"
    command = f'RAY_AUTH_MODE=token {HOME}/venv/bin/python -c "{code}" 2> /dev/null | tail -n 1'
    while True:
        alive = laptop.machines.ssh(head, command)
        if alive.strip() == str(count):
            return
        assert time.monotonic() < end, alive
        time.sleep(2)
