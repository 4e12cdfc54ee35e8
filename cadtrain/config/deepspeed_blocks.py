"""The smaller blocks of a DeepSpeed configuration: precision, checkpoints, offload transfers, logs, profiling."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cadtrain.config.deepspeed_zero import Block, DataType, Whole


class Bf16Block(Block):
    """bfloat16 weights and activations with fp32 master weights."""

    enabled: bool = False
    """Train in bfloat16."""
    immediate_grad_update: bool = False
    """Add each gradient to its fp32 sum at once instead of after the backward pass (ZeRO-1)."""
    check_grad_overflow: bool = True
    """Skip a step whose gradients are not finite."""
    bf16_master_weights_and_grads: bool = False
    """Master weights in bfloat16."""
    bf16_optimizer_states: bool = False
    """Optimizer states in bfloat16."""


class Fp16Block(Block):
    """float16 with loss scaling."""

    enabled: bool = False
    """Train in float16."""
    auto_cast: bool = False
    """Cast inputs to float16."""
    loss_scale: float = Field(0.0, ge=0)
    """Fixed loss scale; 0 adapts it."""
    initial_scale_power: Whole = 16
    """The first loss scale is 2 to this power."""
    loss_scale_window: Whole = Field(1000, gt=0)
    """Steps without overflow before the scale rises."""
    hysteresis: Whole = 2
    """Overflows before the scale falls."""
    consecutive_hysteresis: bool = False
    """Count only overflows in a row."""
    min_loss_scale: Whole = Field(1, gt=0)
    """Smallest loss scale."""
    fp16_master_weights_and_grads: bool = False
    """Master weights in float16 (host Adam only)."""


class TorchAutocastBlock(Block):
    """PyTorch's autocast instead of DeepSpeed's precision."""

    enabled: bool = False
    """Use autocast."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Type that it casts to."""
    lower_precision_safe_modules: list[str] | None = None
    """Classes that run in that type."""


class DataTypesBlock(Block):
    """Types of accumulated gradients, weights and buffers."""

    grad_accum_dtype: DataType | None = None
    """Type in which gradients of micro-batches add up. DeepSpeed's default: the weights' own type."""
    param_dtype: DataType | None = None
    """Type of the weights."""
    buffer_dtype: DataType | None = None
    """Type of the buffers."""
    keep_in_fp32_modules: Literal["auto"] | list[str] = "auto"
    """Buffers, by pattern, that stay fp32; here `auto` is a value of its own: the model's own list."""


class ActivationCheckpointingBlock(Block):
    """DeepSpeed's own recomputation; models from transformers use PyTorch's and never look here."""

    partition_activations: bool = False
    """Share saved activations between model-parallel ranks."""
    contiguous_memory_optimization: bool = False
    """Save activations in one buffer."""
    cpu_checkpointing: bool = False
    """Save activations on the host."""
    number_checkpoints: Whole | None = None
    """Number of saved activations."""
    synchronize_checkpoint_boundary: bool = False
    """Synchronise the device at each."""
    profile: bool = False
    """Time it."""


class AioBlock(Block):
    """Asynchronous reads and writes for NVMe offload."""

    block_size: Whole = Field(1_048_576, gt=0)
    """Bytes a request."""
    queue_depth: Whole = Field(8, gt=0)
    """Requests in flight."""
    intra_op_parallelism: Whole = Field(1, gt=0)
    """Threads an operation."""
    single_submit: bool = False
    """Submit requests one by one."""
    overlap_events: bool = True
    """Submit while others complete."""
    use_gds: bool = False
    """GPUDirect Storage."""


class CheckpointWriterBlock(Block):
    """DeepSpeed's checkpoint writers."""

    type: Literal["MOCK", "PYTHON", "FAST"] = "FAST"
    """Which writer."""
    io_buffer_size: Whole = 67_108_864
    """Bytes of its buffer."""
    io_buffer_double: bool = True
    """Two buffers in turn."""
    show_statistics: bool = False
    """Print its speed."""
    data_parallel: Literal["REPLICA", "SOCKET", "MACHINE"] | None = None
    """Who writes replicated data."""
    decoupled: bool = False
    """Write in a process of its own."""
    io_multiplier: Whole = 1
    """Writers a rank."""


class ParallelWriteBlock(Block):
    """Checkpoints of pipeline-parallel models."""

    pipeline_stage: bool = False
    """Each stage writes its own part."""


