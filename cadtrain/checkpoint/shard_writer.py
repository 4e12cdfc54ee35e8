"""Writes one rank's shards of one save: hashed as they pass, flushed, read back; at once, or behind the training.

What is written behind is copied to host memory first, so that training may go on changing it. The copies share storages
as the originals do: tied weights stay tied in the file.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash

from cadtrain.checkpoint.manifest import FileRecord, file_fault
from cadtrain.errors import CheckpointError

log = logging.getLogger(__name__)

ShardSink = Callable[[Path, Any], None]
"""Takes a path and what `torch.save` is to write there, a text, or what a text is `Derived` from."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A text that is made from tensors when it is written; behind the training it is made from their copies."""

    tensors: Any
    text: Callable[[Any], str]
    """Takes `tensors`, or a copy of them."""


WRITE_FAULTS = (OSError, RuntimeError, ValueError, TypeError, AssertionError, MemoryError, CheckpointError)
"""What can go wrong while a shard is written: the disk, the serializer, memory. Nothing else is caught."""


_MAPPED_BYTES = 64 << 20
"""Buffers from this size on are mapped and touched in pieces of it."""
_TOUCHING_THREADS = 8


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
    content = content.text(content.tensors) if isinstance(content, Derived) else content
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
        self._copies = None if pool is None else pool.begin()
        self._waiting: list[tuple[Path, Any]] = []
        self._thread: threading.Thread | None = None

    def take(self, path: Path, content: Any) -> None:
        """Write a shard, or copy it to be written."""
        if self._copies is None:
            self._write(path, content)
        elif isinstance(content, Derived):
            self._waiting.append((path, Derived(self._copies.copy(content.tensors, path.name), content.text)))
        else:
            self._waiting.append((path, self._copies.copy(content, path.name)))

    def start(self) -> None:
        """Begin to write what was copied, in a thread of its own."""
        if self._copies is not None:
            self._copies.finish()
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
        # Stays where something ends the thread that nobody thought of: what is there then is no checkpoint.
        self.failure = "the writing ended early, with an error of the program that stands in the rank's output"
        try:
            while self._waiting:
                self._write(*self._waiting.pop(0))
            self.read_back()
            self.failure = None
        except WRITE_FAULTS as error:
            # Told to all ranks when they next meet; raised here it would die with the thread.
            self.failure = f"{type(error).__name__}: {error}"


class HostPool:
    """Copies of saves in host memory; the buffers are kept from save to save, page-locked where they come from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], _Buffer] = {}

    def begin(self) -> Copies:
        """The copies of one save. They lie in the buffers of the last one, which must be written by now."""
        return Copies(self._buffers)


class Copies:
    """What one save takes to host memory: storages that tensors share are copied once and shared by the copies."""

    def __init__(self, buffers: dict[tuple[str, int], _Buffer]) -> None:
        self._buffers = buffers
        self._seen: dict[tuple[str, int], torch.UntypedStorage] = {}
        self._held: list[torch.UntypedStorage] = []
        self._shard, self._count = "", 0

    def copy(self, content: Any, shard: str) -> Any:
        """`content` with every tensor copied to the host; plain values are copied, too.

        `shard` names the buffers. A tensor on a GPU that an earlier shard of the save held is not copied again.
        """
        self._shard, self._count = shard, 0
        found = self._of(content)
        # What lies in host memory was mostly put there for this shard alone; held on to, it would be there twice.
        self._held = [storage for storage in self._held if _outlives_its_shard(storage)]
        kept = {_key(storage) for storage in self._held}
        self._seen = {key: copied for key, copied in self._seen.items() if key in kept}
        return found

    def finish(self) -> None:
        """Wait until every copy is made, and let go of the originals."""
        if any(storage.device.type == "cuda" for storage in self._held):
            torch.cuda.synchronize()
        self._held.clear()
        self._seen.clear()

    def _of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            items = [(self._of(key), self._of(held)) for key, held in value.items()]
            return type(value)(items)
        if type(value) in (list, tuple):
            return type(value)(self._of(held) for held in value)
        return copy.deepcopy(value)

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        value = value.detach()
        storage = value.untyped_storage()
        if _key(storage) not in self._seen or storage.nbytes() == 0:
            self._seen[_key(storage)] = self._storage(storage)
            # Held, so that an address is not given to another tensor while the copies are made.
            self._held.append(storage)
        copied = torch.empty(0, dtype=value.dtype)
        return copied.set_(self._seen[_key(storage)], value.storage_offset(), value.shape, value.stride())

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        place = (self._shard, self._count)
        self._count += 1
        buffer = self._buffers.get(place)
        if buffer is None or buffer.bytes.nbytes != storage.nbytes():
            self._buffers.pop(place, None)
            buffer = self._buffers[place] = _Buffer(storage.nbytes(), locked=storage.device.type == "cuda")
        buffer.bytes.copy_(_bytes_of(storage), non_blocking=True)
        return buffer.bytes.untyped_storage()


def _key(storage: torch.UntypedStorage) -> tuple[str, int]:
    return str(storage.device), storage.data_ptr()


def _outlives_its_shard(storage: torch.UntypedStorage) -> bool:
    """Whether `storage` is one of the engine's own, which other shards of the save may hold as well."""
    return storage.device.type == "cuda"


class _Buffer:
    """Host memory of exactly `nbytes`, page-locked if asked and possible: a GPU copies into it at the full rate of its link.

    Not from torch's own page-locked allocator, which rounds every size up to a power of two: shards of tens of gigabytes
    would take up to twice the memory. Large pages are asked for, and all are touched by several threads beforehand: locking
    them is then all that is left to do one by one.
    """

    def __init__(self, nbytes: int, *, locked: bool) -> None:
        if not locked or nbytes < _MAPPED_BYTES:
            self.bytes = torch.empty(nbytes, dtype=torch.uint8)
        else:
            self.bytes = _touched(nbytes)
        if not locked or not nbytes:
            return
        if _succeeded(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0)):
            # The finalizer holds the memory, so it is still there when it is unlocked.
            weakref.finalize(self, _unlock, self.bytes).atexit = False
        else:
            log.warning("host memory for a copy of the state could not be page-locked: the copy will be slower")


def _touched(nbytes: int) -> torch.Tensor:
    """uint8[nbytes] of zeros, every page of it there."""
    mapped = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(mapped, dtype=torch.uint8)  # holds the mapping
    with ThreadPoolExecutor(_TOUCHING_THREADS) as threads:
        list(threads.map(torch.Tensor.zero_, found.split(_MAPPED_BYTES)))
    return found


def _unlock(locked: torch.Tensor) -> None:
    _succeeded(torch.cuda.cudart().cudaHostUnregister(locked.data_ptr()))


def _succeeded(code: Any) -> bool:
    """Whether CUDA did as it was asked; if not, its error is taken away, which else the next kernel would be blamed for."""
    if int(code) == 0:
        return True
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
