"""How much memory this host, or the job on it, still has: control groups set limits that `free` does not show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process may still take: the host's free memory, or less where a control group says so."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = cgroup_memory_limit(root, membership)
    return free if limit is None else max(0, min(free, limit[0] - limit[1]))


def cgroup_memory_limit(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> tuple[int, int] | None:
    """(limit, in use) in bytes of the tightest control group that this process is in; None where there is none."""
    found = ((limit, read_text(used).strip()) for limit, used in cgroup_limits(root, membership))
    return min(((limit, int(used)) for limit, used in found if used.isdecimal()), default=None)


def cgroup_limits(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[tuple[int, Path]]:
    """Each limit in bytes that a control group sets on this process, with the file that says how much of it is in use."""
    for folder in cgroup_folders(root, membership):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = read_text(folder / limit_name).strip()
            # Version 1 writes a number near 2^63 for no limit.
            if limit.isdecimal() and int(limit) < 2**60:
                yield int(limit), folder / used_name


def cgroup_folders(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[Path]:
    """The folders of the control groups for memory that this process is in, the innermost first."""
    for line in read_text(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        inner = Path(path.lstrip("/"))
        yield from (base / part for part in (inner, *inner.parents))


def read_text(path: Path) -> str:
    """A file of the kernel's, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
