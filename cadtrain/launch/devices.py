"""The GPUs that this process may use, found without creating a CUDA context.

A context in the launcher would hold several hundred MiB on the first GPU for the whole run, so torch is asked only
as a last resort, and then in a child process. NVML (through `pynvml`, which DeepSpeed depends on) is asked first.
`CUDA_VISIBLE_DEVICES` is honoured in every form CUDA knows: indices, UUIDs, abbreviated UUIDs. Ranks are given indices
by PCI bus, whatever the user wrote: DeepSpeed's CUDA accelerator reads the variable as whole numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cadtrain.errors import EnvironmentFault, UsageError
from cadtrain.gpu_memory import memory_cap

DEFAULT_CPU_RANKS = 2
"""Ranks on a machine without a GPU when no number is asked for: the fewest that exercise the collectives."""

GpuRequest = int | tuple[str, ...] | None
"""What `--gpus` asks for: a number of ranks, these GPUs, or all."""

MIG = "MIG-"
"""How the name of a part of a GPU begins."""

_TORCH_PROBE = """
import json, torch
count = torch.cuda.device_count()
found = [torch.cuda.get_device_properties(i) for i in range(count)]
print(json.dumps([[i, str(getattr(p, "uuid", "")), p.name, p.total_memory] for i, p in enumerate(found)]))
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `id` is its index, as `CUDA_VISIBLE_DEVICES` of a rank holds it; memory is in bytes, 0 where not known."""

    id: str
    uuid: str
    name: str
    memory_total: int
    memory_free: int


@dataclass(frozen=True, slots=True)
class RankDevices:
    """What the ranks run on: `num_ranks` GPUs, or that many CPU processes over gloo where `gpus` is empty."""

    kind: Literal["cuda", "cpu"]
    num_ranks: int
    gpus: tuple[Gpu, ...]

    @property
    def ids(self) -> list[str]:
        """One entry a rank for DeepSpeed's launcher; `-1` hides every GPU from a CPU rank."""
        return [gpu.id for gpu in self.gpus] if self.kind == "cuda" else ["-1"] * self.num_ranks

    def describe(self) -> str:
        """`4 × NVIDIA H200 (139.8 GiB)` or `2 × CPU over gloo (no GPU found)`."""
        from cadtrain.units import format_bytes

        if self.kind == "cpu":
            return f"{self.num_ranks} × CPU over gloo (no GPU found)"
        names = sorted({f"{gpu.name} ({format_bytes(gpu.memory_total)})" for gpu in self.gpus})
        return f"{self.num_ranks} × {', '.join(names)}"


def parse_gpus(text: str | None) -> GpuRequest:
    """`--gpus`: `auto` (None), a number of ranks, or a list of indices or UUIDs: `0,2,3`, `GPU-5f1e,GPU-77aa`, `2,`.

    Raises `UsageError` that names the entry.
    """
    written = (text or "auto").strip()
    if written == "auto":
        return None
    if written.isdecimal():
        if int(written) < 1:
            raise UsageError(f"{written} ranks were asked for.", where="--gpus", hint="Give 1 or more.")
        return int(written)
    names = [part.strip() for part in written.removesuffix(",").split(",")]
    wrong = [name for name in names if not (name.isdecimal() or name.startswith(("GPU-", MIG)))]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if wrong or repeated:
        found = f"{wrong[0]!r} is no GPU" if wrong else f"{repeated[0]} is named twice"
        raise UsageError(
            f"{found} in {written!r}.",
            where="--gpus",
            hint="Give auto, a number of ranks, or a list of indices or UUIDs such as 0,2,3 (one alone: `2,`).",
        )
    return tuple(names)


def choose_devices(gpus: Sequence[Gpu], requested: GpuRequest) -> RankDevices:
    """The devices for `requested` ranks (None: all GPUs, or `DEFAULT_CPU_RANKS` CPU ranks where there is no GPU).

    Raises `EnvironmentFault` where there are GPUs but fewer than asked, not the ones named, or parts of GPUs that
    DeepSpeed cannot name.
    """
    if isinstance(requested, tuple):
        gpus = _named(gpus, requested)
        requested = len(gpus)
    if not gpus:
        return RankDevices("cpu", requested or DEFAULT_CPU_RANKS, ())
    count = requested or len(gpus)
    if count > len(gpus):
        raise EnvironmentFault(
            f"{count} GPUs were asked for, {len(gpus)} {'is' if len(gpus) == 1 else 'are'} visible"
            f" ({', '.join(f'{gpu.id}: {gpu.name}' for gpu in gpus)}).",
            where="--gpus",
            hint=f"Use --gpus {len(gpus)}, or make more visible (CUDA_VISIBLE_DEVICES).",
        )
    chosen = tuple(gpus[:count])
    if instances := [gpu.id for gpu in chosen if gpu.id.startswith(MIG)]:
        raise EnvironmentFault(
            f"DeepSpeed cannot run on {instances[0]}: it reads device numbers only.",
            where="CUDA_VISIBLE_DEVICES",
            hint="Unset it inside a container that has this one instance, or use a whole GPU.",
        )
    return RankDevices("cuda", count, chosen)


