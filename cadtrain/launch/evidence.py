"""What the machine says about an end that no process could describe: kills for memory, full disks."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cadtrain.host_memory import CGROUPS, cgroup_folders, cgroup_limits, read_text

SHARED_MEMORY = Path("/dev/shm")
_KILLED = re.compile(r"Killed process (\d+) .*?anon-rss:(\d+)kB")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen at the end of a launch. A number is None where the machine does not tell it."""

    memory_kills: int | None = None
    """Processes that the kernel killed for memory since the start: in this job's control groups, else on the host."""
    killed_gib: dict[int, float] | None = None
    """Memory in GiB, by process id, of those that the kernel's log names."""
    shared_memory_free: int | None = None
    disk_free: int | None = None
    """Free bytes where the run is written."""
    memory_limit: int | None = None
    """The job's memory limit in bytes, where a control group sets one."""


class Witness:
    """Remembers the kernel's counters at the start of a launch, so that the end can be compared."""

    def __init__(self, run_dir: Path, *, cgroups: Path = CGROUPS, proc: Path = Path("/proc")) -> None:
        self._run_dir, self._cgroups, self._proc = run_dir, cgroups, proc
        self._kills = self._count_kills()
        self._log_lines = set(kernel_log("Killed process"))

    def evidence(self, pids: Iterable[int] = ()) -> Evidence:
        """What has happened since; `pids` are the processes of interest in the kernel's log."""
        now, wanted = self._count_kills(), set(pids)
        named: dict[int, float] = {}
        for line in kernel_log("Killed process"):
            match = _KILLED.search(line) if line not in self._log_lines else None
            if match is not None and int(match[1]) in wanted:
                named[int(match[1])] = int(match[2]) / 2**20
        return Evidence(
            memory_kills=None if now is None or self._kills is None else now - self._kills,
            killed_gib=named,
            shared_memory_free=_free(SHARED_MEMORY),
            disk_free=_free(self._run_dir),
            memory_limit=self._memory_limit(),
        )

    def _count_kills(self) -> int | None:
        counts = []
        for folder in cgroup_folders(self._cgroups, self._proc / "self" / "cgroup"):
            # Version 2 counts in memory.events, version 1 in memory.oom_control.
            for name in ("memory.events", "memory.oom_control"):
                counts += _counter(folder / name, "oom_kill")
        if not counts:
            counts = _counter(self._proc / "vmstat", "oom_kill")
        return max(counts) if counts else None

    def _memory_limit(self) -> int | None:
        limits = cgroup_limits(self._cgroups, self._proc / "self" / "cgroup")
        return min((limit for limit, _ in limits), default=None)


def _counter(path: Path, name: str) -> list[int]:
    rows = (line.split() for line in read_text(path).splitlines())
    return [int(row[1]) for row in rows if len(row) == 2 and row[0] == name and row[1].isdecimal()]


def kernel_log(words: str) -> Iterator[str]:
    """The lines of the kernel's log that hold `words`; none where this user may not read it."""
    try:
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    try:
        while True:
            try:
                line = os.read(descriptor, 8192).decode(errors="replace")
            except BrokenPipeError:  # a record was overwritten while it was read: the next one is read instead
                continue
            if not line:
                return
            if words in line:
                yield line
    except OSError:  # nothing left, or not readable after all
        return
    finally:
        os.close(descriptor)


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
