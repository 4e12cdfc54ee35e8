"""cadtrain trains CAD-MLLM-style models on 1 to N GPUs with DeepSpeed ZeRO."""

__version__ = "0.1.0"
