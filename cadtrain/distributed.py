"""Collectives that are right in one process too, and the facts about this rank.

Every function that communicates says so; those must be called by all ranks in the same order. Backends:
NCCL between GPUs, gloo between CPU ranks. Nothing here imports torch before a function needs it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands: read from the launcher's environment, a single process by default."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> Place:
        """RANK, LOCAL_RANK and WORLD_SIZE as every launcher sets them."""
        return cls(
            *(
                int(os.environ.get(key, default))
                for key, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
            )
        )

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks."""
        return self.rank == 0


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks. Collective."""
    import torch.distributed as dist

    if is_distributed():
        dist.barrier()


def all_reduce(tensor: torch.Tensor, *, op: str = "sum") -> torch.Tensor:
    """Reduce `tensor` in place over all ranks with `sum`, `max` or `min` and return it. Collective."""
    import torch.distributed as dist

    if is_distributed():
        dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op])
    return tensor


def all_agree(verdict: str | None, *, device: torch.device | str = "cpu") -> list[str | None]:
    """Gather one short verdict a rank (None: all is well), so that a fault on one rank is known to all. Collective."""
    import torch
    import torch.distributed as dist

    if not is_distributed():
        return [verdict]
    width = 2048
    payload = (verdict or "").encode()[: width - 1]
    row = torch.zeros(width, dtype=torch.uint8)
    row[0] = 0 if verdict is None else 1
    row[1 : 1 + len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else row[1:1]
    row = row.to(device)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    found = [bytes(r.cpu().numpy()) for r in rows]
    return [raw[1:].rstrip(b"\0").decode(errors="replace") if raw[0] else None for raw in found]


def first_verdict(verdicts: Sequence[str | None]) -> str | None:
    """The first rank's fault among `verdicts`, with its rank, or None."""
    for rank, verdict in enumerate(verdicts):
        if verdict is not None:
            return f"rank {rank}: {verdict}"
    return None
