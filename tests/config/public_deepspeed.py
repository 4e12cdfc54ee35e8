"""DeepSpeed configurations as other public trainers ship them, written out by hand with the same keys and values."""

from __future__ import annotations

from typing import Any

AUTO = "auto"

PUBLIC: dict[str, dict[str, Any]] = {
    # The example of the transformers documentation: everything is left to its Trainer.
    "transformers zero3": {
        "fp16": {"enabled": AUTO, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": AUTO},
        "optimizer": {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO}},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": AUTO,
            "stage3_prefetch_bucket_size": AUTO, "stage3_param_persistence_threshold": AUTO, "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": AUTO, "gradient_clipping": AUTO, "steps_per_print": 2000, "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO, "wall_clock_breakdown": False,
    },
    # axolotl's zero3_bf16: prefetch and reuse switched off.
    "axolotl zero3_bf16": {
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 0, "reduce_bucket_size": AUTO,
            "stage3_prefetch_bucket_size": AUTO, "stage3_param_persistence_threshold": AUTO, "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": True}, "gradient_accumulation_steps": AUTO, "gradient_clipping": AUTO, "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO, "wall_clock_breakdown": False,
    },
    # LLaMA-Factory's ds_z3_offload: overlap switched off.
    "llama-factory z3 offload": {
        "train_batch_size": AUTO, "train_micro_batch_size_per_gpu": AUTO, "gradient_accumulation_steps": AUTO, "gradient_clipping": AUTO,
        "zero_allow_untested_optimizer": True, "fp16": {"enabled": AUTO, "loss_scale": 0}, "bf16": {"enabled": AUTO},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": AUTO,
        },
    },
    # ms-swift's zero2.
    "ms-swift zero2": {
        "fp16": {"enabled": AUTO, "loss_scale": 0}, "bf16": {"enabled": AUTO},
        "zero_optimization": {
            "stage": 2, "offload_optimizer": {"device": "none", "pin_memory": True}, "allgather_partitions": True,
            "allgather_bucket_size": 2e8, "overlap_comm": False, "reduce_scatter": True, "reduce_bucket_size": 2e8, "contiguous_gradients": True,
        },
        "gradient_accumulation_steps": AUTO, "gradient_clipping": AUTO, "steps_per_print": 2000, "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO, "wall_clock_breakdown": False,
    },
    # An older example with keys that 0.19 no longer knows.
    "older example": {
        "train_batch_size": 100, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4, "fp16": {"enabled": True},
        "bf16": {"enabled": True}, "amp": {"enabled": False},
        "zero_optimization": {"stage": 2, "cpu_offload": True, "overlap_comm": True, "stage3_max_live_parameters": 1e9},
    },
}  # fmt: skip
