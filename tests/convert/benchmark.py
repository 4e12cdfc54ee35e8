"""DeepSpeed's `zero_to_fp32` and `cadtrain convert` on the same checkpoints: wall time, peak memory, equal tensors.

    python -m tests.convert.benchmark --parameters 1e9 --work /big/disk

Two gloo ranks build a model of Qwen3's shape in bf16 and save it with plain DeepSpeed; then each program runs as a process of
its own, alternately, `--repeats` times, after the files were read once (a warm page cache) or, with `--cold`, dropped from it.
The optimizer is plain SGD: Adam's moments are read by neither program and would triple the files.
Of the times the best is printed, of the peaks the highest. `processor` counts the seconds of all cores, which other work on the
machine leaves alone. cadtrain waits until its file is on the disk, `zero_to_fp32` does not. Of the two peaks `resident` counts
the pages of mapped files, which the system takes back when it needs them; `anonymous` is what must stay.
Not a test: it asserts nothing about time. 1e9 parameters need 11 GiB of memory to make, 20 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch._dynamo  # its import fails inside zero.Init, which stands in for torch.tensor

WIDTH, VOCABULARY = 2048, 151936
VARIANTS = ("zero2-full", "zero2-lora", "zero3-full", "zero3-lora")
_TAG = "global_step1"
_POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process and its children took."""

    seconds: float
    processor_seconds: float
    resident_gib: float
    anonymous_gib: float


def model_fields(parameters: float) -> dict[str, Any]:
    """Fields of a Qwen3 configuration of about that many parameters."""
    layer = WIDTH * (16 + 8 + 8 + 16) * 128 + 3 * WIDTH * 3 * WIDTH
    layers = max(1, round((parameters - VOCABULARY * WIDTH) / layer))
    return {
        "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
    }  # fmt: skip


def make_on_rank(root: Path, parameters: float, variants: list[str]) -> None:
    """Build and save each variant; run by two ranks with the usual environment."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    description = AutoConfig.for_model("qwen3", **model_fields(parameters))
    for variant in variants:
        stage, is_lora = int(variant[4]), variant.endswith("lora")
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "sub_group_size": 100_000_000},
        }
        torch.manual_seed(1)
        with deepspeed.zero.Init(enabled=stage == 3, config_dict_or_path=config):
            model = AutoModelForCausalLM.from_config(description, dtype=torch.bfloat16)
        if is_lora:
            _add_adapters(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        engine.save_checkpoint(str(root / variant), tag=_TAG)
        engine.destroy()
        del engine, model, optimizer
    torch.distributed.destroy_process_group()


def _add_adapters(model: torch.nn.Module) -> None:
    import peft

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=32, target_modules=names, init_lora_weights=False), model)


def make(root: Path, parameters: float, variants: list[str]) -> None:
    """Start the two ranks and wait for them."""
    command = [sys.executable, "-m", "tests.convert.benchmark", "--make", "--work", str(root), "--parameters", str(parameters)]
    shared = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
        ranks.append(subprocess.Popen([*command, "--variants", *variants], env=environment))
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}")


def measure(command: list[str]) -> Cost:
    """Run `command` to its end, looking at its memory every 10 ms."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    resident = anonymous = 0
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            found = [_memory(member.pid) for member in family]
            resident = max(resident, sum(row[0] for row in found))
            anonymous = max(anonymous, sum(row[1] for row in found))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            pass  # it ended between two looks
        time.sleep(_POLL_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.read()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, processor, resident / 2**30, anonymous / 2**30)


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of resident memory, and of the part that belongs to no file."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return tuple(int(rows[name].split()[0]) * 1024 if name in rows else 0 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def settle_cache(folder: Path, *, cold: bool) -> None:
    """Bring the folder's files into the page cache, or out of it."""
    os.sync()
    for path in folder.rglob("*.pt"):
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def compare(theirs: Path, ours: Path) -> int:
    """How many tensors are equal bit for bit in both; ends the program where one is not."""
    expected: dict[str, torch.Tensor] = {}
    for part in sorted(theirs.glob("*.bin")):
        expected |= torch.load(part, weights_only=True, mmap=True)
    found: Mapping[str, torch.Tensor] = torch.load(ours, weights_only=True, mmap=True)
    unequal = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    if unequal or set(found) - set(expected):
        raise SystemExit(f"unequal: {unequal[:3]}, only ours: {sorted(set(found) - set(expected))[:3]}")
    return len(expected)


def run(root: Path, variant: str, *, repeats: int, cold: bool) -> str:
    """One line of the table."""
    source, theirs, ours = root / variant, root / "theirs", root / "ours.bin"
    commands = {
        "zero_to_fp32": [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", str(source), str(theirs)],
        "cadtrain": [sys.executable, "-m", "cadtrain", "convert", str(source), str(ours), "--force"],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            shutil.rmtree(theirs, ignore_errors=True) if name == "zero_to_fp32" else ours.unlink(missing_ok=True)
            settle_cache(source, cold=cold)
            costs[name].append(measure(command))
    equal = compare(theirs, ours)
    shutil.rmtree(theirs)
    ours.unlink()
    cells = []
    for key, best, unit in (("seconds", min, "s"), ("processor_seconds", min, "s"), ("resident_gib", max, "GiB"), ("anonymous_gib", max, "GiB")):
        their, own = (best(getattr(row, key) for row in costs[name]) for name in commands)
        cells.append(f"{their:.2f} {unit} | {own:.2f} {unit} | {their / own:.1f}")
    return f"| {variant} | {' | '.join(cells)} | {equal} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the files go; they are removed afterwards")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before each run")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, and use those that are there")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_on_rank(options.work, options.parameters, options.variants)
        return
    root = options.work / f"convert-benchmark-{options.parameters:.0e}"
    names = ("wall", "processor", "resident", "anonymous")
    header = ["checkpoint", *(f"{name} {who}" for name in names for who in ("zero_to_fp32", "cadtrain", "ratio")), "equal tensors"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    try:
        for variant in options.variants:
            if not (root / variant / _TAG).is_dir():
                make(root, options.parameters, [variant])
            print(run(root, variant, repeats=options.repeats, cold=options.cold), flush=True)
            if not options.keep:
                shutil.rmtree(root / variant)
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
