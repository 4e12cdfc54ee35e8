"""What the devices do, measured, against what they should do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from cadtrain.doctor.child import run_all
from cadtrain.doctor.finding import Finding, fail, ok, warn

MODULE = "cadtrain.doctor.measure_child"
PEAK_FLOPS: Mapping[str, float] = {
    "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12, "GB200": 2450e12,
    "A100": 312e12, "A800": 312e12, "H800": 989e12, "L40S": 362e12, "L40": 181e12, "L20": 119e12, "L4": 121e12, "A40": 150e12,
    "A30": 165e12, "A10": 125e12, "A6000": 155e12, "RTX 6000 Ada": 364e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bf16 products with fp32 sums, operations a second (Source: NVIDIA's data sheets)."""
GOOD_SHARE = 0.5
"""Part of the peak that a large product reaches on a healthy GPU; in practice 0.6 to 0.85."""
COPY_SHARE = 0.5


def peak_flops(name: str) -> float | None:
    """The chip's peak by its name; None for one that is not known. The longest name in the table that fits counts."""
    fitting = [key for key in PEAK_FLOPS if _words(key) <= _words(name)]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def _words(name: str) -> set[str]:
    return set(name.replace("-", " ").split())


def check_rates(*, pcie_bytes: float | None, seconds: float = 120, module: str = MODULE) -> Iterator[Finding]:
    """Matrix products and copies between host and GPUs, in a child process; at most `seconds`.

    `pcie_bytes` is what a slot gives in bytes a second, where known.
    """
    result = run_all([[sys.executable, "-m", module]], [{}], seconds=seconds)[0]
    line = next((row for row in result.stdout.splitlines() if row.startswith("facts ")), None)
    if not result.is_good or line is None:
        yield fail("matrix product", result.reason(), "Run `python -m cadtrain.doctor.measure_child` to see it alone.")
        return
    facts: dict[str, Any] = json.loads(line.removeprefix("facts "))
    if "cpu" in facts:
        cpu = facts["cpu"]
        yield ok("matrix product", f"{cpu['flops'] / 1e9:.0f} GFLOP/s in fp32 on {cpu['threads']} threads")
    for index, gpu in enumerate(facts["gpus"]):
        yield _product(index, gpu)
        yield _copies(index, gpu, pcie_bytes)


def _product(index: int, gpu: Mapping[str, Any]) -> Finding:
    name, peak = f"GPU {index} matrix product", peak_flops(gpu["name"])
    text = f"{gpu['flops'] / 1e12:.0f} TFLOP/s in bf16"
    if peak is None:
        return ok(name, f"{text} ({gpu['name']})")
    text += f", {gpu['flops'] / peak:.0%} of a {gpu['name']}'s peak"
    if gpu["flops"] < GOOD_SHARE * peak:
        return warn(
            name, text, "Something else runs there, or it is slowed down: nvidia-smi -q -d PERFORMANCE, nvidia-smi."
        )
    return ok(name, text)


def _copies(index: int, gpu: Mapping[str, Any], pcie_bytes: float | None) -> Finding:
    name = f"GPU {index} copies"
    text = f"{gpu['to_device'] / 1e9:.1f} GB/s to the GPU, {gpu['to_host'] / 1e9:.1f} GB/s back, from pinned memory"
    if pcie_bytes and min(gpu["to_device"], gpu["to_host"]) < COPY_SHARE * pcie_bytes:
        remedy = "Offloading will be slow: use a slot with all lanes, and memory of the processor that the GPU hangs on (numactl)."
        return warn(name, f"{text}; its slot gives {pcie_bytes / 1e9:.0f} GB/s", remedy)
    return ok(name, text)
