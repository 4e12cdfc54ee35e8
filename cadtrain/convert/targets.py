"""What a checkpoint is written as: one file of weights, a Hugging Face folder, or a PEFT folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from cadtrain.checkpoint.weight_files import Entry, write_safetensors
from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.convert.adapters import has_adapters, merged_entries
from cadtrain.convert.placing import placed_file, placed_folder
from cadtrain.convert.torch_file import write_bin
from cadtrain.convert.verify import WrittenHashes
from cadtrain.errors import EnvironmentFault, UsageError
from cadtrain.units import format_bytes

if TYPE_CHECKING:
    from cadtrain.config.sections import LoraConfig, RunConfig

Kind = Literal["bin", "safetensors", "folder", "adapter"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""

PIECE_VALUES = 1 << 18
"""Values on their way at a time: 1 MiB in fp32. Read, cast, hashed and written while they stay in the processor's cache;
pieces of 16 MiB took four times as long to write."""


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion: what is read, and what is made of it."""

    shards: Path
    weights: ShardedWeights
    target: Path
    kind: Kind
    dtype: str
    config: RunConfig | None
    merge: LoraConfig | None
    max_shard_bytes: int
    verify: bool
    progress: Progress


@dataclass(frozen=True, slots=True)
class Result:
    """What was written, and what the reader of the target should know."""

    nbytes: int
    """Bytes on the disk."""
    num_weights: int
    """Names, those of tied weights included."""
    num_parameters: int
    """Values of its parameters; a tied one counts once."""
    notes: tuple[str, ...] = field(default=())


def write_target(job: Job) -> Result:
    """Write `job.target`, whole or not at all."""
    if job.kind == "adapter":
        from cadtrain.convert.peft_folder import write_peft_folder

        return write_peft_folder(job)
    return _write_model_folder(job) if job.kind == "folder" else _write_file(job)


def entry_of(job: Job, name: str, *, written_as: str | None = None) -> Entry:
    """A weight of the checkpoint as it stands there, in the type of the job's parameters."""
    info = job.weights.info[name]
    pieces = partial(job.weights.pieces, name, PIECE_VALUES)
    return Entry(written_as or name, info.shape, target_dtype(job, name), pieces, info.alias_of)


def target_dtype(job: Job, name: str) -> torch.dtype:
    """The type in the file: the job's for parameters, a buffer's own."""
    info = job.weights.info[name]
    return DTYPES[job.dtype] if info.kind != "buffer" and info.dtype.is_floating_point else info.dtype


class Watch:
    """Follows what is written: moves the bar, and keeps hashes where the files are read back at the end."""

    def __init__(self, job: Job, entries: Sequence[Entry]) -> None:
        self._progress = job.progress
        self._hashes = WrittenHashes() if job.verify else None
        stored = [entry for entry in entries if entry.alias_of is None]
        buffers = {name for name, info in job.weights.info.items() if info.kind == "buffer"}
        self._done, self._total = 0, sum(entry.nbytes for entry in stored)
        self._num_weights = len(entries)
        self._num_parameters = sum(entry.shape.numel() for entry in stored if entry.name not in buffers)
        _check_room(job.target, self._total)

    def written(self, name: str, piece: torch.Tensor) -> None:
        """One more piece is in a file."""
        self._done += piece.nbytes
        if self._hashes is not None:
            self._hashes.add(name, piece)
        self._progress("converting", self._done, self._total)

    def result(self, nbytes: int, notes: tuple[str, ...] = ()) -> Result:
        """What to say at the end."""
        return Result(nbytes, self._num_weights, self._num_parameters, notes)

    def read_back(self, files: Sequence[Path]) -> None:
        """Compare `files` with what was written; raises `CheckpointError`."""
        if self._hashes is not None:
            self._hashes.compare(files, progress=partial(self._progress, "reading back"))


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise EnvironmentFault(
            f"needs {format_bytes(needed)} of disk, {format_bytes(free)} are free.",
            where=str(target.parent),
            hint="Free space, write elsewhere, or use --dtype bf16.",
        )


def _entries(job: Job) -> list[Entry]:
    if job.merge is not None:
        return merged_entries(job.weights, job.merge, dtype_of=partial(target_dtype, job), piece_values=PIECE_VALUES)
    return [entry_of(job, name) for name in job.weights]


def _write_file(job: Job) -> Result:
    entries = _entries(job)
    watch = Watch(job, entries)
    write: Callable[..., None] = write_bin if job.kind == "bin" else write_safetensors
    with placed_file(job.target) as temporary:
        write(temporary, entries, written=watch.written)
        watch.read_back([temporary])
    return watch.result(job.target.stat().st_size)


def _write_model_folder(job: Job) -> Result:
    """A folder that `from_pretrained` opens; replaces an existing one only after the new one is whole."""
    from cadtrain.convert.description import describe_model, preprocessing
    from cadtrain.convert.model_folder import fill_folder

    if job.config is None:
        raise UsageError(
            "a folder needs the model's description, and there is no config.yaml beside this checkpoint.",
            where=str(job.target),
            hint="Convert a checkpoint of a cadtrain run, or write a .bin or .safetensors.",
        )
    if job.merge is None and has_adapters(job.weights):
        raise UsageError(
            "a folder for from_pretrained cannot keep adapters apart.",
            where="--no-merge-lora",
            hint="Write a PEFT folder with --adapter, or a .bin or .safetensors.",
        )
    entries = _entries(job)
    watch = Watch(job, entries)
    description, tokenizer = describe_model(job.config, DTYPES[job.dtype])
    with placed_folder(job.target) as temporary:
        files = fill_folder(
            temporary, config=description, entries=entries, tokenizer=tokenizer, facts=preprocessing(job.config),
            max_shard_bytes=job.max_shard_bytes, written=watch.written,
        )  # fmt: skip
        watch.read_back(files)
    return watch.result(folder_bytes(job.target))


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in `folder`."""
    return sum(path.stat().st_size for path in folder.iterdir())
