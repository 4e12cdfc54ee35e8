"""The host: memory, shared memory, limits, disks."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cadtrain.doctor.finding import Finding, fail, ok, warn
from cadtrain.host_memory import cgroup_memory_limit
from cadtrain.units import format_bytes

GIB = 2**30
WRITE_TEST_BYTES = 128 * 2**20


def check_memory(*, num_gpus: int) -> Iterator[Finding]:
    """Host memory, and the limit that a container or a job puts on it."""
    try:
        import psutil
    except ImportError as error:
        yield fail("host memory", f"cannot be asked: {error}", "pip install psutil")
        return
    memory = psutil.virtual_memory()
    limit = cgroup_memory_limit()
    text = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"
    available = memory.available
    if limit is not None and limit[0] < memory.total:
        available = min(available, limit[0] - limit[1])
        text += f"; this job may use {format_bytes(limit[0])}, {format_bytes(available)} of it are free"
    wanted = max(4, 8 * num_gpus) * GIB
    if available < wanted:
        yield warn(
            "host memory", text, f"About {format_bytes(wanted)} are wanted for {num_gpus or 'CPU'} ranks; ask for more."
        )
    else:
        yield ok("host memory", text)


def check_shared_memory(*, num_gpus: int, path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """/dev/shm, through which ranks of one host talk; containers give 64 MiB by default."""
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        yield warn("shared memory", f"{path}: {error.strerror}", "Mount a tmpfs there.")
        return
    text = f"{path}: {format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    remedy = "Start the container with --shm-size=16g or --ipc=host; on a host: mount -o remount,size=16g /dev/shm"
    if usage.free < 128 * 2**20 and num_gpus > 1:
        yield fail("shared memory", text, remedy)
    elif usage.free < GIB:
        yield warn("shared memory", text, remedy)
    else:
        yield ok("shared memory", text)


def check_limits() -> Iterator[Finding]:
    """Open files and locked memory of this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_limit(soft)} (may be raised to {_limit(hard)})"
    if soft != resource.RLIM_INFINITY and soft < 1024:
        yield warn("open files", text, "ulimit -n 65536")
    else:
        yield ok("open files", text)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "unlimited" if locked == resource.RLIM_INFINITY else format_bytes(locked)
    if locked != resource.RLIM_INFINITY and Path("/dev/infiniband").exists():
        yield warn(
            "locked memory", f"{text}, and InfiniBand needs it", "ulimit -l unlimited (container: --ulimit memlock=-1)"
        )
    else:
        yield ok("locked memory", text)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def check_disk(folder: Path, *, write: bool = True, wanted: int = GIB) -> Iterator[Finding]:
    """Room for checkpoints in `folder` (at least `wanted` bytes), and how fast it takes them with fsync."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))
    try:
        free = shutil.disk_usage(existing).free
        rate = _write_rate(existing) if write and free > 4 * WRITE_TEST_BYTES else None
    except OSError as error:
        yield fail(
            "disk", f"{existing}: {error.strerror or error}", "Give a --run-dir on a disk that you may write to."
        )
        return
    kind = file_system(existing)
    text = f"{existing.absolute()}: {format_bytes(free)} free"
    if kind in NETWORK_FILE_SYSTEMS:
        text += f", on a network disk ({kind})"
    if rate is not None:
        text += f", writes {format_bytes(rate)}/s"
    if free < wanted:
        text += f", {format_bytes(wanted)} are wanted" if wanted != GIB else ""
        yield fail("disk", text, "Free space, or give a --run-dir on another disk.")
    elif free < 20 * GIB:
        yield warn(
            "disk", text, "Enough for the demo; a checkpoint of a model with 1 B weights that learn takes 12 GB."
        )
    elif rate is not None and rate < 50 * 2**20:
        yield warn("disk", text, "Checkpoints will take long; give a --run-dir on a faster disk.")
    else:
        yield ok("disk", text)


NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "9p"}
)


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that `path` lies on, e.g. `ext4` or `nfs4`; empty where that is not known."""
    try:
        rows = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    resolved = path.absolute().resolve()
    best, found = -1, ""
    for row in rows:
        if len(row) < 3:
            continue
        # Spaces in a mount point are written as octal.
        point = Path(row[1].replace("\\040", " "))
        if len(point.parts) >= best and resolved.is_relative_to(point):
            best, found = len(point.parts), row[2]
    return found


def _write_rate(folder: Path) -> float:
    """Bytes a second, written and flushed to the disk."""
    block = os.urandom(4 * 2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".cadtrain-doctor-") as file:
        start = time.monotonic()
        for _ in range(WRITE_TEST_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITE_TEST_BYTES / max(time.monotonic() - start, 1e-6)
