"""Machines made of namespaces of this one, each with its own processes, address, home and SSH server.

They share the kernel, the clock and a read-only view of this machine's files, as from a common image; all of them mount
one folder as ``/mnt``. There is no systemd: ``systemctl`` and ``systemd-run`` are replaced by scripts that start and
find processes. Needs root, ``ip``, ``unshare``, ``sshd``, ``rsync`` and ``sudo``.

"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh-keygen", "rsync", "sudo")
NETWORK = "10.213.0"
HOME = "/home/machine"
BRIDGE = "bespoke0"
SPACES = ("--pid", "--mount", "--net", "--uts")

SYSTEMD_RUN = """#!/bin/bash
# systemd-run --unit=NAME [options] COMMAND...: starts the command in the background, as the calling user.
while [[ $1 == --* ]]; do
    case $1 in
        --unit=*) unit=${1#--unit=} ;;
        --working-directory=*) cd "${1#--working-directory=}" ;;
        --setenv=*) export "${1#--setenv=}" ;;
    esac
    shift
done
setsid nohup "$@" > "/tmp/$unit.log" 2>&1 < /dev/null &
echo $! > "/run/$unit.pid"
"""

SYSTEMCTL = """#!/bin/bash
# systemctl is-active --quiet NAME | stop NAME
unit="${@: -1}"
pid=$(cat "/run/$unit.pid" 2> /dev/null) || exit 3
if [[ $1 == stop ]]; then kill "$pid"; else kill -0 "$pid"; fi
"""

# Boot script of a machine: its own mounts, then the SSH server as process 1.
BOOT = """
set -e
mount --bind {shared} /mnt
mount -t overlay overlay -o lowerdir=/etc,upperdir={own}/etc,workdir={own}/etc-work /etc
mkdir -p {home} && mount --bind {own}/home {home}
mount --bind {own}/sbin /usr/local/sbin
mount --bind {own}/run /run && mkdir -p /run/sshd
mount -t tmpfs tmpfs /dev/shm
hostname {name}
sed -i 's#^root:\\(.*\\):[^:]*:\\([^:]*\\)$#root:\\1:{home}:\\2#' /etc/passwd
echo '{address} {name}' >> /etc/hosts
mount --bind {own}/tmp /tmp
exec /usr/sbin/sshd -D -e -o PermitRootLogin=yes -o UsePAM=no -o AuthorizedKeysFile={home}/.ssh/authorized_keys \\
    -o StrictModes=no -o PidFile=none
"""


def missing_tools() -> list[str]:
    """Return the required commands that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]


def foreign_ray() -> list[int]:
    """Return the ids of Ray processes that are already running on this machine."""
    process_ids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")[0]
            except OSError:
                continue
            if command.endswith((b"/raylet", b"/gcs_server")) or command.startswith(b"ray::"):
                process_ids.append(int(folder.name))
    return process_ids


class Machine:
    """One machine, running from construction to :meth:`stop`.

    Args:
        number: Last number of its address; its name is ``machineNUMBER``.
        folder: Folder for its own files.
        shared: The folder that all machines mount as ``/mnt``.
        key: Public SSH key that may log in.

    """

    def __init__(self, number: int, folder: Path, shared: Path, key: str):
        self.name, self.address = f"machine{number}", f"{NETWORK}.{number}"
        own = folder / self.name
        for part in ("etc", "etc-work", "home/.ssh", "sbin", "run", "tmp"):
            (own / part).mkdir(parents=True)
        (own / "home/.ssh/authorized_keys").write_text(key, encoding="utf-8")
        for name, text in (("systemd-run", SYSTEMD_RUN), ("systemctl", SYSTEMCTL)):
            (own / "sbin" / name).write_text(text, encoding="utf-8")
            (own / "sbin" / name).chmod(0o755)
        boot = BOOT.format(shared=shared, own=own, home=HOME, name=self.name, address=self.address)
        self.log = own / "boot.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["unshare", "--fork", "--kill-child", "--mount-proc", *SPACES, "bash", "-c", boot],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self._connect(number)

    def _inside(self) -> int:
        """Return the first process inside the namespaces, by its id outside."""
        end = time.monotonic() + 10
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (process_ids := children.read_text().split()):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        return int(process_ids[0])

    def _connect(self, number: int) -> None:
        """Connect the machine to the bridge by a veth pair."""
        self.cable = outer = f"bspk{number}"
        inner, pid = f"{outer}m", str(self._inside())
        _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
        _run("ip", "link", "set", outer, "master", BRIDGE, "up")
        _run("ip", "link", "set", inner, "netns", pid)
        for command in (f"addr add {self.address}/24 dev {inner}", f"link set {inner} up", "link set lo up"):
            _run("nsenter", "--net", "--target", pid, "ip", *command.split())

    def stop(self) -> None:
        """Switch the machine off."""
        self.process.kill()
        self.process.wait()
        # The kernel deletes the cable along with the machine's namespace, but with a delay.
        subprocess.run(["ip", "link", "del", self.cable], capture_output=True, check=False)


class Machines:
    """A context manager that runs machines 1 to ``count`` on their own network, in which this machine is number 254.

    Args:
        count: Number of machines.
        folder: Folder for their files.

    """

    def __init__(self, count: int, folder: Path):
        self.count, self.folder, self.shared = count, folder, folder / "shared"
        self.key = folder / "id_ed25519"
        self.machines: list[Machine] = []

    def __enter__(self) -> Machines:
        self.shared.mkdir()
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        try:
            _run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
            _run("ip", "link", "set", BRIDGE, "up")
            public = self.key.with_suffix(".pub").read_text(encoding="utf-8")
            for number in range(1, self.count + 1):
                self.machines.append(Machine(number, self.folder, self.shared, public))
            for machine in self.machines:
                self._provision(machine)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for machine in self.machines:
            machine.stop()
        _run("ip", "link", "del", BRIDGE)

    def ssh(self, machine: Machine, command: str) -> str:
        """Run a command on a machine, which must succeed, and return its output."""
        return _run(*self.ssh_command(machine), command)

    def ssh_command(self, machine: Machine, *options: str) -> list[str]:
        """Return the SSH command line that reaches a machine."""
        quiet = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")
        return ["ssh", "-i", str(self.key), *quiet, *options, f"root@{machine.address}"]

    def _provision(self, machine: Machine) -> None:
        """Make a virtual environment that sees this one's packages, since the machines have no package index."""
        end = time.monotonic() + 20
        while subprocess.run([*self.ssh_command(machine), "true"], capture_output=True, check=False).returncode:
            assert time.monotonic() < end, machine.log.read_text()
            time.sleep(0.2)
        base, packages = Path(sys.executable).resolve(), sysconfig.get_path("purelib")
        entries = {"ray": "from ray.scripts.scripts import main", "mlflow": "from mlflow.cli import cli as main"}
        lines = [
            f"{base} -m venv ~/venv && ~/venv/bin/pip uninstall --quiet --yes setuptools",  # the image has a newer one
            f"echo {packages} > $(~/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/image.pth",
            "echo 'export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_DISABLE_PIP_VERSION_CHECK=1' > ~/.bashrc",
        ]
        for name, entry in entries.items():
            script = f"#!{HOME}/venv/bin/python\\nimport sys\\n{entry}\\nsys.exit(main())\\n"
            lines.append(f"printf '{script}' > ~/venv/bin/{name} && chmod 755 ~/venv/bin/{name}")
        self.ssh(machine, " && ".join(lines))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout
