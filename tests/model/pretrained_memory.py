"""What loading a pretrained language model costs each rank: peak memory, seconds, and whether every bit arrived.

    python -m tests.model.pretrained_memory --ranks 4 --shape 8b --zero 3 [--work FOLDER]

Makes a sharded safetensors model of Qwen3's shape on the spot (random bf16 values, files of at most 5 GB, 64 MiB in memory at
a time), loads it on N ranks through the project's own `build_model`, on GPUs over NCCL where there are as many, else on CPU ranks
over gloo, and compares spans of random weights, and the ends of every rank's share, with the values that were drawn.

What is printed of each rank:

    anonymous   the most host memory that the rank alone held during the load and that the system cannot take back (RssAnon,
                looked at every 2 ms), less what the process held before it. On CPU ranks the weights themselves are in it.
    mapped      the most pages of mapped files in the rank's address space (RssFile). They are the page cache's, one copy for
                all ranks, and the system drops them when it needs the room.
    device      the most GPU memory that torch had given out.

`--way gather` loads as ZeRO-3 without shares does: rank 0 reads each weight whole and sends it. Not a test: it asserts
nothing about time or memory; it ends with exit code 1 where a value is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "vocab_size": 999, "tie_word_embeddings": True},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen3's published shapes."""

SHARD_BYTES = 5_000_000_000
_PIECE = 1 << 25
"""Values that are drawn at a time, from a generator of their own: any span can be drawn again without the rest."""
_POLL_SECONDS = 0.002
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight of the model on disk."""

    number: int
    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape))

    def values(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """uint16[stop - start]: the bits of the bf16 values from `start` on, of magnitude 2^-7 to 2^-5 and either sign."""
        parts = []
        for piece in range(start // _PIECE, -(-stop // _PIECE)):
            first = piece * _PIECE
            count = min(_PIECE, self.numel - first)
            words = np.random.SFC64([self.number, piece]).random_raw(-(-count // 4))
            bits = words.view(np.uint16)[:count] & np.uint16(0x80FF) | np.uint16(0x3C00)
            parts.append(bits[max(0, start - first) : max(0, stop - first)])
        return np.concatenate(parts)


def tensors_of(config: Any) -> list[Tensor]:
    """The weights that a saved model of `config` has, in order."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return [Tensor(number, name, tuple(p.shape)) for number, (name, p) in enumerate(model.named_parameters())]


