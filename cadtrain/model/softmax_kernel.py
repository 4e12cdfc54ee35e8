"""One pass of a GPU over logits: their cross entropies, and their gradient in their place.

Legend: N rows, V vocabulary.

Imported only where Triton is: with torch's CUDA builds. torch's own operations read and write the logits of a large vocabulary
half a dozen times, in fp32; this reads them twice, the second time mostly from cache, and writes them once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK, _WARPS = 8192, 16


@triton.jit
def _cross_entropy_rows(  # type: ignore[no-untyped-def]
    logits_ptr, stride, targets_ptr, losses_ptr, vocabulary, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    # Read before the reductions below, behind which every thread of the row waits: the gradient will be written over it.
    at_target = tl.load(row_ptr + target).to(tl.float32)
    largest = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.load(row_ptr + places, mask=places < vocabulary, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), axis=0)
        largest = larger
    log_total = largest + tl.log(total)
    tl.store(losses_ptr + row, log_total - at_target)
    if WITH_GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            places = start + tl.arange(0, BLOCK)
            inside = places < vocabulary
            values = tl.load(row_ptr + places, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(values - log_total)
            gradient = tl.where(places == target, gradient - 1.0, gradient)
            tl.store(row_ptr + places, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropies_in_place(logits: torch.Tensor, targets: torch.Tensor, *, with_gradient: bool) -> torch.Tensor:
    """float32[N]: the cross entropy of each row of logits [N, V] (rows contiguous) with int64[N] targets.

    `with_gradient` leaves softmax minus one-hot, the gradient of the rows' sum, where the logits were.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        _cross_entropy_rows[(logits.shape[0],)](
            logits, logits.stride(0), targets, losses, logits.shape[1],
            WITH_GRADIENT=with_gradient, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return losses
