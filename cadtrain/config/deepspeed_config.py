"""The DeepSpeed configuration that cadtrain writes: complete, every value explicit, no "auto".

cadtrain builds the optimizer and owns the learning rates, counts samples itself, and marks decoder layers as ZeRO-3
leaf modules in code; so there is no `optimizer`, no `scheduler`, and a micro-batch of one (a pack of tokens). The reason for each
value is in `deepspeed_reasons`. Source of the sizes: measurements of ZeRO-3 with leaf modules on NVLink nodes, where
payloads below 64 MB leave the links idle.
"""

from __future__ import annotations

from typing import Any, Literal

from cadtrain.config.deepspeed_lint import merge_user_file
from cadtrain.config.deepspeed_schema import DeepSpeedConfig
from cadtrain.config.sections import RunConfig
from cadtrain.errors import UsageError

Precision = Literal["bf16", "fp32"]
ZeroStage = Literal[0, 1, 2, 3]

DEFAULT_HIDDEN_SIZE = 4096
"""Width of an 8B decoder, for files written without a model in view."""

NEVER = 1_000_000_000
"""A number of steps that no run reaches."""

_SMALLEST_BUCKET = 1_000_000
_LARGEST_REDUCE_BUCKET = 200_000_000
_LARGEST_PREFETCH_BUCKET = 500_000_000
_LARGEST_PERSISTENT = 1_000_000
_BILLION = 1_000_000_000
_AIO: dict[str, Any] = {
    "block_size": 1_048_576, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False, "overlap_events": True,
    "use_gds": False,
}  # fmt: skip


def build_deepspeed_config(
    *,
    zero_stage: int,
    world_size: int | None = None,
    precision: Precision = "bf16",
    gradient_clipping: float = 1.0,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    nvme_path: str | None = None,
    hidden_size: int = DEFAULT_HIDDEN_SIZE,
    layer_params: int | None = None,
    reduce_bucket_size: int | None = None,
    prefetch_bucket_size: int | None = None,
    persistence_threshold: int | None = None,
) -> DeepSpeedConfig:
    """A complete configuration.

    `world_size` None leaves `train_batch_size` out, and the file fits any number of ranks. `hidden_size` and
    `layer_params` (elements of one decoder layer; default 12 x hidden_size^2) size the buckets, unless given. With
    `nvme_path` what is offloaded goes into that folder instead of host memory (stage 3).
    Raises `UsageError` for combinations that DeepSpeed has not.
    """
    _check_combination(
        zero_stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters, world_size=world_size
    )
    if nvme_path is not None and (zero_stage != 3 or not (offload_optimizer or offload_parameters)):
        raise UsageError(
            f"offload to NVMe needs ZeRO stage 3, found stage {zero_stage}.",
            hint="Take stage 3, or offload to host memory.",
        )
    layer = layer_params if layer_params is not None else 12 * hidden_size**2
    reduce = reduce_bucket_size or _within(layer, _SMALLEST_BUCKET, _LARGEST_REDUCE_BUCKET)
    values: dict[str, Any] = {
        **({"train_batch_size": world_size} if world_size is not None else {}),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": True,
        "gradient_clipping": float(gradient_clipping),
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "communication_data_type": precision,
        **_precision_blocks(precision, zero_stage),
        "zero_optimization": {
            "stage": zero_stage,
            **(_shared_zero_values(reduce) if zero_stage > 0 else {}),
            **(_stage_1_and_2_values(reduce) if zero_stage in (1, 2) else {}),
            **_offload_blocks(
                offload_optimizer=offload_optimizer,
                offload_parameters=offload_parameters,
                nvme_path=nvme_path,
                layer=layer,
            ),
        },
        **({"aio": dict(_AIO)} if nvme_path is not None else {}),
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {
            "tag_validation": "Fail",
            "load_universal": False,
            "use_node_local_storage": False,
            "parallel_write": {"pipeline_stage": False},
            "checkpoint_serialization": True,
        },
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "disable_python_gc": False,
        "dump_state": False,
    }
    if zero_stage == 3:
        prefetch = (
            _within(2 * layer, _SMALLEST_BUCKET, _LARGEST_PREFETCH_BUCKET)
            if prefetch_bucket_size is None
            else prefetch_bucket_size
        )
        persistent = (
            min(100 * hidden_size, _LARGEST_PERSISTENT) if persistence_threshold is None else persistence_threshold
        )
        values["zero_optimization"] |= _stage_3_values(
            prefetch, persistent, offload=offload_optimizer or offload_parameters
        )
    return DeepSpeedConfig.model_validate(values)


