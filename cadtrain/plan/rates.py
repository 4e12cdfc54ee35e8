"""How fast a choice trains: arithmetic over a GPU's data sheet, calibrated where cadtrain was measured.

All weights: measured on 2 H200 (docs/performance.md, Qwen3-8B's shape, packs of 2 x 4,096 tokens, no recompute): 9,265 tokens a
second and GPU under ZeRO-3; under ZeRO-2 8,929 before the gradient's norm was taken at once, which gave ZeRO-3 a twentieth.
LoRA: measured on 2 H200 before there were fused kernels (docs/measurements.md, the same shape, rank 32): 10,636 under ZeRO-2, 8,609
under ZeRO-3, so it errs on the slow side. Every other GPU is scaled by its data sheet: an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cadtrain.errors import UsageError

if TYPE_CHECKING:
    from cadtrain.model.census import Census
    from cadtrain.plan.memory import Choice


@dataclass(frozen=True, slots=True)
class GpuKind:
    """One GPU of a data sheet."""

    name: str
    memory_bytes: int
    teraflops: float
    """Dense bf16, 10^12 operations a second."""
    link_gbps: float
    """To another GPU of the host, each way, 10^9 bytes a second as collectives reach it: about 60 % of the link's."""
    is_measured: bool = False


_GB = 10**9
GPUS: tuple[GpuKind, ...] = (
    GpuKind("H200", 141 * _GB, 989, 270, is_measured=True),
    GpuKind("H100", 80 * _GB, 989, 270),
    GpuKind("B200", 180 * _GB, 2250, 540),
    GpuKind("A100", 80 * _GB, 312, 180),
    GpuKind("L40S", 48 * _GB, 362, 15),
    GpuKind("L40", 48 * _GB, 181, 15),
    GpuKind("A6000", 48 * _GB, 155, 15),
    GpuKind("RTX 4090", 24 * _GB, 165, 12),
    GpuKind("RTX 3090", 24 * _GB, 71, 12),
)
"""NVIDIA's data sheets, SXM versions where there are two. Longer names stand before those that they begin with."""

HOST_LINK_BYTES = 20e9
"""Bytes a second and GPU between device and host memory over PCIe 4.0 x16. An estimate."""
HOST_ADAM_WEIGHTS = 5e8
"""Weights a second and rank that Adam on the host updates: 28 bytes each at 14 GB/s. An estimate."""

_SHARE_OF_PEAK = {(True, False): 0.321, (True, True): 0.260, (False, False): 0.465, (False, True): 0.457}
"""Share of a GPU's peak, by whether there are adapters and whether the stage is 3."""


def find_gpu(name: str) -> GpuKind | None:
    """The data sheet that a device's or a user's `name` means."""
    words = name.lower().replace("-", " ")
    return next((gpu for gpu in GPUS if gpu.name.lower() in words), None)


def gpu_named(name: str) -> GpuKind:
    """As `find_gpu`; raises `UsageError` for a name that is in no table."""
    found = find_gpu(name)
    if found is None:
        raise UsageError(
            f"{name!r} is in no table of GPUs.", where="--gpu",
            hint=f"Known are {', '.join(gpu.name for gpu in GPUS)}. Or give --gpu-memory alone: memory without speed.",
        )  # fmt: skip
    return found


def flops_per_token(census: Census, *, target_share: float, recomputed: float) -> float:
    """Operations a token of the language model, forward and backward, attention's scores left out (short sequences).

    2 a weight forward, 2 for the gradient of its input and 2 for its own, which frozen weights have none of; the head
    works on target positions alone. Recomputing is one more forward pass of the layers'
    share `recomputed`.
    """
    layers = census.num_layers * census.decoder_layer
    head = census.head * target_share
    if census.lora:
        frozen = layers - census.lora
        work = 4 * (frozen + head) + 6 * census.lora
    else:
        work = 6 * (layers + head)
    return float(work + 2 * layers * recomputed)


def pack_seconds(
    census: Census, choice: Choice, gpu: GpuKind, *, tokens: int, num_ranks: int, target_share: float, recomputed: float = 0.0
) -> float:
    """Seconds of one forward and backward pass over a pack of `tokens`: computing, or gathering where that is longer.

    `recomputed` is the share of the decoder layers that are computed again; `choice.recompute` says it of every stage.
    """
    work = flops_per_token(census, target_share=target_share, recomputed=recomputed) * tokens
    is_stage_3 = choice.stage == 3 and (num_ranks > 1 or choice.offload_parameters)
    computing = work / (gpu.teraflops * 1e12 * _SHARE_OF_PEAK[bool(census.lora), is_stage_3])
    gathering = 0.0
    if choice.stage == 3:
        # Once for each pass; layers are computed again with the weights that are gathered for their backward pass.
        gathering = 2 * 2 * census.total * (num_ranks - 1) / num_ranks / (gpu.link_gbps * 1e9)
        if choice.offload_parameters:
            gathering = max(gathering, 2 * 2 * census.total / num_ranks / HOST_LINK_BYTES)
    return max(computing, gathering)


def step_seconds(census: Census, choice: Choice, gpu: GpuKind, *, num_ranks: int) -> float:
    """Seconds of an optimizer step beside its packs: reducing gradients once, and with offload Adam on the host."""
    learn, others = census.trainable, (num_ranks - 1) / num_ranks
    seconds = 2 * 2 * learn * others / (gpu.link_gbps * 1e9)
    if choice.offload_optimizer:
        seconds += 6 * learn / num_ranks / HOST_LINK_BYTES + learn / num_ranks / HOST_ADAM_WEIGHTS
    return seconds
