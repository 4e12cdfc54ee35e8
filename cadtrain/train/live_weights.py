"""What this rank holds of the model's weights at the moment of a save, for their hashes.

stage   trained                                              frozen, buffers
0       rank 0: whole (fp32 beside it in bf16)               rank 0: whole
1, 2    each rank: its span of the fp32 master weights       rank 0: whole
3       each rank: its N-th of the fp32 master weights       frozen: each rank's N-th; buffers: rank 0
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from cadtrain.checkpoint.weight_sums import LiveSpan
from cadtrain.train.reshard import Layout


def live_spans(model: torch.nn.Module, layout: Layout, trained: Collection[torch.nn.Parameter]) -> Iterator[LiveSpan]:
    """This rank's spans of every parameter and persistent buffer, trained ones in the optimizer's fp32. No collective."""
    learning, rank = {id(parameter) for parameter in trained}, layout.rank
    for name, parameter in model.named_parameters():
        numel = int(getattr(parameter, "ds_numel", parameter.numel()))
        if id(parameter) in learning:
            part = layout.part(parameter) if layout.stage in (1, 2, 3) or rank == 0 else None
            if part is not None:
                count = max(0, min(part.count, numel - part.start))  # stage 3 pads the last rank's part
                yield LiveSpan(name, numel, part.start, part.master.detach().view(-1)[part.at : part.at + count])
        elif layout.stage == 3:
            held = parameter.ds_tensor.detach().view(-1)  # type: ignore[attr-defined]
            start = rank * held.numel()
            yield LiveSpan(name, numel, start, held[: max(0, min(held.numel(), numel - start))], is_constant=True)
        elif rank == 0:
            yield LiveSpan(name, numel, 0, parameter.detach().reshape(-1), is_constant=True)
    if rank == 0:
        kept = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if name in kept:
                yield LiveSpan(name, buffer.numel(), 0, buffer.detach().reshape(-1))