def make_model(folder: Path, shape: str, shard_bytes: int = SHARD_BYTES) -> list[Tensor]:
    """A folder as `save_pretrained` writes it: configuration, safetensors files, index."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("qwen3", **SHAPES[shape], dtype="bfloat16")
    tensors = tensors_of(config)
    folder.mkdir(parents=True)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    files = list(_files(tensors, shard_bytes))
    weight_map = {}
    for number, held in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write(folder / name, held)
        weight_map |= {tensor.name: name for tensor in held}
    total = sum(2 * tensor.numel for tensor in tensors)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return tensors


def _files(tensors: list[Tensor], shard_bytes: int) -> Iterator[list[Tensor]]:
    held: list[Tensor] = []
    for tensor in tensors:
        if held and 2 * sum(t.numel for t in [*held, tensor]) > shard_bytes:
            yield held
            held = []
        held.append(tensor)
    yield held


def _write(path: Path, tensors: list[Tensor]) -> None:
    header, end = {}, 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + 2 * tensor.numel]}
        end += 2 * tensor.numel
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for start in range(0, tensor.numel, _PIECE):
                file.write(tensor.values(start, min(tensor.numel, start + _PIECE)).tobytes())


class Watch:
    """The highest values of a process's own memory figures while it is entered, in MiB."""

    def __init__(self) -> None:
        self.before = self.peak = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def now(self) -> dict[str, float]:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
        return {"anonymous": int(fields["RssAnon"]) / 1024, "mapped": int(fields["RssFile"]) / 1024}

    def _look(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            now = self.now()
            self.peak = {key: max(value, now[key]) for key, value in self.peak.items()}

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def load(folder: Path, tensors: list[Tensor], *, zero: int, world_size: int, way: str, offload: bool) -> dict[str, Any]:
    """Load the model on this rank; what it cost, and the names of weights with wrong values. Every rank calls it."""
    import torch
    import torch._dynamo  # its import fails inside zero.Init, which stands in for torch.tensor

    from cadtrain.config.deepspeed_config import build_deepspeed_config
    from cadtrain.config.sections import LanguageModelConfig, ModelConfig
    from cadtrain.model import build_model, build_tokenizer
    from cadtrain.train.engine import ZeroSharding, init_process_group, leave_process_group

    device = init_process_group()
    section = LanguageModelConfig(pretrained=str(folder), tokenizer="bytes")
    config = ModelConfig(language=section, image=None, point=None)
    sharding = None
    if zero == 3:
        hidden = json.loads((folder / "config.json").read_text())["hidden_size"]
        zero_config = build_deepspeed_config(
            zero_stage=3, world_size=world_size, precision="bf16", hidden_size=hidden, offload_parameters=offload,
            offload_optimizer=offload,
        ).to_dict()  # fmt: skip
        sharding = ZeroSharding(zero_config)
        if way == "gather":
            sharding.share = lambda parameter: None  # type: ignore[method-assign]
        # One weight is shared out and read first, so that what libraries take once is not counted as the load's.
        with sharding.construct():
            warm = torch.nn.Linear(8, 8, device=device)
        with sharding.gather([warm.weight]):
            pass
    torch.distributed.barrier()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    with Watch() as watch:
        model = build_model(
            config, tokenizer=build_tokenizer(section), codec="compact", codec_version=1, dtype=torch.bfloat16, device=device,
            seed=0, sharding=sharding,
        )  # fmt: skip
        own_seconds = time.perf_counter() - begun
        torch.distributed.barrier()
    seconds = time.perf_counter() - begun
    wrong = list(wrong_weights(model, tensors))
    result = {
        "own_seconds": own_seconds,
        "seconds": seconds,
        "anonymous": watch.peak["anonymous"] - watch.before["anonymous"],
        "kept": watch.now()["anonymous"] - watch.before["anonymous"],
        "mapped": watch.peak["mapped"],
        "device": torch.cuda.max_memory_allocated() / _MIB if device.type == "cuda" else None,
        "place": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, gloo",
        "wrong": wrong,
    }
    torch.distributed.barrier()
    leave_process_group()
    return result


def wrong_weights(model: Any, tensors: list[Tensor], samples: int = 24) -> Iterator[str]:
    """Names of weights of which this rank holds other bits than were drawn; looks at `samples` of them and the two largest."""
    parameters = dict(model.language.named_parameters())
    largest = sorted(tensors, key=lambda tensor: tensor.numel)[-2:]
    for tensor in [*largest, *random.Random(0).sample(tensors, min(samples, len(tensors)))]:
        parameter = parameters[tensor.name]
        held = getattr(parameter, "ds_tensor", parameter.data).view(-1)
        start = getattr(parameter, "ds_zero_partition_rank", 0) * held.numel()
        count = max(0, min(held.numel(), tensor.numel - start))
        for at in {0, count // 2, max(0, count - 4096)}:
            size = min(4096, count - at)
            found = held[at : at + size].cpu().view(dtype=_uint16()).numpy()
            if size > 0 and not np.array_equal(found, tensor.values(start + at, start + at + size)):
                yield tensor.name
                break


def _uint16() -> Any:
    import torch

    return torch.uint16


def _rank(rank: int, world_size: int, port: int, results: Any, folder: Path, tensors: list[Tensor], options: dict[str, Any]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    if torch.cuda.device_count() < world_size:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    results.put((rank, load(folder, tensors, world_size=world_size, **options)))


def measure(folder: Path, tensors: list[Tensor], ranks: int, **options: Any) -> list[dict[str, Any]]:
    """What `load` found on each of `ranks` new processes."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.Queue()
    workers = [
        context.Process(target=_rank, args=(rank, ranks, port, results, folder, tensors, options), daemon=True) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, dict[str, Any]] = {}
    while len(found) < ranks:
        if any(worker.exitcode not in (None, 0) for worker in workers):
            for worker in workers:
                worker.kill()
            raise SystemExit("a rank failed; its traceback stands above")
        try:
            rank, result = results.get(timeout=1)
        except multiprocessing.queues.Empty:  # type: ignore[attr-defined]
            continue
        found[rank] = result
    for worker in workers:
        worker.join()
    return [found[rank] for rank in range(ranks)]


def report(shape: str, tensors: list[Tensor], ranks: int, options: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """The figures as a table."""
    whole = 2 * sum(tensor.numel for tensor in tensors) / _MIB
    largest = 2 * max(tensor.numel for tensor in tensors) / _MIB
    print(
        f"{shape}: {sum(t.numel for t in tensors) / 1e9:.2f} billion weights, {whole:.0f} MiB in bf16, a rank's share "
        f"{whole / ranks:.0f} MiB, the largest weight {largest:.0f} MiB; {ranks} ranks ({found[0]['place']}), {options}"
    )
    print("rank  anonymous peak  kept after  mapped peak  device peak  seconds (MiB)")
    for rank, row in enumerate(found):
        device = "-" if row["device"] is None else f"{row['device']:.0f}"
        print(
            f"{rank:4}  {row['anonymous']:14.0f}  {row['kept']:10.0f}  {row['mapped']:11.0f}  {device:>11}  {row['own_seconds']:.1f}"
        )
    wrong = sorted({name for row in found for name in row["wrong"]})
    print(f"wrong weights: {', '.join(wrong)}" if wrong else "every value looked at is the one that was drawn, bit by bit")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--zero", type=int, choices=range(4), default=3)
    parser.add_argument("--way", choices=("share", "gather"), default="share")
    parser.add_argument("--offload", action="store_true", help="Shares live in host memory (ZeRO-3).")
    parser.add_argument("--work", type=Path, help="Folder for the model; it is kept there and used again. Default: a temporary one.")
    parser.add_argument("--json", action="store_true", help="Print every figure as JSON.")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="cadtrain-pretrained-"))
    folder = work / f"qwen3-{arguments.shape}"
    try:
        begun = time.perf_counter()
        if (folder / "model.safetensors.index.json").is_file():
            from transformers import AutoConfig

            tensors = tensors_of(AutoConfig.from_pretrained(folder))
        else:
            tensors = make_model(folder, arguments.shape)
        print(f"made in {time.perf_counter() - begun:.1f} s: {folder}", file=sys.stderr)
        options = {"zero": arguments.zero, "way": arguments.way, "offload": arguments.offload}
        found = measure(folder, tensors, arguments.ranks, **options)
    finally:
        if arguments.work is None:
            shutil.rmtree(work)
    if arguments.json:
        print(json.dumps({"shape": arguments.shape, "ranks": arguments.ranks, **options, "found": found}))
    else:
        report(arguments.shape, tensors, arguments.ranks, options, found)
    return 1 if any(row["wrong"] for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
