"""A strict mirror of the DeepSpeed 0.19 configuration: every key that a trainer can use, with its default.

DeepSpeed itself ignores unknown top-level keys, reads several blocks without checks, and drops a value of `"auto"`
in silence. Here an unknown key, a wrong type or a wrong value is a fault. A key that is written is kept, one that is
not stays out of the JSON, so a dump says exactly what was decided.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cadtrain.config.deepspeed_blocks import (
    ActivationCheckpointingBlock,
    AioBlock,
    Bf16Block,
    CheckpointBlock,
    CometBlock,
    CommsLoggerBlock,
    CompileBlock,
    DataTypesBlock,
    FlopsProfilerBlock,
    FolderMonitorBlock,
    Fp16Block,
    OptimizerBlock,
    SchedulerBlock,
    TimersBlock,
    TorchAutocastBlock,
    WandbBlock,
)
from cadtrain.config.deepspeed_zero import Block, DataType, Whole, ZeroBlock


class DeepSpeedConfig(Block):
    """A DeepSpeed configuration file."""

    train_batch_size: Whole | None = Field(None, gt=0)
    """Micro-batch x accumulation steps x ranks; DeepSpeed derives it when it is left out."""
    train_micro_batch_size_per_gpu: Whole | None = Field(None, gt=0)
    """Samples a rank sees at once."""
    gradient_accumulation_steps: Whole | None = Field(None, gt=0)
    """Micro-batches an optimizer step."""
    managed_gradient_accumulation: bool = True
    """DeepSpeed keeps track of where an optimizer step ends."""
    steps_per_print: Whole | None = Field(None, gt=0)
    """Steps between lines of DeepSpeed's own log."""
    optimizer: OptimizerBlock | None = None
    """The optimizer, when DeepSpeed builds it."""
    scheduler: SchedulerBlock | None = None
    """The schedule, when DeepSpeed runs it."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 for never."""
    prescale_gradients: bool = False
    """Divide gradients before they are reduced."""
    gradient_predivide_factor: float = 1.0
    """By how much."""
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    """How the gradients of ranks are joined."""
    communication_data_type: DataType | None = None
    """Type in which gradients are reduced. DeepSpeed's default: the weights' own type."""
    disable_allgather: bool = False
    """Broadcast instead of all-gather."""
    zero_allow_untested_optimizer: bool = False
    """Allow optimizers that DeepSpeed does not know under ZeRO."""
    zero_force_ds_cpu_optimizer: bool = True
    """Refuse other optimizers than DeepSpeed's own on the host."""
    bf16: Bf16Block = Bf16Block()
    """bfloat16."""
    fp16: Fp16Block = Fp16Block()
    """float16."""
    torch_autocast: TorchAutocastBlock | None = None
    """PyTorch's autocast."""
    data_types: DataTypesBlock = DataTypesBlock()
    """Types of gradients, weights and buffers."""
    zero_optimization: ZeroBlock = ZeroBlock()
    """ZeRO."""
    activation_checkpointing: ActivationCheckpointingBlock | None = None
    """DeepSpeed's own recomputation."""
    aio: AioBlock | None = None
    """NVMe transfers."""
    checkpoint: CheckpointBlock = CheckpointBlock()
    """Checkpoints."""
    comms_logger: CommsLoggerBlock | None = None
    """Log of collectives."""
    flops_profiler: FlopsProfilerBlock | None = None
    """Count of operations."""
    tensorboard: FolderMonitorBlock | None = None
    """DeepSpeed's own TensorBoard monitor."""
    wandb: WandbBlock | None = None
    """DeepSpeed's own Weights & Biases monitor."""
    csv_monitor: FolderMonitorBlock | None = None
    """DeepSpeed's own CSV monitor."""
    comet: CometBlock | None = None
    """DeepSpeed's own Comet monitor."""
    compile: CompileBlock | None = None
    """DeepCompile."""
    timers: TimersBlock = TimersBlock()
    """Timers."""
    wall_clock_breakdown: bool = False
    """Time forward, backward and step; synchronises the device."""
    memory_breakdown: bool = False
    """Log memory; synchronises the device."""
    dump_state: bool = False
    """Print the engine's state at the start."""
    disable_python_gc: bool = False
    """Switch Python's cyclic garbage collection off."""
    dataloader_drop_last: bool = False
    """For DeepSpeed's own data loader."""
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    """Level of DeepSpeed's log."""

    def to_dict(self) -> dict[str, Any]:
        """The keys that were written, as plain values for JSON."""
        return self.model_dump(mode="json", exclude_unset=True)