class CheckpointBlock(Block):
    """How DeepSpeed saves and loads."""

    tag_validation: Literal["Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL"] = "WARN"
    """What happens when ranks disagree on a checkpoint's name."""
    load_universal: bool = False
    """Load a checkpoint in the universal format."""
    use_node_local_storage: bool = False
    """Every node writes to a disk of its own."""
    parallel_write: ParallelWriteBlock = ParallelWriteBlock()
    """Pipeline-parallel writing."""
    checkpoint_serialization: bool = True
    """Write in torch's zip format."""
    writer: CheckpointWriterBlock | None = None
    """Another writer than torch's."""


class CommsLoggerBlock(Block):
    """A log of collectives."""

    enabled: bool = False
    """Record them."""
    verbose: bool = False
    """Log each one."""
    prof_all: bool = True
    """Record all kinds."""
    prof_ops: list[str] = Field(default_factory=list)
    """Kinds to record otherwise."""
    debug: bool = False
    """Add the caller."""


class FlopsProfilerBlock(Block):
    """A count of operations at one step."""

    enabled: bool = False
    """Count them."""
    recompute_fwd_factor: float = 0.0
    """Share of the forward pass that is recomputed."""
    profile_step: Whole = Field(1, ge=0)
    """At which step."""
    module_depth: Whole = -1
    """Depth of the printed tree; -1 the deepest."""
    top_modules: Whole = Field(1, ge=0)
    """Modules printed a level."""
    detailed: bool = True
    """Print every module."""
    output_file: str | None = None
    """File to print to."""


class FolderMonitorBlock(Block):
    """A monitor that writes files."""

    enabled: bool = False
    """Write them."""
    output_path: str = ""
    """Folder."""
    job_name: str = "DeepSpeedJobName"
    """Folder inside it."""


class WandbBlock(Block):
    """DeepSpeed's own Weights & Biases monitor."""

    enabled: bool = False
    """Send metrics."""
    group: str | None = None
    """Group of runs."""
    team: str | None = None
    """Team."""
    project: str = "deepspeed"
    """Project."""


class CometBlock(Block):
    """DeepSpeed's own Comet monitor."""

    enabled: bool = False
    """Send metrics."""
    samples_log_interval: Whole = 100
    """Samples between two."""
    project: str | None = None
    """Project."""
    workspace: str | None = None
    """Workspace."""
    api_key: str | None = None
    """Key; better in the environment."""
    experiment_name: str | None = None
    """Name."""
    experiment_key: str | None = None
    """Key of the experiment."""
    online: bool | None = None
    """Send at once."""
    mode: Literal["get", "create", "get_or_create"] | None = None
    """Start or continue."""


class CompileBlock(Block):
    """DeepCompile: torch.compile with ZeRO inside the graph."""

    deepcompile: bool = False
    """Use it when the engine is compiled."""
    autoep_non_moe: bool = False
    """Compile around expert layers."""
    free_activation: bool = False
    """Free large activations early."""
    free_activation_threshold: Whole = 10_485_760
    """What counts as large, in bytes."""
    offload_activation: bool = False
    """Keep saved activations on the host."""
    offload_activation_pin_memory: bool = True
    """In page-locked memory."""
    offload_opt_states: bool = False
    """Keep optimizer states on the host between steps."""
    double_buffer: bool = True
    """Two communication buffers in turn."""
    symmetric_memory: bool = False
    """Symmetric memory for collectives."""
    debug_log: bool = False
    """Dump graphs."""
    offload_parameters: bool = False
    """Keep weights on the host."""
    sync_before_reduce: bool = False
    """Synchronise before a reduction."""
    sync_after_reduce: bool = False
    """Synchronise after it."""
    sync_before_allgather: bool = False
    """Synchronise before a gather."""
    sync_after_allgather: bool = False
    """Synchronise after it."""
    keep_int_input_tensors: bool = True
    """Keep whole-number inputs when tracing."""
    keep_all_input_tensors: bool = False
    """Keep all inputs when tracing."""
    passes: list[Literal["z1", "z3", "autosp", "autotp"]] | None = None
    """Optimizations to apply."""


class ThroughputTimerBlock(Block):
    """DeepSpeed's throughput timer."""

    enabled: bool = True
    """Measure."""
    synchronized: bool = True
    """Synchronise the device at every measurement."""


class TimersBlock(Block):
    """Timers."""

    throughput: ThroughputTimerBlock = ThroughputTimerBlock()
    """Throughput."""


class OptimizerBlock(Block):
    """An optimizer that DeepSpeed builds."""

    type: str
    """Its name, e.g. AdamW."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Its arguments; DeepSpeed does not check them."""
    legacy_fusion: bool = False
    """For LAMB."""


class SchedulerBlock(Block):
    """A learning-rate schedule that DeepSpeed runs."""

    type: Literal["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
    """Its name."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Its arguments; DeepSpeed does not check them."""
