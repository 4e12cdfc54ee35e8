"""Where one GPU's memory goes under a choice of ZeRO stage, offload and recomputation: pure arithmetic over counts.

Legend: P weights, T weights that learn, N ranks. Bytes a rank in bf16, with fp32 master weights and the gradients that
cadtrain's engine adds up in fp32 (Source: ZeRO, arXiv 1910.02054, section 3; `train.engine`; DeepSpeed 0.19.8):

    stage   weights   gradients   optimizer
    0       2P        4T          12T
    1       2P        2T + 4T     12T/N
    2       2P        4T/N        12T/N
    3       2P/N      4T/N        12T/N

Stages 2 and 3 reduce a gradient as soon as a bucket is full, so only shares of it and the buckets are held. Stage 0 holds
2T more when the passes are over. The worst moment is not always that of most activations: see `_moments`. With
offload the optimizer's share lives in host memory; at stages 2 and 3 that of the gradients too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cadtrain.config.recompute import NO_RECOMPUTE, Recompute
from cadtrain.gpu_memory import CONTEXT_BYTES

if TYPE_CHECKING:
    from cadtrain.model.census import Census

ZeroStage = Literal[0, 1, 2, 3]
STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)

RESERVE: dict[ZeroStage, float] = {0: 0.01, 1: 0.01, 2: 0.01, 3: 0.05}
"""Share of what the allocator hands out that it holds beside it, with expandable segments: 0.1 to 1.3 % measured at stages 0 and
2, 4.3 to 5.3 % at stage 3, whose gathered weights are handed from stream to stream (docs/plan.md)."""


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
    """Peak of the forward and the backward pass, of the costliest curriculum stage; 0 where another moment is the worst."""
    buckets: int
    """Flat buffers of gradients on their way between ranks, at stages 1 to 3, and copies that are made for it."""
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
    """Bytes of one rank at the worst of a step's moments.

    `zero` is the `zero_optimization` block that the run would use; `activations` in bytes. `resting` elements of the
    weights are of encoders that do not run, and lie in host memory below stage 3.
    """
    stage, n = choice.stage, num_ranks
    whole = census.total * element_bytes
    weights = whole - resting * element_bytes if stage < 3 else 0 if choice.offload_parameters else whole // n
    # Weights in fp32 without ZeRO are their own master copy.
    state = 8 if stage == 0 and element_bytes == 4 else 12
    optimizer = 0 if choice.offload_optimizer else state * census.trainable // (n if stage >= 1 else 1)
    moments = _moments(census, choice, n, activations, zero, element_bytes)
    gradients, activations, buckets, gathered = max(moments, key=sum)
    held = weights + optimizer + gradients + activations + buckets + gathered + census.buffer_bytes
    return RankMemory(
        weights=weights + census.buffer_bytes, gradients=gradients, optimizer=optimizer, activations=activations,
        buckets=buckets, gathered=gathered, reserve=round(RESERVE[stage] * held), context=CONTEXT_BYTES,
    )  # fmt: skip


Moment = tuple[int, int, int, int]
"""Bytes of gradients, activations, buckets and gathered weights."""


def _moments(
    census: Census, choice: Choice, n: int, activations: int, zero: dict[str, Any], element_bytes: int
) -> list[Moment]:
    """What is held beside weights and optimizer states: while activations are at their peak, and at later moments.

    Found by listing every tensor of a step in two ranks (`tests.plan.measure_peaks` counts them on the CPU).
    """
    learn, e = census.trainable, element_bytes
    if choice.stage == 0:
        # fp32 sums of the packs before; the pack's own gradients take the place of its activations, layer by layer, and are
        # then what the sums are handed over in. DeepSpeed makes fp32 copies of these when the sums are gone.
        return [(4 * learn, activations, 0, 0), ((4 + e) * learn, 0, 0, 0)]
    buckets = _bucket_bytes(census, zero, choice, e)
    if choice.stage == 1:
        # Gradients of the weights' own type stay from pack to pack. Behind the last one the fp32 sums are reduced in flat
        # copies, and copies of these in the type of communication.
        held = (4 + e) * learn
        flat = 0 if _has_buckets(choice, e) else (4 + e) * min(learn, _REDUCED_AT_ONCE + census.head)
        return [(held, activations, buckets, 0), (held, 0, buckets + flat, 0)]
    shares = 0 if choice.offload_optimizer else 4 * learn // n
    if choice.stage == 2:
        # The embedding's gradient comes last. Larger than a bucket, it is reduced in a flat copy, which is turned to fp32 in
        # order to be added.
        copies = 2 * e + (0 if choice.offload_optimizer else 4)
        is_large = not census.lora and census.head > int(zero["reduce_bucket_size"])
        return [(shares, activations, buckets, 0), (shares, 0, buckets + is_large * copies * census.head, 0)]
    small = live = 0
    if n > 1 or choice.offload_parameters:
        small = e * min(_persistent(census, zero), int(zero.get("stage3_model_persistence_threshold", 0)))
        live = e * _live(census, zero)
    # The update works on fp32 copies of one sub-group's gradients.
    copies = 0 if choice.offload_optimizer else 4 * min(learn // n, int(zero.get("sub_group_size", learn)))
    return [(shares, activations, buckets, small + live), (shares + copies, 0, buckets, small)]


_REDUCED_AT_ONCE = 500_000_000
"""Elements after which DeepSpeed's plain all-reduce sends what it has joined (Source: `engine.allreduce_no_retain`)."""