def deepspeed_config_for(
    config: RunConfig,
    *,
    zero_stage: int,
    world_size: int,
    precision: Precision,
    hidden_size: int,
    layer_params: int | None = None,
) -> DeepSpeedConfig:
    """The configuration of a run: its `zero` and `optim` sections, and `zero.config_file` laid over them.

    `zero_stage` and `precision` are the decided ones (`auto` in the run configuration is resolved by the caller).
    Raises `ConfigError` with all faults of the user's file.
    """
    zero = config.zero
    built = build_deepspeed_config(
        zero_stage=zero_stage,
        world_size=world_size,
        precision=precision,
        gradient_clipping=config.optim.gradient_clipping,
        offload_optimizer=zero.offload_optimizer,
        offload_parameters=zero.offload_parameters,
        hidden_size=hidden_size,
        layer_params=layer_params,
        reduce_bucket_size=zero.reduce_bucket_size,
        prefetch_bucket_size=zero.prefetch_bucket_size,
        persistence_threshold=zero.persistence_threshold,
    )
    return built if zero.config_file is None else merge_user_file(zero.config_file, built)


def _check_combination(
    stage: int, *, offload_optimizer: bool, offload_parameters: bool, world_size: int | None
) -> None:
    if stage not in (0, 1, 2, 3):
        raise UsageError(f"ZeRO stage {stage} does not exist.", hint="Stages are 0, 1, 2 and 3.")
    if world_size is not None and world_size < 1:
        raise UsageError(f"{world_size} GPUs are none.", hint="Give 1 or more.")
    if offload_parameters and stage != 3:
        raise UsageError(
            f"offload of parameters needs ZeRO stage 3, found stage {stage}.",
            hint="Take stage 3, or offload the optimizer only.",
        )
    if offload_optimizer and stage == 0:
        raise UsageError(
            "offload of the optimizer needs ZeRO stage 1, 2 or 3, found stage 0.", hint="Take stage 1 or more."
        )


def _precision_blocks(precision: Precision, stage: int) -> dict[str, Any]:
    # DeepSpeed refuses another accumulation type than the weights' own where there is no ZeRO optimizer to hold it.
    accumulate = precision if stage == 0 else "fp32"
    return {
        "bf16": {
            "enabled": precision == "bf16",
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": accumulate, "keep_in_fp32_modules": ["inv_freq"]},
    }


def _shared_zero_values(reduce_bucket_size: int) -> dict[str, Any]:
    return {
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": reduce_bucket_size,
        "ignore_unused_parameters": True,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
    }


def _stage_1_and_2_values(reduce_bucket_size: int) -> dict[str, Any]:
    return {
        "allgather_partitions": True,
        "allgather_bucket_size": reduce_bucket_size,
        "use_multi_rank_bucket_allreduce": True,
        "compute_grad_norm": True,
        # Another order of parameters in the flat buffers: a checkpoint written with it cannot be read without it.
        "round_robin_gradients": False,
        "parameter_alignment": False,
    }


def _stage_3_values(prefetch: int, persistent: int, *, offload: bool) -> dict[str, Any]:
    return {
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_param_persistence_threshold": persistent,
        "stage3_model_persistence_threshold": _BILLION,
        "stage3_max_live_parameters": _BILLION,
        "stage3_max_reuse_distance": _BILLION,
        "sub_group_size": _BILLION // 10 if offload else _BILLION,
        "stage3_gather_16bit_weights_on_model_save": False,
        "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False,
        "stage3_allgather_sequential": False,
        "memory_efficient_linear": True,
        "override_module_apply": True,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "leaf_module": {"classes": [], "names": [], "name_suffixes": []},
        "log_trace_cache_warnings": False,
        "enable_sanity_checks": False,
    }


def _offload_blocks(
    *, offload_optimizer: bool, offload_parameters: bool, nvme_path: str | None, layer: int
) -> dict[str, Any]:
    where: dict[str, Any] = {"device": "cpu"} if nvme_path is None else {"device": "nvme", "nvme_path": nvme_path}
    blocks: dict[str, Any] = {}
    if offload_optimizer:
        # An Adam state is a weight, two moments and a gradient: each of them needs a buffer of its own on the way.
        buffers = {} if nvme_path is None else {"buffer_count": 4, "pipeline_read": True, "pipeline_write": True}
        blocks["offload_optimizer"] = {**where, "pin_memory": True, **buffers, "ratio": 1.0}
    if offload_parameters:
        size = _within(layer, _BILLION // 10, _BILLION)
        buffers = {} if nvme_path is None else {"buffer_count": 5, "buffer_size": size, "max_in_cpu": _BILLION}
        blocks["offload_param"] = {**where, "pin_memory": True, **buffers}
    return blocks


def _within(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
