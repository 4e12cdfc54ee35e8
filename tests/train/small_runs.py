"""The smallest run that has everything: two stages, three modalities, adapters on a frozen model; and what it left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from cadtrain.checkpoint.layout import list_steps
from cadtrain.checkpoint.store import verify
from cadtrain.checkpoint.zero_shards import ShardedWeights
from tests.train.tiny import CONFIG_FIELDS, IMAGE_FIELDS

NUM_STEPS = 6


def write_config(path: Path, dataset: Path, *, stage: int, dropout: float = 0.1, **checkpoint: Any) -> Path:
    """Two stages of three steps, saved after every step; LoRA, so that there are weights that never learn."""
    sets = ({"text": 1.0}, {"text": 0.3, "text+point": 0.3, "text+point+image": 0.4})
    config = {
        "name": "faults",
        "model": {
            "language": {"config": {**CONFIG_FIELDS, "max_position_embeddings": 2048}, "tokenizer": "bytes", "lora": {"rank": 4, "dropout": dropout}},
            "image": {"config": IMAGE_FIELDS, "image_size": 28},
            "point": {"num_latents": 4, "width": 24, "num_heads": 2, "num_layers": 1, "trainable": True},
            "projector_width": 32,
        },
        "data": {"path": str(dataset), "num_points": 16, "max_sample_tokens": 2048, "validation_samples": 2, "num_workers": 1},
        "curriculum": [
            {"name": f"stage{number}", "modalities": drawn, "duration": f"{NUM_STEPS // 2} steps", "learning_rate": 1e-3}
            for number, drawn in enumerate(sets)
        ],
        "zero": {"stage": stage},
        "batch": {"global_batch_size": 4, "micro_batch_tokens": 2048},
        "checkpoint": {"every": "1 step", "keep_last": 2, "keep_best": 1, **checkpoint},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return path


def final_weights(run_dir: Path) -> dict[str, str]:
    """A hash of every weight and buffer of the run's last checkpoint."""
    weights = ShardedWeights.open(run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}" / "engine")
    return {name: xxhash.xxh3_128(weights[name].detach().contiguous().view(-1).numpy().tobytes()).hexdigest() for name in weights}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the run's steps."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if not row.get("validation")]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of every step."""
    return [(row["step"], row["loss"]) for row in metrics(run_dir)]


def whole_steps(run_dir: Path) -> list[int]:
    """The steps of the finished checkpoints; every one of them is whole, and `latest` names one."""
    root = run_dir / "checkpoints"
    steps = list_steps(root)
    for step in steps:
        assert verify(root / f"step-{step:08d}") == []
    if (root / "latest").exists():
        assert (root / (root / "latest").read_text().strip()).is_dir()
    return steps


def output(run_dir: Path) -> str:
    """What all ranks wrote."""
    return "\n".join(path.read_text() for path in sorted(run_dir.glob("rank_*.txt")))
