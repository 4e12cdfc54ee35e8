"""GPUs, their driver and torch's build for them; torch is asked in a child process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cadtrain.doctor.child import run_python
from cadtrain.doctor.finding import Finding, fail, ok, warn
from cadtrain.launch.devices import Gpu
from cadtrain.units import format_bytes

HELD_BYTES = 2**30
"""Memory in use on a GPU before a run from which a warning is given."""

_TORCH = """
import importlib.util, json, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "devices": []}
facts["varlen"] = importlib.util.find_spec("torch.nn.attention.varlen") is not None
if torch.cuda.is_available():
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts["architectures"] = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts["devices"].append([properties.name, properties.major, properties.minor])
        left = torch.full((64, 64), 2.0, device=f"cuda:{index}")
        assert (left @ left).sum().item() == 64 * 64 * 64 * 4
print("facts", json.dumps(facts))
"""


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What torch says of itself; `cuda` is None for a build without CUDA."""

    version: str
    cuda: str | None
    nccl: str | None
    num_devices: int
    has_varlen: bool = True
    """Whether torch has the attention kernel for packed sequences."""


def check_torch(gpus: tuple[Gpu, ...]) -> tuple[TorchFacts | None, list[Finding]]:
    """Import torch in a child and multiply on every GPU."""
    result = run_python(_TORCH, seconds=180)
    line = next((row for row in result.stdout.splitlines() if row.startswith("facts ")), None)
    if not result.is_good or line is None:
        remedy = (
            "Run `python -c 'import torch; torch.zeros(1).cuda()'` to see it alone."
            if gpus
            else "pip install --force-reinstall torch"
        )
        return None, [fail("torch", result.reason(), remedy)]
    raw: dict[str, Any] = json.loads(line.removeprefix("facts "))
    facts = TorchFacts(raw["version"], raw["cuda"], raw.get("nccl"), len(raw["devices"]), bool(raw.get("varlen", True)))
    text = f"{facts.version}, built for {f'CUDA {facts.cuda}' if facts.cuda else 'CPU only'}"
    if facts.nccl:
        text += f", NCCL {facts.nccl}"
    if gpus and facts.cuda is None:
        return facts, [
            fail(
                "torch",
                f"{text}, but there are {len(gpus)} GPUs",
                "pip install torch from the CUDA index of pytorch.org.",
            )
        ]
    if gpus and facts.num_devices < len(gpus):
        return facts, [
            fail("torch", f"{text}; it sees {facts.num_devices} of {len(gpus)} GPUs", _driver_remedy(facts.cuda))
        ]
    return facts, [ok("torch", text)]


def check_attention(facts: TorchFacts | None, *, has_gpu: bool) -> Iterator[Finding]:
    """The attention kernel for packed sequences (CPU ranks use a mask instead)."""
    if facts is None or not has_gpu:
        return
    if facts.has_varlen:
        yield ok("packed attention", "torch.nn.attention.varlen is there")
    else:
        yield fail(
            "packed attention",
            f"torch {facts.version} has no torch.nn.attention.varlen",
            "pip install 'torch>=2.10,<2.14'",
        )


def _driver_remedy(cuda: str | None) -> str:
    return f"Update the NVIDIA driver to one for CUDA {cuda}, or install a torch built for an older CUDA."


def check_driver(facts: TorchFacts | None) -> Iterator[Finding]:
    """The driver, against the CUDA that torch is built for."""
    with _nvml() as nvml:
        if nvml is None:
            yield ok("driver", "no NVIDIA driver: ranks run on CPUs")
            return
        version = _text(nvml.nvmlSystemGetDriverVersion())
        number = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
    supported = f"{number // 1000}.{number % 1000 // 10}"
    text = f"{version}, for CUDA up to {supported}"
    if facts is None or facts.cuda is None:
        yield ok("driver", text)
    elif int(facts.cuda.split(".")[0]) > number // 1000:
        yield fail("driver", f"{text}; torch is built for {facts.cuda}", _driver_remedy(facts.cuda))
    else:
        yield ok("driver", text)


def check_gpus(gpus: tuple[Gpu, ...], requested: int | None, *, tell_links: bool = True) -> Iterator[Finding]:
    """Number, memory, who holds it, and (unless told elsewhere) links of the GPUs."""
    if not gpus:
        yield ok("GPUs", "none visible: ranks run on CPUs over gloo")
        return
    text = ", ".join(
        f"{gpu.id}: {gpu.name}, {format_bytes(gpu.memory_free)} free of {format_bytes(gpu.memory_total)}"
        for gpu in gpus
    )
    if requested is not None and requested > len(gpus):
        yield fail(
            "GPUs",
            f"{len(gpus)} visible, {requested} asked for; {text}",
            f"Use --gpus {len(gpus)}, or make more visible.",
        )
    else:
        yield ok("GPUs", text)
    with _nvml() as nvml:
        for gpu in gpus if nvml is not None else ():
            yield from _one_gpu(nvml, gpu)
        if nvml is not None and len(gpus) > 1 and tell_links:
            yield ok("GPU links", _links(nvml, gpus))


def count_nvlinks(gpus: tuple[Gpu, ...]) -> int:
    """Fewest active NVLinks on any of `gpus`; 0 where that cannot be asked."""
    with _nvml() as nvml:
        return min((_active_links(nvml, gpu) for gpu in gpus), default=0) if nvml is not None else 0


def _one_gpu(nvml: Any, gpu: Gpu) -> Iterator[Finding]:
    used = gpu.memory_total - gpu.memory_free
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        holders = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return
    if used > HELD_BYTES:
        who = (
            ", ".join(f"{_process_name(row.pid)} ({row.pid})" for row in holders)
            or "processes of another container or user"
        )
        yield warn(
            f"GPU {gpu.id} memory",
            f"{format_bytes(used)} are held by {who}",
            "End them, or choose other GPUs with CUDA_VISIBLE_DEVICES.",
        )


def _process_name(pid: int) -> str:
    try:
        import psutil

        return str(psutil.Process(pid).name())
    except (ImportError, OSError):
        return "process"
    except psutil.Error:
        return "process"


def _links(nvml: Any, gpus: tuple[Gpu, ...]) -> str:
    counts = [_active_links(nvml, gpu) for gpu in gpus]
    if all(counts):
        return f"NVLink, {min(counts)} links a GPU"
    return "PCIe" if not any(counts) else f"NVLink on {sum(map(bool, counts))} of {len(gpus)} GPUs"


def _active_links(nvml: Any, gpu: Gpu) -> int:
    count = 0
    with contextlib.suppress(nvml.NVMLError):
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        for link in range(int(nvml.NVML_NVLINK_MAX_LINKS)):
            count += nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED
    return count


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """NVML, or None where it cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        yield None
        return
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
