"""Where one GPU's memory goes under a choice of ZeRO stage, offload and recomputation: pure arithmetic over counts.

Legend: P weights, T weights that learn, N ranks. Bytes a rank in bf16, with fp32 master weights and the gradients that
cadtrain's engine adds up in fp32 (Source: ZeRO, arXiv 1910.02054, section 3; `train.engine`; DeepSpeed 0.19.8):

    stage   weights   gradients   optimizer
    0       2P        2T + 4T     12T
    1       2P        2T + 4T     12T/N
    2       2P        4T/N        12T/N
    3       2P/N      4T/N        12T/N

Stages 2 and 3 reduce a gradient as soon as a bucket is full, so only shares of it and the buckets are held. With
offload the optimizer's share lives in host memory; at stages 2 and 3 that of the gradients too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cadtrain.config.recompute import NO_RECOMPUTE, Recompute

if TYPE_CHECKING:
    from cadtrain.model.census import Census

ZeroStage = Literal[0, 1, 2, 3]
STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)

CONTEXT_BYTES = int(1.5 * 2**30)
"""CUDA context, kernels, cuBLAS workspaces and NCCL channels of a rank: outside what the allocator counts. An estimate."""
RESERVE = 0.06
"""Share of what the allocator hands out that it holds beside it, in pieces too small to be used. An estimate."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What can be chosen without changing what is learned."""

    stage: ZeroStage
    offload_optimizer: bool = False
    offload_parameters: bool = False
    recompute: Recompute = NO_RECOMPUTE

    def describe(self) -> str:
        """`ZeRO-2`, `ZeRO-3, optimizer and weights on the host, recompute 12 of 36 layers`."""
        held = [n for n, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_parameters)) if on]
        parts = [f"ZeRO-{self.stage}", f"{' and '.join(held)} on the host" if held else ""]
        return ", ".join(part for part in (*parts, self.recompute.describe()) if part)


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank on its device, by use."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Peak of the forward and the backward pass, of the costliest curriculum stage."""
    buckets: int
    """Flat buffers of gradients on their way between ranks, at stages 1 to 3."""
    gathered: int
    """Whole weights while they are used, and those being gathered ahead, at stage 3."""
    reserve: int
    context: int

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` shows."""
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.buckets + self.gathered
        )  # fmt: skip

    @property
    def total(self) -> int:
        """What `nvidia-smi` shows: the allocator's reserve and the context included."""
        return self.allocated + self.reserve + self.context

    def as_dict(self) -> dict[str, int]:
        """The parts, `allocated` and `total`, in bytes."""
        names = ("weights", "gradients", "optimizer", "activations", "buckets", "gathered", "reserve", "context")
        return {**{n: getattr(self, n) for n in names}, "allocated": self.allocated, "total": self.total}


def rank_memory(
    census: Census, choice: Choice, num_ranks: int, *, activations: int, zero: dict[str, Any], element_bytes: int,
    resting: int = 0,
) -> RankMemory:  # fmt: skip
    """Bytes of one rank. `zero` is the `zero_optimization` block that the run would use; `activations` in bytes.

    `resting` elements of the weights are of encoders that do not run, and lie in host memory below stage 3.
    """
    stage, n, learn = choice.stage, num_ranks, census.trainable
    small = min(_persistent(census, zero), int(zero.get("stage3_model_persistence_threshold", 0)))
    whole = census.total * element_bytes
    weights = whole - resting * element_bytes if stage < 3 else 0 if choice.offload_parameters else whole // n
    gradients = learn * (element_bytes + 4) if stage < 2 else 4 * learn // n
    # Weights in fp32 without ZeRO are their own master copy.
    state = 8 if stage == 0 and element_bytes == 4 else 12
    optimizer = state * learn // (n if stage >= 1 else 1)
    if choice.offload_optimizer:
        optimizer, gradients = 0, 0 if stage >= 2 else gradients
    gathered = 0
    if stage == 3:
        gathered = element_bytes * (small if n > 1 or choice.offload_parameters else 0)
        gathered += element_bytes * _live(census, zero) if n > 1 or choice.offload_parameters else 0
    buckets = 0 if stage == 0 else _bucket_bytes(zero, choice, element_bytes)
    held = weights + gradients + optimizer + activations + buckets + gathered + census.buffer_bytes
    return RankMemory(
        weights=weights + census.buffer_bytes, gradients=gradients, optimizer=optimizer, activations=activations,
        buckets=buckets, gathered=gathered, reserve=round(RESERVE * held), context=CONTEXT_BYTES,
    )  # fmt: skip


def _persistent(census: Census, zero: dict[str, Any]) -> int:
    """Elements of weights that are below stage 3's persistence threshold and stay whole."""
    threshold = int(zero.get("stage3_param_persistence_threshold", 0))
    return sum(count for count in census.small if count < threshold)


def _live(census: Census, zero: dict[str, Any]) -> int:
    """Elements whole at once at the worst moment: the head and what is live or fetched ahead of it, and one layer's copy.

    DeepSpeed keeps up to `stage3_max_live_parameters` whole, what it fetches ahead included, and joins a gathered leaf
    module's shares by copying them (Source: `partitioned_param_coordinator.py`, `AllGatherCoalescedHandle.wait`).
    """
    largest = max(census.head, census.decoder_layer)
    ahead = int(zero["stage3_prefetch_bucket_size"]) + 2 * census.decoder_layer
    live = min(int(zero["stage3_max_live_parameters"]), largest + ahead)
    return min(census.total, max(live, largest)) + min(census.total, largest)


def _bucket_bytes(zero: dict[str, Any], choice: Choice, element_bytes: int) -> int:
    """Bytes of the flat buffers that gradients are reduced in; two where reducing overlaps with computing.

    Stages 1 and 2 gather updated weights in pieces of `allgather_bucket_size`, when no activation is held: not counted.
    Stage 1 in bf16 goes by another optimizer, which reduces what it has added up when the passes are over; with offload
    it has buckets of fp32 (Source: `engine._do_optimizer_sanity_check`, `stage_1_and_2._gradient_reduction_buffer_dtype`).
    """
    size = int(zero["reduce_bucket_size"])
    if choice.stage == 3:
        return size * element_bytes
    if choice.stage == 1 and element_bytes == 2 and not choice.offload_optimizer:
        return 0
    return size * (2 if zero.get("overlap_comm") else 1) * (4 if choice.stage == 1 else element_bytes)


def host_bytes(census: Census, choice: Choice, num_ranks: int, *, element_bytes: int) -> dict[str, int]:
    """Host memory of all ranks of one machine, in bytes, by use; beside the data's own.

    Pinned: master weights and moments (12 bytes a learned weight) and their gradients (4), and under stage 3's offload
    of weights the weights themselves. 4 GiB a rank are Python, torch, CUDA libraries and loaders: an estimate.
    """
    rows = {"processes": num_ranks * 4 * 2**30}
    if choice.offload_optimizer:
        rows["optimizer and gradients"] = 16 * census.trainable
    if choice.offload_parameters:
        rows["weights"] = element_bytes * census.total
    return rows


def checkpoint_bytes(census: Census, stage: ZeroStage, *, element_bytes: int) -> tuple[int, int]:
    """Bytes of one checkpoint and of the frozen weights, which a run writes once (Source: `DeepSpeedEngine.saved_bytes`)."""
    learn, frozen = census.trainable, census.total - census.trainable
    return learn * (12 + (element_bytes if stage < 3 else 0)) + census.buffer_bytes, frozen * element_bytes
