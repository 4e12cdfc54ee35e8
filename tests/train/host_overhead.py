"""Milliseconds of the host in a step of a deep, narrow model, where computing costs next to nothing.

    python -m tests.train.host_overhead [--layers 36]

One process on the CPU, a pack of 16 tokens: what is measured is Python, autograd and DeepSpeed. On a GPU the host must stay
below the time of a layer's kernels, or these wait for it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any

CASES = [(0, "auto", 0), (2, "auto", 0), (3, "auto", 0), (3, "plain", 0), (0, "auto", 4), (3, "auto", 4), (3, "plain", 4)]
"""ZeRO stage, `model.kernels`, rank of adapters."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--case", type=int)
    asked = parser.parse_args()
    if asked.case is not None:
        measure(asked.layers, *CASES[asked.case])
        sys.stdout.flush()
        os._exit(0)  # DeepSpeed's threads would hold the process up
    print(f"{'ZeRO':<6}{'kernels':<9}{'LoRA':<6}{'forward':>9}{'backward':>10}{'step':>7}{'a layer':>9}  (ms; a layer: forward and backward)")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for number in range(len(CASES)):
        command = [sys.executable, "-m", "tests.train.host_overhead", f"--layers={asked.layers}", f"--case={number}"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        print(next(line for line in done.stdout.splitlines() if line.startswith("row ")).removeprefix("row "), flush=True)


def measure(layers: int, stage: int, kernels: str, rank: int, repeats: int = 20) -> None:
    """Print the row of one case."""
    import torch

    from cadtrain.config.deepspeed_config import deepspeed_config_for
    from cadtrain.config.measure import TokenRows
    from cadtrain.config.sections import COMPONENTS, RunConfig
    from cadtrain.model import build_model, build_tokenizer
    from cadtrain.train.engine import DeepSpeedEngine, ZeroSharding, init_process_group
    from cadtrain.train.workload import TokenWorkload

    device = init_process_group()
    shapes = {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    language: dict[str, Any] = {"tokenizer": "bytes", "config": shapes, "lora": {"rank": rank} if rank else None}
    config = RunConfig.model_validate(
        {
            "model": {"language": language, "recompute": "none", "kernels": kernels},
            "curriculum": [{"name": "text", "duration": "10 steps", "modalities": {"text": 1.0}}],
            "zero": {"stage": stage},
            "precision": "fp32",
        }
    )
    deepspeed_config = deepspeed_config_for(
        config, zero_stage=stage, world_size=1, precision="fp32", hidden_size=32, layer_params=10_000
    ).to_dict()
    model = build_model(
        config.model, tokenizer=build_tokenizer(config.model.language), codec="compact", codec_version=1, dtype=torch.float32,
        device=device, seed=0, sharding=ZeroSharding(deepspeed_config) if stage == 3 else None,
    )  # fmt: skip
    engine = DeepSpeedEngine(model, config=deepspeed_config, optim=config.optim, device=device)
    engine.set_learning(COMPONENTS)
    workload = TokenWorkload(TokenRows(8, 2), vocab_size=256, seed=0)
    packs = [workload.make_pack(workload.plan_step(i, {"text": 1.0}, world_size=1).packs[0][0]) for i in range(4)]
    inner, took = engine._engine, [0.0, 0.0, 0.0]
    for number in range(repeats + 4):
        inner.set_gradient_accumulation_boundary(True)
        marks = [time.perf_counter()]
        loss = inner(**packs[number % 4].model_inputs()).loss_sum
        marks.append(time.perf_counter())
        inner.backward(loss, scale_wrt_gas=False)
        if engine._fp32_sums is not None:
            engine._add_up_fp32(True)
        marks.append(time.perf_counter())
        engine.step()
        marks.append(time.perf_counter())
        if number >= 4:
            took = [total + after - before for total, before, after in zip(took, marks, marks[1:], strict=False)]
    forward, backward, step = (1000 * total / repeats for total in took)
    print(f"row {stage:<6}{kernels:<9}{rank or '':<6}{forward:>9.1f}{backward:>10.1f}{step:>7.1f}{(forward + backward) / layers:>9.2f}")


if __name__ == "__main__":
    main()
