"""Why `deepspeed_config` writes what it writes: one sentence a key, shown by `init-config --explain`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cadtrain.config.deepspeed_schema import DeepSpeedConfig

REASONS: dict[str, str] = {
    "train_batch_size": "Micro-batch × accumulation steps × GPUs, as DeepSpeed checks it. Samples a step are counted by cadtrain.",
    "train_micro_batch_size_per_gpu": "A micro-batch is one pack of tokens, whatever number of samples it holds.",
    "gradient_accumulation_steps": "cadtrain marks the last pack of a step itself: packs a step differ from step to step.",
    "managed_gradient_accumulation": "Lets cadtrain mark that boundary.",
    "steps_per_print": "Never: cadtrain writes the metrics.",
    "gradient_clipping": "Global norm of the gradient. Written out because DeepSpeed's default moved from 0 to 1.0 in 0.19.3.",
    "prescale_gradients": "Gradients are divided after the reduction: no underflow.",
    "gradient_predivide_factor": "Used only with prescale_gradients.",
    "gradient_allreduce_op": "The loss is weighted so that the mean over ranks is the mean over all target tokens.",
    "communication_data_type": "The weights' own type; NCCL adds up half-precision inputs in fp32.",
    "zero_allow_untested_optimizer": "Not needed: torch's AdamW is one that DeepSpeed knows.",
    "zero_force_ds_cpu_optimizer": "cadtrain hands in the optimizer: DeepSpeed's CPU Adam for states on the host of a GPU, torch's AdamW otherwise.",
    "bf16.enabled": "bfloat16 weights and activations, fp32 master weights.",
    "bf16.immediate_grad_update": "Gradients are added to their fp32 sums after each backward pass.",
    "bf16.check_grad_overflow": "A step with a gradient that is not finite is skipped, and counted in the metrics.",
    "bf16.bf16_master_weights_and_grads": "Master weights stay fp32: small updates would be lost.",
    "bf16.bf16_optimizer_states": "Adam's moments stay fp32.",
    "fp16.enabled": "bf16 needs no loss scaling.",
    "data_types.grad_accum_dtype": "Sums of many packs lose small gradients in bf16. ZeRO-0 can only use the weights' type; cadtrain adds up in fp32 itself there.",
    "data_types.keep_in_fp32_modules": "Rotary frequencies: in bf16 distant positions would fall together.",
    "zero_optimization.stage": "The lowest stage that fits is the fastest; 3 shares weights, gradients and optimizer states.",
    "zero_optimization.contiguous_gradients": "One buffer for gradients: no fragmentation in the backward pass.",
    "zero_optimization.reduce_scatter": "Each rank receives only the part that it owns.",
    "zero_optimization.reduce_bucket_size": "Elements of one decoder layer, between 1e6 and 2e8: payloads of 64 MB and more keep the links busy; costs up to 4.5 × this in memory.",
    "zero_optimization.overlap_comm": "Reduce while the backward pass goes on; its faults of old are mended since DeepSpeed 0.19.3.",
    "zero_optimization.allgather_partitions": "One all-gather instead of a broadcast a rank.",
    "zero_optimization.allgather_bucket_size": "As reduce_bucket_size.",
    "zero_optimization.use_multi_rank_bucket_allreduce": "Few large reductions instead of many small ones.",
    "zero_optimization.compute_grad_norm": "Clipping and the metrics need the norm.",
    "zero_optimization.load_from_fp32_weights": "Resume without loss of precision.",
    "zero_optimization.elastic_checkpoint": "No longer works in ZeRO-3; cadtrain resumes on other GPU counts by itself.",
    "zero_optimization.offload_param.device": "Weights live in host memory between uses: slow, for models that fit no other way.",
    "zero_optimization.offload_param.pin_memory": "Full transfer speed. Set false on hosts with a tight `ulimit -l`.",
    "zero_optimization.offload_param.nvme_path": "Folder on a local NVMe device; a network file system is far too slow.",
    "zero_optimization.offload_param.buffer_count": "Buffers for weights on their way from NVMe.",
    "zero_optimization.offload_param.buffer_size": "Elements of each: no parameter may be larger. At least one decoder layer.",
    "zero_optimization.offload_param.max_in_cpu": "Elements that stay in host memory.",
    "zero_optimization.offload_optimizer.nvme_path": "Folder on a local NVMe device.",
    "zero_optimization.offload_optimizer.buffer_count": "Weight, gradient and Adam's two moments: one each.",
    "zero_optimization.offload_optimizer.pipeline_read": "The next tile is read while the current one is updated.",
    "zero_optimization.offload_optimizer.pipeline_write": "The last tile is written meanwhile.",
    "aio.block_size": "Bytes a request: 1 MiB fills an NVMe device.",
    "aio.queue_depth": "Requests in flight.",
    "aio.intra_op_parallelism": "One thread an operation; `ds_nvme_tune` measures whether more help.",
    "aio.single_submit": "Requests are submitted together.",
    "aio.overlap_events": "Requests are submitted while others complete.",
    "aio.use_gds": "GPUDirect Storage needs a driver of its own.",
    "zero_optimization.offload_optimizer.device": "12 bytes a parameter move to host memory; the update runs on the CPU.",
    "zero_optimization.offload_optimizer.pin_memory": "Full transfer speed. Set false on hosts with a tight `ulimit -l`.",
    "zero_optimization.offload_optimizer.ratio": "All of them.",
    "zero_optimization.sub_group_size": "Elements updated at once: 1e9 is one or few fused steps; 1e8 with offload, so that the transfers overlap.",
    "zero_optimization.stage3_prefetch_bucket_size": "Two decoder layers, between 1e6 and 5e8: the next layer arrives while this one is computed.",
    "zero_optimization.stage3_param_persistence_threshold": "100 × hidden size, at most 1e6: norms, biases and adapters up to rank 32 stay whole, which removes the many tiny gathers that make LoRA slow under ZeRO-3.",
    "zero_optimization.stage3_model_persistence_threshold": "At most this many elements stay whole in total: 2 GB in bf16.",
    "zero_optimization.stage3_max_live_parameters": "Gathered elements on a GPU at once: an 8B model's embedding and a few layers.",
    "zero_optimization.stage3_max_reuse_distance": "Weights needed again soon are not gathered twice.",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "`cadtrain convert` gathers offline, in bounded memory.",
    "zero_optimization.stage3_module_granularity_threshold": "Off: leaf modules do this by name.",
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": "Off: it corrupted weights before DeepSpeed 0.19.4.",
    "zero_optimization.stage3_allgather_sequential": "Off: it saves memory and costs speed.",
    "zero_optimization.ignore_unused_parameters": "A component that does not learn in a stage has no gradients.",
    "zero_optimization.round_robin_gradients": "Off: it changes the order of parameters in a checkpoint, which could then not be resumed without it.",
    "zero_optimization.parameter_alignment": "Off: costs memory.",
    "zero_optimization.zero_hpz_partition_size": "1 on one node; the GPUs of a node when there are several nodes (costs a second copy of the weights).",
    "zero_optimization.zero_quantized_weights": "Off: NVLink does not need it, and it rounds the weights.",
    "zero_optimization.zero_quantized_nontrainable_weights": "Off; on PCIe with LoRA worth a try.",
    "zero_optimization.zero_quantized_gradients": "Off: it rounds the gradients.",
    "zero_optimization.memory_efficient_linear": "No gathered weight is kept for the backward pass.",
    "zero_optimization.override_module_apply": "Initialisers see whole weights.",
    "zero_optimization.log_trace_cache_warnings": "Off: every stage change would log.",
    "zero_optimization.enable_sanity_checks": "Off: for debugging DeepSpeed.",
    "zero_optimization.leaf_module.classes": "cadtrain marks every decoder and encoder layer in code: one gather a layer is up to 1.9 × faster.",
    "zero_optimization.leaf_module.names": "As above.",
    "zero_optimization.leaf_module.name_suffixes": "As above.",
    "checkpoint.tag_validation": "Ranks that disagree on a checkpoint's name stop instead of writing two halves.",
    "checkpoint.load_universal": "`--resume` switches it on for the load alone.",
    "checkpoint.use_node_local_storage": "All ranks write into the run folder.",
    "checkpoint.parallel_write.pipeline_stage": "There are no pipeline stages.",
    "checkpoint.checkpoint_serialization": "torch's zip format, which can be read piece by piece.",
    "timers.throughput.enabled": "Off: cadtrain measures, without a synchronisation a step.",
    "timers.throughput.synchronized": "As above.",
    "wall_clock_breakdown": "Off: it synchronises the device several times a step.",
    "memory_breakdown": "Off: it synchronises the device.",
    "dump_state": "Off.",
    "disable_python_gc": "Off: the collector is Python's own.",
}
"""The reason of each key that `build_deepspeed_config` writes."""


SINCE: dict[str, str] = {
    "managed_gradient_accumulation": "in ZeRO-3 since 0.19.4, with offload since 0.19.5",
    "gradient_clipping": "default 1.0 since 0.19.3, 0 before",
    "disable_python_gc": "since 0.19.7",
    "bf16.check_grad_overflow": "default true since 0.19.3, false before",
    "data_types.keep_in_fp32_modules": "since 0.19.8",
    "zero_optimization.overlap_comm": "default true in stage 3 only; sound since 0.19.3",
    "zero_optimization.elastic_checkpoint": "no longer in stage 3 since 0.19.3",
    "zero_optimization.offload_param.pin_memory": "default true since 0.19.5, false before",
    "zero_optimization.offload_optimizer.pin_memory": "default true since 0.19.5, false before",
    "zero_optimization.leaf_module.classes": "since 0.18.0",
    "zero_optimization.leaf_module.names": "since 0.18.0",
    "zero_optimization.leaf_module.name_suffixes": "since 0.18.0",
    "zero_optimization.stage3_allgather_sequential": "since 0.18.5",
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": "sound since 0.19.4",
}
"""DeepSpeed versions in which a key appeared or its default moved."""


def explain(config: DeepSpeedConfig) -> list[tuple[str, Any, str]]:
    """(key, value, why) for every value of `config`, in the order of the file."""
    return [(key, value, REASONS.get(key, "From your file.")) for key, value in flatten(config.to_dict())]


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings with its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
