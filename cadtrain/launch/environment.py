"""The environment that the ranks start in, and the record of the machine that a run folder keeps."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cadtrain.gpu_memory import VARIABLE, memory_cap
from cadtrain.launch.devices import RankDevices

_PACKAGES = (
    "cadtrain", "torch", "deepspeed", "transformers", "peft", "tokenizers", "safetensors", "datasets",
    "liger-kernel", "cadquery-ocp-novtk", "numpy", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def clean_arch_list(value: str) -> str:
    """`TORCH_CUDA_ARCH_LIST` without architecture suffixes: `9.0;9.0a` -> `9.0`.

    DeepSpeed's extension builder reads `9.0a` as a number and fails.
    """
    cleaned: list[str] = []
    for entry in value.replace(" ", ";").split(";"):
        number, plus, ptx = entry.partition("+")
        plain = number.rstrip("af") + plus + ptx
        if plain and plain not in cleaned:
            cleaned.append(plain)
    return ";".join(cleaned)


def environment_changes(
    devices: RankDevices, environ: Mapping[str, str], *, logs: Path | None = None
) -> dict[str, str]:
    """The variables to set for the ranks; what the user has set stays, but for values known to break a run.

    With `logs`, NCCL's flight recorder writes there which collectives each rank had called when one timed out.
    """
    changes: dict[str, str] = {}

    def default(name: str, value: str) -> None:
        if name not in environ:
            changes[name] = value

    default("OMP_NUM_THREADS", str(max(1, usable_cores() // devices.num_ranks)))
    default("TOKENIZERS_PARALLELISM", "false")
    if devices.kind == "cpu":
        changes["DS_ACCELERATOR"] = "cpu"
        changes["LOCAL_SIZE"] = str(devices.num_ranks)
    else:
        if (cap := memory_cap(environ)) is not None:
            changes[VARIABLE] = str(cap)
        # The ids of devices are by PCI bus. A user who wrote indices in another order meant that order.
        if not environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", "").replace(" ", "").isdecimal():
            changes["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        else:
            default("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        default("DS_ACCELERATOR", "cuda")
        if "PYTORCH_ALLOC_CONF" not in environ:
            default("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        default("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        default("NCCL_DEBUG", "WARN")
        if logs is not None:
            for name, value in flight_recorder(logs.absolute()).items():
                default(name, value)
    if (path := _path_with_ninja(environ.get("PATH", os.defpath))) is not None:
        changes["PATH"] = path
    arch_list = environ.get("TORCH_CUDA_ARCH_LIST")
    if arch_list is not None and clean_arch_list(arch_list) != arch_list:
        changes["TORCH_CUDA_ARCH_LIST"] = clean_arch_list(arch_list)
    return changes


def flight_recorder(logs: Path) -> dict[str, str]:
    """The variables that let torch keep each rank's last NCCL collectives and write them out at a time-out.

    Newer versions of torch read TORCH_FR_… and still know the older names.
    """
    return {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(logs / "nccl_trace_rank_"),
    }


def _path_with_ninja(path: str) -> str | None:
    """`path` with this interpreter's scripts in front where ninja is found only there, as in a virtual environment
    that was not activated; DeepSpeed compiles with it. None where nothing needs to change."""
    scripts = os.path.dirname(sys.executable)
    if shutil.which("ninja", path=path) is not None or shutil.which("ninja", path=scripts) is None:
        return None
    return f"{scripts}{os.pathsep}{path}"


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide what a run computes; none of them is imported."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment_record(
    devices: RankDevices, launcher_argv: Sequence[str], changes: Mapping[str, str]
) -> dict[str, Any]:
    """What `environment.json` holds. Values of other environment variables are not recorded: some are secrets."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "argv": sys.argv,
        "working_directory": os.getcwd(),
        "launcher_argv": list(launcher_argv),
        "environment_changes": dict(changes),
        "cores": usable_cores(),
        "device": devices.kind,
        "num_ranks": devices.num_ranks,
        "gpus": [
            {"id": gpu.id, "uuid": gpu.uuid, "name": gpu.name, "memory_total": gpu.memory_total} for gpu in devices.gpus
        ],
        "versions": package_versions(),
    }
