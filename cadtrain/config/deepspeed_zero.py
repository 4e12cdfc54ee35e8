"""The ZeRO block of a DeepSpeed configuration, and the base of all blocks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 5e8 in JSON is a float


Whole = Annotated[int, BeforeValidator(_whole)]
DataType = Literal["fp32", "fp16", "bf16"]


class Block(BaseModel):
    """Base of all blocks: strict types, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class OffloadParamBlock(Block):
    """Where ZeRO-3 keeps the weights between uses."""

    device: Literal["none", "cpu", "nvme"] = "none"
    """Memory that holds the weights."""
    nvme_path: str | None = None
    """Folder on the NVMe device."""
    buffer_count: Whole = Field(5, ge=0)
    """Buffers for transfers to NVMe."""
    buffer_size: Whole = Field(100_000_000, ge=0)
    """Elements of such a buffer."""
    max_in_cpu: Whole = Field(1_000_000_000, ge=0)
    """Elements kept in host memory when the rest is on NVMe."""
    pin_memory: bool = True
    """Page-locked host memory: full transfer speed; not for hosts with a tight `ulimit -l`."""


class OffloadOptimizerBlock(Block):
    """Where the optimizer states live and are updated."""

    device: Literal["none", "cpu", "nvme"] = "none"
    """Memory that holds the states."""
    nvme_path: str | None = None
    """Folder on the NVMe device."""
    buffer_count: Whole = Field(4, ge=0)
    """Buffers for transfers to NVMe; at least the states of a parameter (Adam: 4)."""
    pin_memory: bool = True
    """Page-locked host memory: full transfer speed; not for hosts with a tight `ulimit -l`."""
    pipeline_read: bool = False
    """Read the next tile from NVMe while the current one is computed."""
    pipeline_write: bool = False
    """Write the last tile to NVMe while the next one is computed."""
    fast_init: bool = False
    """Faster first allocation on NVMe."""
    ratio: float = Field(1.0, ge=0, le=1)
    """Share of the states that is updated on the host (ZeRO-3)."""
    super_offload: bool = False
    """A faster host path for Grace-Hopper machines (ZeRO-3)."""
    cpuadam_cores_perc: float = Field(0.8, ge=0, le=1)
    """Share of the CPU cores for Adam under `super_offload`."""


class LeafModuleBlock(Block):
    """Modules that ZeRO-3 gathers as a whole."""

    classes: list[str] = Field(default_factory=list)
    """By class."""
    names: list[str] = Field(default_factory=list)
    """By full name."""
    name_suffixes: list[str] = Field(default_factory=list)
    """By the end of the name."""


class ZeroBlock(Block):
    """How optimizer states, gradients and weights are shared between ranks."""

    stage: Literal[0, 1, 2, 3] = 0
    """0 nothing is shared, 1 optimizer states, 2 gradients as well, 3 weights as well."""
    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they appear: no fragmentation."""
    reduce_scatter: bool = True
    """Reduce each gradient to the rank that owns it, instead of to all."""
    reduce_bucket_size: Whole = Field(500_000_000, gt=0)
    """Gradient elements that are reduced at once."""
    use_multi_rank_bucket_allreduce: bool = True
    """Join the buckets of several ranks into one reduction (ZeRO-1 and 2)."""
    allgather_partitions: bool = True
    """Gather updated weights by all-gather instead of by broadcasts (ZeRO-1 and 2)."""
    allgather_bucket_size: Whole = Field(500_000_000, ge=0)
    """Weight elements gathered at once (ZeRO-1 and 2)."""
    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass goes on. DeepSpeed's default: only in ZeRO-3."""
    compute_grad_norm: bool = True
    """Compute the global gradient norm in every step."""
    load_from_fp32_weights: bool = True
    """Start master weights from the fp32 copy in a checkpoint."""
    elastic_checkpoint: bool = False
    """An old checkpoint format; no longer works in ZeRO-3."""
    offload_param: OffloadParamBlock | None = None
    """Offload of weights (ZeRO-3)."""
    offload_optimizer: OffloadOptimizerBlock | None = None
    """Offload of optimizer states (ZeRO-1 to 3)."""
    sub_group_size: Whole = Field(1_000_000_000, ge=0)
    """Elements that the optimizer updates at once (ZeRO-3)."""
    stage3_prefetch_bucket_size: Whole = Field(50_000_000, ge=0)
    """Elements gathered ahead of use."""
    stage3_param_persistence_threshold: Whole = Field(100_000, ge=0)
    """Parameters below this many elements stay whole on every rank."""
    stage3_model_persistence_threshold: Whole = Field(9_223_372_036_854_775_807, ge=0)
    """Elements that may stay whole in total."""
    stage3_max_live_parameters: Whole = Field(1_000_000_000, ge=0)
    """Gathered elements that may be on a GPU at once."""
    stage3_max_reuse_distance: Whole = Field(1_000_000_000, ge=0)
    """A parameter needed again within this many elements is not released."""
    stage3_gather_16bit_weights_on_model_save: bool = False
    """Gather whole weights when saving."""
    stage3_module_granularity_threshold: Whole = 0
    """Modules with fewer elements a submodule than this are gathered whole."""
    stage3_use_all_reduce_for_fetch_params: bool = False
    """Gather by all-reduce."""
    stage3_allgather_sequential: bool = False
    """Gather parameter by parameter: less memory, slower."""
    ignore_unused_parameters: bool = True
    """Go on when a parameter got no gradient (ZeRO-2)."""
    legacy_stage1: bool = False
    """The ZeRO-1 of old; DeepSpeed refuses it."""
    round_robin_gradients: bool = False
    """Copy gradients to the host in parallel on all ranks (ZeRO-1 and 2 with offload)."""
    parameter_alignment: bool = False
    """Align parameters to 16 bytes in the flat buffers (ZeRO-1 and 2)."""
    zero_hpz_partition_size: Whole = Field(1, ge=0)
    """Ranks of a node that keep a second copy of the weights."""
    zero_quantized_weights: bool = False
    """Gather weights in 8 bits."""
    zero_quantized_nontrainable_weights: bool = False
    """Hold and gather frozen weights in 8 bits."""
    zero_quantized_gradients: bool = False
    """Reduce gradients in 4 bits."""
    memory_efficient_linear: bool = True
    """Linear layers that keep no gathered weight for the backward pass (ZeRO-3)."""
    pipeline_loading_checkpoint: bool = False
    """Load a checkpoint rank by rank (ZeRO-3)."""
    override_module_apply: bool = True
    """Gather weights inside `nn.Module.apply` (ZeRO-3)."""
    log_trace_cache_warnings: bool = False
    """Log when the order of modules changes and prefetching stops."""
    enable_sanity_checks: bool = False
    """Internal checks, for debugging DeepSpeed."""
    save_muon_momentum_buffer_in_memory: bool = False
    """For the Muon optimizer."""
    leaf_module: LeafModuleBlock = LeafModuleBlock()
    """Modules gathered as a whole."""
