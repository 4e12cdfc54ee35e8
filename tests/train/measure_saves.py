"""Seconds that training stands still for a save, at once and behind, and that going on from one takes.

    python -m tests.train.measure_saves --shape 8b --gpus 2 --zero 3 --parts DATASET --work DISK [--only at_once]

One run of Qwen3's shape with random weights, all weights trained: it is saved at once and killed; goes on, and is saved
behind the training twice (the first save makes the buffers in host memory). A checkpoint is removed as soon as the next thing
to measure does not need it, so the disk must hold one and a half. Prints what it sees as it sees it. It asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (64, 128, 2, 4, 2), "1.7b": (2048, 6144, 28, 16, 8), "4b": (2560, 9728, 36, 32, 8), "8b": (4096, 12288, 36, 32, 8),
}  # fmt: skip
"""Hidden width, width of the MLP, layers, query heads, key heads."""
EVERY = 3
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--zero", default="3")
    parser.add_argument("--parts", type=Path, required=True, help="a prepared dataset")
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk in question")
    parser.add_argument("--only", choices=["at_once", "all"], default="all")
    asked = parser.parse_args()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    say(f"the disk writes {disk_rate(work):.2f} GB/s")
    config = work / "run.yaml"
    config.write_text(json.dumps(configuration(asked.shape, asked.parts.resolve())))
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    options = ["--gpus", str(asked.gpus), "--zero", asked.zero, "--no-preflight", "--run-dir", str(run)]
    with Launch([str(config), *options], work / "at_once.txt") as launch:
        launch.wait_for(lambda: "step 1/" in launch.text(), "first step after a fresh start")
        launch.wait_for(lambda: bool(launch.saved()), "saved at once")
        say(launch.saved()[-1])
    kept = newest(run)
    say(f"{kept.name}: {size_of(kept) / 1e9:.1f} GB")
    if asked.only == "all":
        behind(options, run, kept, work / "behind.txt")


def behind(options: list[str], run: Path, kept: Path, console: Path) -> None:
    """Go on from `kept`, and save behind the training twice."""
    step, log = int(kept.name.split("-")[1]), run / "logs" / "rank_00.log"
    before = len(copies(log))
    with Launch([*options, "--resume", "--set", "checkpoint.asynchronous=true"], console) as launch:
        launch.wait_for(lambda: f"step {step + 1}/" in launch.text(), "first step after going on")
        shutil.rmtree(kept)
        say("removed the checkpoint")
        launch.wait_for(lambda: len(copies(log)) > before, "first copy to host memory")
        launch.wait_for(lambda: newest(run) != kept, "and the checkpoint is whole")
        shutil.rmtree(newest(run))
        launch.wait_for(lambda: len(copies(log)) > before + 1, "second copy to host memory")
        for line in [*copies(log)[before:], *launch.saved()]:
            say(line)


class Launch:
    """`cadtrain launch`, whose ranks die with it."""

    def __init__(self, arguments: list[str], console: Path) -> None:
        self._console = console
        with console.open("w") as out:
            command = [sys.executable, "-m", "cadtrain", "launch", *arguments]
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        self._started = time.monotonic()

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        time.sleep(3)  # its guard kills the ranks

    def text(self) -> str:
        """What it has said."""
        return self._console.read_text(errors="replace")

    def saved(self) -> list[str]:
        """Its lines about finished checkpoints."""
        return re.findall(r"checkpoint step-\d+ saved in .*", self.text())

    def wait_for(self, seen: Callable[[], bool], what: str) -> None:
        """Say when `seen` is; ends the measurement where the launch ends before."""
        while not seen():
            if self._process.poll() is not None and not seen():
                raise SystemExit(f"the launch ended before: {what}\n{self.text()[-3000:]}")
            time.sleep(0.1)
        say(f"{time.monotonic() - self._started:7.1f} s from its start: {what}")


def configuration(shape: str, parts: Path) -> dict[str, Any]:
    """Text alone, some 16,000 tokens a step."""
    hidden, mlp, layers, heads, keys = SHAPES[shape]
    language = {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": 16 if shape == "tiny" else 128,
        "vocab_size": 512 if shape == "tiny" else 151_936, "max_position_embeddings": 40_960, "tie_word_embeddings": False,
    }  # fmt: skip
    return {
        "name": "saves",
        "model": {"language": {"tokenizer": "bytes", "config": language}},
        "data": {"path": str(parts), "validation_samples": 0},
        "curriculum": [
            {"name": "text", "duration": "4000 steps", "modalities": {"text": 1.0}, "learning_rate": 1e-5}
        ],
        "batch": {"global_batch_size": 64},
        "checkpoint": {"every": f"{EVERY} steps", "keep_last": 1, "on_failure": "continue"},
        "logging": {"tensorboard": False},
    }


def disk_rate(folder: Path, count: int = 4 << 30) -> float:
    """GB/s of one flushed file of `count` bytes, in pieces of 1 MiB."""
    path, piece = folder / "rate", bytes(1 << 20)
    started = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(count >> 20):
            file.write(piece)
        os.fsync(file.fileno())
    took = time.monotonic() - started
    path.unlink()
    return count / took / 1e9


def copies(log: Path) -> list[str]:
    """What rank 0 has said of copies to host memory."""
    return re.findall(r"state of step \d+ copied in .*", log.read_text()) if log.exists() else []


def newest(run: Path) -> Path:
    """The checkpoint that `latest` names."""
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
