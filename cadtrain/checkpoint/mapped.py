"""Values read from mapped files without keeping the files in memory.

A mapped shard counts as this process's memory page by page once it was read. Here pages are asked for before a copy, in
one go instead of fault by fault, and given back after it. Both are hints: where the system knows no such call, or its C library
is unknown, nothing but speed and the count differs.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch

from cadtrain.errors import CheckpointError

_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22
"""Linux's numbers; the second since 5.14."""


def copy_span(target: torch.Tensor, vectors: Sequence[torch.Tensor], offset: int) -> None:
    """Fill the flat `target` from position `offset` of the concatenation of `vectors`, flat views of mapped files.

    Raises `CheckpointError` where they end before it is full.
    """
    done = 0
    for vector in vectors:
        if done == target.numel():
            return
        if offset >= vector.numel():
            offset -= vector.numel()
            continue
        count = min(vector.numel() - offset, target.numel() - done)
        _copy(target[done : done + count], vector[offset : offset + count])
        done, offset = done + count, 0
    if done < target.numel():
        raise CheckpointError(f"a weight ends {target.numel() - done} values behind the shards' last value.")


def _copy(target: torch.Tensor, values: torch.Tensor) -> None:
    _advise(values, _MADV_POPULATE_READ)
    target.copy_(values)
    _advise(values, _MADV_DONTNEED)


def _load_libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


_LIBC = _load_libc()


def _advise(values: torch.Tensor, advice: int) -> None:
    """Whole pages inside `values` only: what lies beside them is not ours.

    Giving back is right for unchanged pages of a file alone, which `load_shard(mmap=True)` guarantees: the next read brings
    them in again. Memory without a file would come back as zeros.
    """
    if _LIBC is None:
        return
    page = mmap.PAGESIZE
    start = -(-values.data_ptr() // page) * page
    end = (values.data_ptr() + values.nbytes) // page * page
    if end > start:
        _LIBC.madvise(start, end - start, advice)
