"""A gloo rank that trains a tiny model with plain DeepSpeed and saves it under several ZeRO stages.

Run by `conftest.py` once a session: `make_checkpoints.py FOLDER VARIANT...` with the usual rank environment. For each
variant (`zero2-bf16`) it leaves a DeepSpeed folder and, beside it, `live.pt`: the weights that the ranks held.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

VARIANTS = ("zero0-fp32", "zero0-bf16", "zero1-fp32", "zero1-bf16", "zero2-fp32", "zero2-bf16", "zero3-fp32", "zero3-bf16")


class Tied(nn.Module):
    """A tied weight, a frozen part, buffers of several types, and shapes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 7)
        self.backbone = nn.Linear(7, 5)
        self.backbone.requires_grad_(False)
        self.hidden = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.gate = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 17, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.shift = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.linspace(0, 1, 11, dtype=torch.float32))
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.hidden(torch.relu(self.backbone(self.embedding(tokens)))) * self.gate)
        return (self.head(hidden) * self.scale + self.shift.sum()).float().pow(2).mean()


def engine_config(stage: int, precision: str) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        # At stage 0 DeepSpeed refuses fp32 sums of bf16 gradients; at stage 1 they switch it to its BF16_Optimizer.
        "data_types": {} if stage == 0 else {"grad_accum_dtype": "fp32"},
        # A threshold below most sizes and a small sub-group: parameters then span ranks and sub-groups.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8, "sub_group_size": 40},
    }


def train_and_save(folder: Path, stage: int, precision: str) -> None:
    import deepspeed

    torch.manual_seed(1)
    config = engine_config(stage, precision)
    with deepspeed.zero.Init(enabled=stage == 3, config_dict_or_path=config):
        model = Tied()
    names = dict(model.named_parameters())
    groups = [
        {"params": [names["embedding.weight"], names["shift"], names["scale"]], "lr": 1e-2},
        {"params": [p for name, p in names.items() if name.startswith(("hidden", "norm", "gate"))], "lr": 3e-3, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups)
    # DeepSpeed 0.18 gathers into views, which torch 2.13 allows only where no gradient is recorded.
    with torch.no_grad():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
        engine.backward(engine(torch.randint(0, 17, (4,), generator=generator)))
        with torch.no_grad():
            engine.step()
    # A stage of a curriculum may switch a learning weight off; it is then saved as trained and listed as frozen.
    model.shift.requires_grad_(False)
    engine.save_checkpoint(str(folder), tag="global_step3")
    live = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            live[name] = parameter.detach().clone().cpu()
    state = model.state_dict()
    live |= {name: buffer.detach().clone() for name, buffer in model.named_buffers() if name in state}
    if torch.distributed.get_rank() == 0:
        torch.save(live, folder / "live.pt")
    torch.distributed.barrier()
    engine.destroy()


def main() -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    root = Path(sys.argv[1])
    for variant in sys.argv[2:]:
        stage, precision = variant.removeprefix("zero").split("-")
        train_and_save(root / variant, int(stage), precision)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