def _named(gpus: Sequence[Gpu], names: Sequence[str]) -> list[Gpu]:
    """The visible GPUs that `names` (indices as nvidia-smi shows them, or UUIDs) stand for, in that order."""
    chosen: list[Gpu] = []
    for name in names:
        found = [gpu for gpu in gpus if gpu.id == name or (not name.isdecimal() and gpu.uuid.startswith(name))]
        if len(found) != 1 or found[0] in chosen:
            visible = ", ".join(f"{gpu.id} ({gpu.uuid[:12]})" for gpu in gpus) or "none"
            what = "stands for several GPUs" if len(found) > 1 else "is named twice" if found else "is not visible"
            raise EnvironmentFault(
                f"GPU {name} {what}; visible: {visible}.",
                where="--gpus",
                hint="Name visible ones by the index that nvidia-smi shows, or by UUID.",
            )
        chosen.append(found[0])
    return chosen


def find_gpus(environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs that a process with the environment `environ` would see, in CUDA's order (by PCI bus).

    Under a cap (`gpu_memory`) each seems to have no more memory than that. Raises `UsageError` for a cap that is none.
    """
    cap = memory_cap(environ)
    return tuple(
        gpu if cap is None else replace(gpu, memory_total=min(gpu.memory_total, cap), memory_free=min(gpu.memory_free, cap))
        for gpu in _visible_gpus(environ)
    )


def _visible_gpus(environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    if mask is not None and mask.strip() in ("", "-1", "NoDevFiles"):
        return ()
    if environ.get("DS_ACCELERATOR") == "cpu":
        return ()
    installed = _gpus_from_nvml()
    if installed is None:
        # Torch honours the mask itself; its ids then count within the mask, which is still in force for the ranks.
        return _gpus_from_torch(mask) if _has_device_files() else ()
    return installed if mask is None else select_visible(installed, mask)


def select_visible(installed: Sequence[Gpu], mask: str) -> tuple[Gpu, ...]:
    """The GPUs that `CUDA_VISIBLE_DEVICES=mask` leaves visible; like CUDA it stops at the first entry it cannot use."""
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in mask.split(",")):
        if entry.startswith(MIG):
            chosen.append(Gpu(entry, entry, "MIG instance", 0, 0))
            continue
        found = [gpu for index, gpu in enumerate(installed) if _names(entry, index, gpu)]
        if len(found) != 1 or found[0].uuid in {gpu.uuid for gpu in chosen}:
            break
        chosen.append(found[0])
    return tuple(chosen)


def _names(entry: str, index: int, gpu: Gpu) -> bool:
    if entry.startswith("GPU-"):
        return gpu.uuid.startswith(entry)
    return entry.isdecimal() and int(entry) == index


def _gpus_from_nvml() -> tuple[Gpu, ...] | None:
    """All installed GPUs; None where NVML cannot be asked."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_describe(pynvml, index, handle) for index, handle in enumerate(handles))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _describe(pynvml, index: int, handle: object) -> Gpu:  # type: ignore[no-untyped-def]
    def text(value: str | bytes) -> str:
        return value.decode() if isinstance(value, bytes) else value

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
    return Gpu(str(index), text(uuid), text(name), int(memory.total), int(memory.free))


def _has_device_files() -> bool:
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))


def _gpus_from_torch(mask: str | None) -> tuple[Gpu, ...]:
    command = [sys.executable, "-c", _TORCH_PROBE]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        rows = json.loads(result.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return ()
    names = [part.strip() for part in mask.split(",")] if mask else [str(row[0]) for row in rows]
    return tuple(Gpu(name, row[1] or name, row[2], row[3], row[3]) for name, row in zip(names, rows, strict=False))
