"""How much of a GPU's memory a run may take: all of it, or what `CADTRAIN_GPU_MEMORY` says.

The variable stands for the option `--gpu-memory` on its way to the ranks and to other hosts. A GPU that is shared, or one that
stands in for a smaller one, is then planned for and used as if it had so much memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cadtrain.errors import UsageError
from cadtrain.units import format_bytes, parse_bytes

VARIABLE = "CADTRAIN_GPU_MEMORY"

CONTEXT_BYTES = int(2.2 * 2**30)
"""CUDA context, kernels, cuBLAS workspaces, NCCL and the driver's own share of the device: outside what the allocator counts.
Measured on H100 with one rank, CUDA 13: 2.14 GiB; more ranks are not measured yet."""


def memory_cap(environ: Mapping[str, str] = os.environ) -> int | None:
    """Bytes of each GPU that may be used, None for all. Raises `UsageError` for a text that is no size, or too small a one."""
    text = environ.get(VARIABLE)
    if not text:
        return None
    try:
        cap = parse_bytes(text, needs_unit=not text.isdecimal())
    except ValueError as error:
        raise UsageError(f"{error}.", where=VARIABLE) from error
    if cap <= CONTEXT_BYTES:
        raise UsageError(
            f"{format_bytes(cap)} of a GPU is less than the {format_bytes(CONTEXT_BYTES)} that CUDA takes for itself.",
            where=VARIABLE, hint="Give the memory of a whole GPU, e.g. 48GB.",
        )  # fmt: skip
    return cap


def allocator_share(total_bytes: int, environ: Mapping[str, str] = os.environ) -> float | None:
    """The share of a device of `total_bytes` that torch's allocator may take under the cap; None without one."""
    cap = memory_cap(environ)
    return None if cap is None else min(1.0, (cap - CONTEXT_BYTES) / total_bytes)