def _persistent(census: Census, zero: dict[str, Any]) -> int:
    """Elements of weights that are below stage 3's persistence threshold and stay whole."""
    threshold = int(zero.get("stage3_param_persistence_threshold", 0))
    return sum(count for count in census.small if count < threshold)


def _live(census: Census, zero: dict[str, Any]) -> int:
    """Elements whole at once at the worst moment: the head and what is live or fetched ahead of it, and one layer's copy.

    DeepSpeed does not let go of the last layers' weights, which the backward pass wants again before
    `stage3_max_reuse_distance` others; it fetches ahead up to `stage3_max_live_parameters`, and joins a gathered leaf module's
    shares by copying them (Source: `partitioned_param_coordinator.py`, `AllGatherCoalescedHandle.wait`).
    """
    largest = max(census.head, census.decoder_layer)
    kept = largest + max(0, int(zero.get("stage3_max_reuse_distance", 0)) - largest) // 2
    ahead = int(zero["stage3_prefetch_bucket_size"]) + 2 * census.decoder_layer
    live = max(kept, min(int(zero["stage3_max_live_parameters"]), kept + ahead))
    return min(census.total, live) + min(census.total, largest)


def _has_buckets(choice: Choice, element_bytes: int) -> bool:
    """Whether gradients are reduced in buckets while they are made.

    Stage 1 in bf16 goes by another optimizer, which reduces what it has added up when the passes are over
    (Source: `engine._do_optimizer_sanity_check`).
    """
    return choice.stage >= 2 or (choice.stage == 1 and (element_bytes == 4 or choice.offload_optimizer))


def _bucket_bytes(census: Census, zero: dict[str, Any], choice: Choice, element_bytes: int) -> int:
    """Bytes of the flat buffers that gradients are reduced in; two where reducing overlaps with computing.

    Stages 1 and 2 gather updated weights in pieces of `allgather_bucket_size`, when no activation is held: not counted.
    Stage 1 with buckets has them in fp32, and with offload both keep room on the device for the largest gradient
    (Source: `stage_1_and_2._gradient_reduction_buffer_dtype`, `temp_grad_buffer_for_gpu_offload`).
    """
    size = int(zero["reduce_bucket_size"])
    if choice.stage == 3:
        return size * element_bytes
    if not _has_buckets(choice, element_bytes):
        return 0
    room = element_bytes * census.head if choice.offload_optimizer and not census.lora else 0
    return room + size * (2 if zero.get("overlap_comm") else 1) * (4 if choice.stage == 1 else element_bytes)


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
