"""Convert a checkpoint: find it, verify it, write what the target's suffix asks for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from cadtrain.checkpoint.source import CheckpointSource, find_checkpoint
from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.config.sections import LoraConfig, RunConfig
from cadtrain.convert.adapters import has_adapters, merged_entries
from cadtrain.convert.write_file import Entry, placed_whole, write_bin, write_safetensors
from cadtrain.errors import CheckpointError, EnvironmentFault, UsageError
from cadtrain.units import format_bytes

DtypeName = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written."""

    target: Path
    kind: Literal["bin", "safetensors", "folder"]
    shards: Path
    step: int | None
    zero_stage: int
    num_ranks: int
    dtype: str
    num_weights: int
    num_parameters: int
    nbytes: int
    merged_lora: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    source: CheckpointSource
    weights: ShardedWeights
    target: Path
    kind: Literal["bin", "safetensors", "folder"]
    dtype: str
    config: RunConfig | None
    merge: LoraConfig | None
    progress: Progress


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: DtypeName | None = None,
    merge_lora: bool | None = None,
    step: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Write the weights of the checkpoint in `source` to `target`; one process, no ranks.

    The suffix of `target` decides: `.bin`, `.safetensors`, or none for a Hugging Face folder. Parameters are cast to
    `dtype`; buffers keep their own. Default: fp32 in a file, which are the exact master weights, and in a folder the
    precision of training. Adapters are merged into a folder and kept in a file unless `merge_lora` says otherwise.

    Raises `UsageError` for an existing target without `force`, `CheckpointError` for a checkpoint that does not verify
    or holds code, `EnvironmentFault` where the disk is too small.
    """
    start = time.monotonic()
    kind = target_kind(target)
    if target.exists() and not force:
        raise UsageError(
            "exists already.", where=str(target), hint="Add --force to replace it, or choose another name."
        )
    found = find_checkpoint(source, step=step)
    _verify(found)
    weights = ShardedWeights.open(found.shards)
    config = _run_config(found)
    merge = _adapters_to_merge(config, weights, wanted=kind == "folder" if merge_lora is None else merge_lora)
    if kind == "folder" and merge is None and has_adapters(weights):
        raise UsageError(
            "a folder cannot keep adapters apart.", where="--no-merge-lora", hint="Write a .bin or .safetensors."
        )
    job = _Job(found, weights, target, kind, dtype or _default_dtype(kind, found), config, merge, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbytes = _write_folder(job) if kind == "folder" else _write_file(job)
    parameters = [info for info in weights.info.values() if info.kind != "buffer" and info.alias_of is None]
    return Conversion(
        target=target, kind=kind, shards=found.shards, step=found.step, zero_stage=weights.stage, num_ranks=weights.num_ranks,
        dtype=job.dtype, num_weights=len(weights), num_parameters=sum(info.shape.numel() for info in parameters),
        nbytes=nbytes, merged_lora=merge is not None, seconds=time.monotonic() - start,
    )  # fmt: skip


def target_kind(target: Path) -> Literal["bin", "safetensors", "folder"]:
    """What `target`'s suffix asks for; raises `UsageError` for a suffix that is not known."""
    if target.suffix == ".bin":
        return "bin"
    if target.suffix == ".safetensors":
        return "safetensors"
    if target.suffix in (".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".zip"):
        raise UsageError(
            f"{target.suffix} is not written.",
            where=str(target),
            hint="Use .bin, .safetensors, or a name without suffix.",
        )
    return "folder"


def _verify(found: CheckpointSource) -> None:
    """Compare every file with the manifest; what DeepSpeed alone wrote has none."""
    if found.manifest is None:
        return
    folder = found.shards.parent
    faults = found.manifest.faults(folder)
    if faults:
        raise CheckpointError(
            f"does not verify: {'; '.join(faults[:3])}",
            where=str(folder),
            hint="Take another checkpoint, or copy this one again.",
        )


def _run_config(found: CheckpointSource) -> RunConfig | None:
    if found.config is None:
        return None
    from cadtrain.config.load import load_run_config

    return load_run_config(found.config).config


def _adapters_to_merge(config: RunConfig | None, weights: ShardedWeights, *, wanted: bool) -> LoraConfig | None:
    if not wanted or not has_adapters(weights):
        return None
    lora = config.model.language.lora if config is not None else None
    if lora is None:
        raise UsageError(
            "the adapters' alpha is not known: there is no config.yaml beside the checkpoint.",
            where="--merge-lora",
            hint="Convert a checkpoint of a cadtrain run, or keep the adapters apart with --no-merge-lora.",
        )
    return lora


def _default_dtype(kind: str, found: CheckpointSource) -> str:
    if kind != "folder" or found.manifest is None:
        return "fp32"
    return found.manifest.precision if found.manifest.precision in DTYPES else "fp32"


def _write_file(job: _Job) -> int:
    entries = _entries(job)
    total = sum(entry.nbytes for entry in entries if entry.alias_of is None)
    _check_room(job.target, total * (2 if job.kind == "bin" else 1))
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        job.progress(done, total)

    write = write_bin if job.kind == "bin" else write_safetensors
    with placed_whole(job.target) as temporary:
        write(temporary, entries, progress=count)
    return job.target.stat().st_size


def _entries(job: _Job) -> list[Entry]:
    if job.merge is not None:
        return merged_entries(job.weights, job.merge, dtype_of=lambda name: _target_dtype(job, name))
    return [
        Entry(name, info.shape, _target_dtype(job, name), partial(job.weights.__getitem__, name), info.alias_of)
        for name, info in job.weights.info.items()
    ]


def _target_dtype(job: _Job, name: str) -> torch.dtype:
    info = job.weights.info[name]
    return DTYPES[job.dtype] if info.kind != "buffer" and info.dtype.is_floating_point else info.dtype


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise EnvironmentFault(
            f"needs {format_bytes(needed)} of disk, {format_bytes(free)} are free.",
            where=str(target.parent),
            hint="Free space, write elsewhere, or use --dtype bf16.",
        )


def _write_folder(job: _Job) -> int:
    """A folder that `from_pretrained` opens; replaces an existing one only after the new one is whole."""
    from cadtrain.model.export import write_folder

    if job.config is None:
        raise UsageError(
            "a folder needs the model's description, and there is no config.yaml beside this checkpoint.",
            where=str(job.target),
            hint="Convert a checkpoint of a cadtrain run, or write a .bin or .safetensors.",
        )
    entries = _entries(job)
    total = sum(entry.nbytes for entry in entries if entry.alias_of is None)
    _check_room(job.target, total)
    new = job.target.with_name(f".{job.target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        description, tokenizer = _describe_model(job.config, DTYPES[job.dtype])
        write_folder(new, config=description, weights=_stream(entries, total, job.progress), tokenizer=tokenizer)
        if job.target.is_dir():
            shutil.rmtree(job.target)
        elif job.target.exists():
            job.target.unlink()
        new.rename(job.target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return sum(path.stat().st_size for path in job.target.iterdir())


def _stream(entries: list[Entry], total: int, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    done = 0
    for entry in entries:
        if entry.alias_of is not None:
            continue
        yield entry.name, entry.read().to(entry.dtype)
        done += entry.nbytes
        progress(done, total)


def _describe_model(config: RunConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model's own description and its tokenizer; the model is built without values to learn its shapes."""
    from cadtrain.cad.codec import added_vocabulary, get_codec
    from cadtrain.model.build import build_model
    from cadtrain.model.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(config.model.language, added_vocabulary(config.data.codec))
    codec = get_codec(config.data.codec)
    with torch.device("meta"):
        model = build_model(
            config.model, tokenizer=tokenizer, codec=codec.name, codec_version=codec.version, dtype=dtype,
            device="meta", seed=config.seed,
        )  # fmt: skip
    return model.config, tokenizer
