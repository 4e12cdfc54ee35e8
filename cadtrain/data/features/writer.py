"""Writing features: file by file beside their place, each file whole or absent, and one rename at the end.

FOLDER.tmp-<digest>/  files.jsonl (what is finished)  locks/  train/…        the digest is that of all that decides on the rows
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from cadtrain.data.features.manifest import FORMAT, FeatureFile, FeatureManifest, FileTask
from cadtrain.data.features.store import ROWS, SUMS
from cadtrain.data.manifest import MANIFEST_NAME, SPLITS, write_whole
from cadtrain.data.writing.target import LOCKS, resolve_target, work_folder
from cadtrain.errors import DataError, EnvironmentFault, UsageError
from cadtrain.units import format_bytes

LEDGER = "files.jsonl"
_OVERHEAD = 1.01
"""Headers, checksums and the blocks of the file system."""


class FeatureWriter:
    """Makes a folder of features; a context that one process is in at a time. What it has written stays for the next run."""

    def __init__(self, out: Path, plan: FeatureManifest, *, overwrite: bool = False) -> None:
        """Raises `UsageError` where `out` is taken, or by another process that writes the same, and `EnvironmentFault` for a full disk."""
        self.plan = plan
        self.out = resolve_target(out)
        self.refuse_taken(overwrite=overwrite)
        self.work = work_folder(self.out, plan.plan_digest())
        self._lock = FileLock(self.work / LOCKS / "writer.lock", timeout=0)
        self.finished: dict[str, FeatureFile] = {}

    def __enter__(self) -> Self:
        try:
            (self.work / LOCKS).mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            message = "another process is encoding into the same folder now"
            raise UsageError(message, where=str(self.out), hint="Wait for it, or stop it.") from None
        except OSError as error:
            raise EnvironmentFault(f"cannot be written to: {error.strerror}", where=str(self.work)) from error
        self.finished = self._read_ledger()
        try:
            self._check_space()
        except EnvironmentFault:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def missing(self) -> Iterator[FileTask]:
        """The files that are still to be written."""
        return (task for task in self.plan.tasks() if task.name not in self.finished)

    def write(self, task: FileTask, rows: torch.Tensor) -> None:
        """Store the rows of one file, [rows, N, W] in the plan's type on the host. May run in a thread; raises `EnvironmentFault`."""
        path = self.work / task.name
        raw = rows.contiguous().view(len(rows), -1).view(torch.uint8).numpy()
        sums = np.array([xxhash.xxh3_64_intdigest(row.data) for row in raw], dtype=np.uint64).view(np.int64)
        partial = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file({ROWS: rows.contiguous(), SUMS: torch.from_numpy(sums)}, partial)
            shutil.copymode(self.work / LEDGER, partial)  # safetensors makes files that their owner alone may read
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            record = FeatureFile(len(rows), path.stat().st_size, xxhash.xxh3_128_hexdigest(sums.data))
            with (self.work / LEDGER).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": task.name, **asdict(record)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            hint = "Make room and run the same command again: it goes on where it stopped."
            raise EnvironmentFault(f"cannot be written: {error.strerror}", where=str(path), hint=hint) from error
        self.finished[task.name] = record

    def finish(self) -> FeatureManifest:
        """Write the manifest and give the folder its name."""
        lacking = [task.name for task in self.missing()]
        if lacking:
            raise AssertionError(f"{lacking[0]} was not written")
        manifest = replace(self.plan, files=dict(sorted(self.finished.items())))
        (self.work / LEDGER).unlink(missing_ok=True)
        manifest.write(self.work)
        shutil.rmtree(self.work / LOCKS, ignore_errors=True)
        if self.out.is_dir():
            old = self.out.with_name(f"{self.out.name}.old-{self.plan.plan_digest()}")
            os.replace(self.out, old)
            os.replace(self.work, self.out)
            shutil.rmtree(old)
        else:
            os.replace(self.work, self.out)
        return manifest

    @property
    def bytes_left(self) -> int:
        """About what is still to be written."""
        return round(_OVERHEAD * sum((t.stop - t.start) * self.plan.row_bytes(t.kind) for t in self.missing()))

    def refuse_taken(self, *, overwrite: bool) -> None:
        """Raise `UsageError` unless `out` is free, or holds features and nothing else and may be replaced."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        foreign = _foreign_entry(self.out)
        if foreign is not None:
            hint = "Choose another folder: only features, and nothing beside them, are ever replaced."
            raise UsageError(f"the output folder exists and {foreign}", where=str(self.out), hint=hint)
        if overwrite:
            return
        try:
            is_same = FeatureManifest.read(self.out).plan_digest() == self.plan.plan_digest()
        except DataError:
            is_same = False
        if is_same:
            message, hint = "these features are already there", "Use them, or give `--overwrite` to make them again."
        else:
            message = "the output folder holds features of another encoder, dataset or choice of options"
            hint = "Choose another folder, or give `--overwrite`."
        raise UsageError(message, where=str(self.out), hint=hint)

    def _check_space(self) -> None:
        needed, free = self.bytes_left, shutil.disk_usage(self.work).free
        if needed > free:
            raise EnvironmentFault(
                f"the features need about {format_bytes(needed)} and {format_bytes(free)} are free.",
                where=str(self.out.parent),
                hint="Write to another disk, or store less: --dtype bf16, fewer --variants, a dataset with fewer views.",
            )

    def _read_ledger(self) -> dict[str, FeatureFile]:
        """The files that earlier runs finished and that are still there; a last line that was cut off counts for nothing."""
        path, names = self.work / LEDGER, {task.name for task in self.plan.tasks()}
        found: dict[str, FeatureFile] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
                name = entry.pop("name")
                record = FeatureFile(**entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            file = self.work / name
            if name in names and file.is_file() and file.stat().st_size == record.bytes:
                found[name] = record
        # Written anew, so that what comes next does not hang on to a torn line.
        lines = (json.dumps({"name": name, **asdict(record)}) + "\n" for name, record in found.items())
        write_whole(path, lines)
        return found


def _foreign_entry(out: Path) -> str | None:
    """What is in `out` besides features, in words that go on from "the folder"; None for features and nothing else."""
    if not out.is_dir():
        return "is no folder"
    for path in sorted(out.iterdir()):
        if path.name in SPLITS and path.is_dir():
            odd = [file.name for file in path.iterdir() if not file.name.endswith(".safetensors")]
            if odd:
                return f"holds {path.name}/{odd[0]}, which is no part of features"
        elif path.name != MANIFEST_NAME or path.is_dir():
            return f"holds {path.name}, which is no part of features"
    try:
        told = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = None
    return None if isinstance(told, dict) and told.get("format") == FORMAT else "is no folder of features"
