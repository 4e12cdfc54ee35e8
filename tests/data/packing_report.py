"""How well a dataset's steps fill packs and keep ranks equally busy.

    python -m tests.data.packing_report DATASET [--ranks 4] [--budget 8192] [--batch 64,128,256] [--text]

DATASET is a prepared folder. Its training split is planned for one epoch with tokens of one byte each, the modality sets of the
curriculum's last stage (`--text`: text alone), 256 tokens a view and 256 a cloud. No test: a measurement to repeat whenever the
packing changes; `docs/performance.md` quotes its figures. What the columns mean:

    fill        tokens over the room in all packs
    steps       micro-steps of the epoch, and how many the tokens need at least: sum of ceil(tokens / (ranks * budget))
    max/mean    tokens of the fullest rank over the ranks' mean in a micro-step: of all micro-steps together (the time that a run
                takes over the time it would take if ranks never waited), at the 90th percentile, and the worst
    least       what the first of these three must be at least: no step is done before its longest sample
    packing     time that placing the samples of one step takes: mean and longest, in milliseconds
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from cadtrain.config.sections import LanguageModelConfig
from cadtrain.data.examples import ExampleBuilder, ExampleShape, count_tokens
from cadtrain.data.feed import Feed
from cadtrain.data.packing import pack_step
from cadtrain.data.shards import PartDataset
from cadtrain.model.tokenizer import build_tokenizer

ALL = {"text": 0.2, "text+point": 0.3, "text+image": 0.2, "text+point+image": 0.3}
INSTRUCTION = "Generate the CAD command sequence of this part."


def main() -> None:
    """Print a line for each batch size."""
    options = argparse.ArgumentParser(description="Fill and balance of a dataset's packs over an epoch.")
    options.add_argument("dataset", type=Path)
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--budget", type=int, default=8192)
    options.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[64, 128, 256])
    options.add_argument("--text", action="store_true", help="text alone, as in the first stage")
    given = options.parse_args()
    print(f"{'batch':>5} {'fill':>6} {'steps':>11} {'max/mean':>9} {'p90':>6} {'worst':>6} {'least':>6} {'packing':>15}")
    for batch in given.batch:
        feed = open_feed(given.dataset, batch=batch, budget=given.budget)
        print(f"{batch:>5} {report(feed, {'text': 1.0} if given.text else ALL, given.ranks)}")


def open_feed(dataset: Path, *, batch: int, budget: int) -> Feed:
    """The training split with byte tokens, one view of 224 pixels and 2,048 points a sample."""
    parts = PartDataset.open(dataset, "train")
    tokenizer = build_tokenizer(LanguageModelConfig(config={"model_type": "qwen3"}, tokenizer="bytes"))
    shape = ExampleShape(tokens_per_view=256, views=1, image_size=224, point_tokens=256, num_points=2048)
    lengths = count_tokens(tokenizer, INSTRUCTION, parts.captions(), parts.column("sequence"))
    return Feed(
        parts, lengths, ExampleBuilder(tokenizer, INSTRUCTION, shape, 0), global_batch_size=batch, micro_batch_tokens=budget,
        max_sample_tokens=budget, modality_sets=list(ALL),
    )  # fmt: skip


def report(feed: Feed, probabilities: dict[str, float], ranks: int) -> str:
    """One line over an epoch."""
    loads: list[list[int]] = []
    least, least_tokens, times = 0, 0.0, []
    for step in range(-(-feed.num_samples // feed.global_batch_size)):
        plan = feed.plan_step(step, probabilities, world_size=ranks)
        sizes = [[[_tokens(feed, draw.index, draw.modalities) for draw in order.draws] for order in row] for row in plan.packs]
        loads += [[sum(pack) for pack in row] for row in sizes]
        least += -(-plan.num_tokens // (ranks * feed.micro_batch_tokens))
        flat = [size for row in sizes for pack in row for size in pack]
        least_tokens += max(max(flat), sum(flat) / ranks)
        started = time.perf_counter()
        pack_step(flat, world_size=ranks, budget=feed.micro_batch_tokens)
        times.append(1e3 * (time.perf_counter() - started))
    grid = np.asarray(loads, dtype=np.float64)  # [micro-steps, ranks]
    unequal = grid.max(axis=1) / grid.mean(axis=1)
    return (
        f"{grid.sum() / (grid.size * feed.micro_batch_tokens):>6.1%} {len(grid):>5} ({least:>3}) {grid.max(axis=1).sum() / grid.mean(axis=1).sum():>9.3f}"
        f" {np.percentile(unequal, 90):>6.3f} {unequal.max():>6.3f} {least_tokens / grid.mean(axis=1).sum():>6.3f} {np.mean(times):>6.2f}, {max(times):>5.2f} ms"
    )


def _tokens(feed: Feed, index: int, modalities: str) -> int:
    return feed.lengths.text_tokens(index, modalities) + feed.builder.shape.modality_tokens(modalities)


if __name__ == "__main__":
    main()
