"""Writes one rank's shards of one save: hashed as they pass, flushed, read back; at once, or behind the training.

What is written behind is copied to host memory first, so that training may go on changing it. The copies share storages
as the originals do: tied weights stay tied in the file.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash

from cadtrain.checkpoint.manifest import FileRecord, file_fault
from cadtrain.errors import CheckpointError

ShardSink = Callable[[Path, Any], None]
"""Takes a path and what `torch.save` is to write there, or a text."""

WRITE_FAULTS = (OSError, RuntimeError, ValueError, TypeError, AssertionError, MemoryError, CheckpointError)
"""What can go wrong while a shard is written: the disk, the serializer, memory. Nothing else is caught."""


class HashingFile:
    """A file for `torch.save` that hashes what passes through; without a path it hashes only."""

    def __init__(self, path: Path | None) -> None:
        self._descriptor = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._hash = xxhash.xxh3_128()
        self._size = 0
        self.error: OSError | None = None
        """What the disk said; torch, which tries to end the file all the same, then complains of something else."""

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._size += len(view)
        done = 0
        try:
            while self._descriptor is not None and done < len(view):
                done += os.write(self._descriptor, view[done:])
        except OSError as error:
            self.error = error
            raise
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> FileRecord:
        """Wait for the disk and say what was written."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
        return FileRecord(self._size, self._hash.hexdigest())

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def write_shard(path: Path | None, content: Any) -> FileRecord:
    """`torch.save` of `content`, or the text that it is, flushed to the disk; its size and hash. With no path nothing is written."""
    file = HashingFile(path)
    try:
        if isinstance(content, str):
            file.write(content.encode())
            return file.finish()
        torch.save(content, cast(IO[bytes], file))
        return file.finish()
    except RuntimeError:
        if file.error is not None:
            raise file.error from None
        raise
    finally:
        file.close()


class ShardWriter:
    """One rank's shards of one save, below `root`. `take` is a `ShardSink`; `start` and `join` frame what is done behind."""

    def __init__(self, root: Path, pool: HostPool | None) -> None:
        """Written at once without `pool`; with it, copied into its buffers and written after `start`."""
        self.root = root
        self.records: dict[str, FileRecord] = {}
        self.failure: str | None = None
        self._pool = pool
        self._waiting: list[tuple[Path, Any]] = []
        self._thread: threading.Thread | None = None

    def take(self, path: Path, content: Any) -> None:
        """Write a shard, or copy it to be written."""
        if self._pool is None:
            self._write(path, content)
        else:
            self._waiting.append((path, self._pool.copy(content, f"{path.name}")))

    def start(self) -> None:
        """Begin to write what was copied, in a thread of its own."""
        self._thread = threading.Thread(target=self._write_behind, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread; raises `CheckpointError` for what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.failure is not None:
            raise CheckpointError(self.failure)

    @property
    def is_writing(self) -> bool:
        """Whether the thread is still at work."""
        return self._thread is not None and self._thread.is_alive()

    def read_back(self) -> None:
        """Compare every file with what was meant to be in it; raises `CheckpointError`."""
        for name, record in self.records.items():
            if fault := file_fault(self.root / name, record, root=self.root):
                raise CheckpointError(f"{name} does not read back: {fault}")

    def _write(self, path: Path, content: Any) -> None:
        self.records[str(path.relative_to(self.root))] = write_shard(path, content)

    def _write_behind(self) -> None:
        try:
            while self._waiting:
                self._write(*self._waiting.pop(0))
            self.read_back()
        except WRITE_FAULTS as error:
            # Told to all ranks when they next meet; raised here it would die with the thread.
            self.failure = f"{type(error).__name__}: {error}"


class HostPool:
    """Copies of shards in host memory; the buffers are kept from save to save, pinned where they come from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.UntypedStorage] = {}

    def copy(self, content: Any, shard: str) -> Any:
        """`content` with every tensor copied to the host, storages shared as in the original; plain values are copied, too.

        `shard` names the buffers: a second copy under the same name overwrites the first.
        """
        copied = _Copy(self._buffers, shard)
        found = copied.of(content)
        if copied.used_cuda:
            torch.cuda.synchronize()
        return found


class _Copy:
    def __init__(self, buffers: dict[tuple[str, int], torch.UntypedStorage], shard: str) -> None:
        self._buffers, self._shard = buffers, shard
        self._seen: dict[tuple[str, int], torch.UntypedStorage] = {}
        self._held: list[torch.UntypedStorage] = []
        self.used_cuda = False

    def of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            items = [(self.of(key), self.of(held)) for key, held in value.items()]
            return type(value)(items)
        if type(value) in (list, tuple):
            return type(value)(self.of(held) for held in value)
        return copy.deepcopy(value)

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        value = value.detach()
        storage = value.untyped_storage()
        key = (str(storage.device), storage.data_ptr())
        if key not in self._seen or storage.nbytes() == 0:
            self._seen[key] = self._storage(storage)
            # Held, so that an address is not given to another tensor while the copy is made.
            self._held.append(storage)
        copied = torch.empty(0, dtype=value.dtype)
        return copied.set_(self._seen[key], value.storage_offset(), value.shape, value.stride())

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        place = (self._shard, len(self._held))
        buffer = self._buffers.get(place)
        if buffer is None or buffer.nbytes() != storage.nbytes():
            is_cuda = storage.device.type == "cuda"
            buffer = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=is_cuda).untyped_storage()
            self._buffers[place] = buffer
        self.used_cuda |= storage.device.type == "cuda"
        buffer.copy_(storage, non_blocking=True)
        return buffer
