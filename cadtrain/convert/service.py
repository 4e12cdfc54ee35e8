"""Convert a checkpoint: find it, verify it, write what the target asks for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from cadtrain.checkpoint.source import CheckpointSource, find_checkpoint
from cadtrain.checkpoint.weight_files import DEFAULT_SHARD_BYTES
from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.convert.adapters import has_adapters
from cadtrain.convert.targets import DTYPES, Job, Kind, Progress, write_target
from cadtrain.convert.verify import CheckedWeights
from cadtrain.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from cadtrain.config.sections import LoraConfig, RunConfig

DtypeName = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written."""

    target: Path
    kind: Kind
    shards: Path
    step: int | None
    zero_stage: int
    num_ranks: int
    dtype: str
    num_weights: int
    num_parameters: int
    nbytes: int
    merged_lora: bool
    verified: bool
    """Whether every weight in it was compared with the hashes of the live ones, and read back after it was written."""
    notes: tuple[str, ...]
    """What the reader of the target should know: where weights that did not fit into it are."""
    seconds: float


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: DtypeName | None = None,
    merge_lora: bool | None = None,
    adapter: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: bool = False,
    step: int | None = None,
    force: bool = False,
    progress: Progress = lambda doing, done, total: None,
) -> Conversion:
    """Write the weights of the checkpoint in `source` to `target`; one process, no ranks.

    The suffix of `target` decides: `.bin`, `.safetensors`, or none for a Hugging Face folder, or for a PEFT folder with
    `adapter`. Parameters are cast to `dtype`; buffers keep their own. Default: fp32 in a file and a PEFT folder, which are the
    exact master weights, and in a Hugging Face folder the precision of training. Adapters are merged into a folder and kept in
    a file unless `merge_lora` says otherwise. `verify` compares every weight with the hashes stored when it was saved.

    Raises `UsageError` for an existing target without `force`, `CheckpointError` for a checkpoint that does not verify
    or holds code, `EnvironmentFault` where the disk is too small; what `target` was is then untouched.
    """
    start = time.monotonic()
    kind: Kind = "adapter" if adapter else target_kind(target)
    _check_target(target, kind, merge_lora, force=force)
    found = find_checkpoint(source, step=step)
    _verify_files(found, progress)
    weights = (CheckedWeights if verify else ShardedWeights).open(found.shards)
    config = _run_config(found)
    merge = _adapters_to_merge(config, weights, wanted=kind == "folder" if merge_lora is None else merge_lora)
    job = Job(
        shards=found.shards, weights=weights, target=target, kind=kind, dtype=dtype or _default_dtype(kind, found), config=config,
        merge=merge, max_shard_bytes=max_shard_bytes, verify=verify, progress=progress,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        written = write_target(job)
    return Conversion(
        target=target, kind=kind, shards=found.shards, step=found.step, zero_stage=weights.stage, num_ranks=weights.num_ranks,
        dtype=job.dtype, num_weights=written.num_weights, num_parameters=written.num_parameters,
        nbytes=written.nbytes, merged_lora=merge is not None, verified=verify, notes=written.notes,
        seconds=time.monotonic() - start,
    )  # fmt: skip


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces fit the cache of one core: shared out between threads, which spin while they wait, they take twice as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _check_target(target: Path, kind: Kind, merge_lora: bool | None, *, force: bool) -> None:
    if kind == "adapter" and target_kind(target) != "folder":
        raise UsageError("--adapter writes a folder.", where=str(target), hint="Give a name without suffix.")
    if kind == "adapter" and merge_lora:
        raise UsageError("an adapter that is merged is gone.", where="--merge-lora", hint="Leave --adapter away.")
    if os.path.lexists(target) and not force:
        raise UsageError(
            "exists already.", where=str(target), hint="Add --force to replace it, or choose another name."
        )
    if target.is_dir() and kind in ("bin", "safetensors"):
        raise UsageError("is a folder, and a file was asked for.", where=str(target), hint="Choose another name.")


def _verify_files(found: CheckpointSource, progress: Progress) -> None:
    """Compare every file with the manifest, several at a time; what DeepSpeed alone wrote has none."""
    if found.manifest is None:
        return
    folder, manifest = found.shards.parent, found.manifest
    # One share a file, the largest first: so the manifest sorts them.
    sizes = manifest.sizes() or [0]
    faults: list[str] = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        shares = pool.map(lambda number: manifest.faults(folder, share=(number, len(sizes))), range(len(sizes)))
        for number, share in enumerate(shares, start=1):
            faults += share
            progress("checking files", sum(sizes[:number]), sum(sizes))
    listed = set(manifest.files)
    faults += [
        f"{path.relative_to(folder)}: is not in the manifest"
        for path in sorted(found.shards.iterdir())
        if str(path.relative_to(folder)) not in listed
    ]
    if faults:
        raise CheckpointError(
            f"does not verify: {'; '.join(dict.fromkeys(faults[:3]))}",
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


def _default_dtype(kind: Kind, found: CheckpointSource) -> str:
    if kind != "folder" or found.manifest is None:
        return "fp32"
    return found.manifest.precision if found.manifest.precision in DTYPES else "fp32"
