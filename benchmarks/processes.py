"""CPU seconds and memory of the processes of a benchmark, by role, read from /proc (Linux)."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

TICKS = os.sysconf("SC_CLK_TCK")

ROLES = {"ray::Host": "host", "ray::Router": "router", "ray::PointRunner": "runner", "ray::ImplicitFunc": "trial"}
"""Roles by the process title of a Ray worker; Tune's trials are 'ImplicitFunc'."""

RAY = "Ray's own"


SAME_PRIORITY = {"RAY_worker_niceness": "0"}
"""Environment that gives Ray's workers the same priority as other processes. At their usual niceness of 15 they get
little of a busy machine, and a benchmark against plain processes would measure that."""


@dataclass(frozen=True)
class Process:
    """A process under observation.

    Attributes:
        pid: Process id.
        role: 'driver' (the root of the tree), 'host', 'router', 'runner', 'trial', :data:`RAY`, or 'other'.
    """

    pid: int
    role: str


def processes(root: int) -> list[Process]:
    """The process ``root`` and all its current descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            children[int(fields[1])].append(int(entry.name))
    tree, todo = [Process(root, "driver")], [root]
    while todo:
        for pid in children[todo.pop()]:
            tree.append(Process(pid, _role(pid)))
            todo.append(pid)
    return tree


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat, from the state on; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _role(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "other"
    for title, role in ROLES.items():
        if command.startswith(title):
            return role
    return RAY if command.startswith("ray::") or "/ray/" in command else "other"


def cpu_seconds(root: int) -> float:
    """User and system seconds so far of ``root`` and its descendants, without Ray's own processes."""
    total = 0
    for process in processes(root):
        if process.role != RAY and (fields := _stat(process.pid)):
            total += int(fields[11]) + int(fields[12])
    return total / TICKS


@dataclass(frozen=True)
class Memory:
    """Memory of a process, bytes. Of pages used by several processes, RSS counts all, PSS a part, private none."""

    rss: int
    pss: int
    private: int


def memory(pid: int) -> Memory | None:
    """Current memory of ``pid``; None if it is gone or may not be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    kilobytes = {line.split()[0].rstrip(":"): int(line.split()[1]) for line in lines}
    if "Rss" not in kilobytes:
        return None
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return Memory(kilobytes["Rss"] * 1024, kilobytes["Pss"] * 1024, private * 1024)


@dataclass
class RolePeak:
    """Peaks of a role: number of concurrent processes, and bytes of the largest one."""

    count: int = 0
    rss: int = 0
    pss: int = 0
    private: int = 0

    def see(self, memories: list[Memory]) -> None:
        self.count = max(self.count, len(memories))
        for one in memories:
            self.rss, self.pss = max(self.rss, one.rss), max(self.pss, one.pss)
            self.private = max(self.private, one.private)


@dataclass
class MemoryWatch:
    """Samples the memory of a process tree at intervals. A context manager.

    Attributes:
        root: Root of the tree, a process id.
        interval: Seconds between samples; reading PSS takes milliseconds per process.
        total_pss: Peak of the whole tree, bytes.
        roles: Peaks by role.
    """

    root: int
    interval: float = 1.0
    total_pss: int = 0
    roles: dict[str, RolePeak] = field(default_factory=lambda: defaultdict(RolePeak))

    def __enter__(self) -> MemoryWatch:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            begin = time.monotonic()
            by_role: dict[str, list[Memory]] = defaultdict(list)
            for process in processes(self.root):
                if (current := memory(process.pid)) is not None:
                    by_role[process.role].append(current)
            self.total_pss = max(self.total_pss, sum(one.pss for memories in by_role.values() for one in memories))
            for role, memories in by_role.items():
                self.roles[role].see(memories)
            # Sampling takes at most a tenth of the time, so that it hardly disturbs the measurement.
            self._stop.wait(max(self.interval, 9 * (time.monotonic() - begin)))
