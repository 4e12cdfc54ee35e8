"""A gloo rank that trains a tiny model with `transformers.Trainer` under DeepSpeed and lets it save as it does.

Run by `conftest.py`: `make_trainer_checkpoints.py FOLDER zeroN...` with the usual rank environment. For each it leaves
Trainer's output folder, `checkpoint-2/` and `checkpoint-4/` in it, and `live-2.pt` and `live-4.pt`: the weights that the ranks held.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

FIELDS = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "vocab_size": 37, "tie_word_embeddings": True,
}  # fmt: skip


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random tokens."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(0, 37, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


class KeepLive(TrainerCallback):
    """Writes the weights that the ranks hold at each save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        import deepspeed

        live = {}
        inner = getattr(model, "module", model)
        for name, parameter in inner.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                live[name] = parameter.detach().clone().cpu()
        if state.is_world_process_zero:
            torch.save(live, self.folder / f"live-{state.global_step}.pt")


def train(folder: Path, stage: int) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), deepspeed=config, use_cpu=True, bf16=True, max_steps=4, save_steps=2, per_device_train_batch_size=2,
        report_to=[], logging_steps=100, optim="adamw_torch", disable_tqdm=True, dataloader_num_workers=0, seed=3,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **FIELDS))
    for parameter in model.model.layers[0].mlp.parameters():
        parameter.requires_grad_(False)
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[KeepLive(folder)]).train()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    root = Path(sys.argv[1])
    for name in sys.argv[2:]:
        train(root / name, int(name.removeprefix("zero")))
        AcceleratorState._reset_state(reset_partial_state=False)  # else the next run would go on with this one's settings
