"""The sum of cross entropies over target tokens, in fp32, in the memory of the logits themselves.

Legend: N targets, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

IGNORED = -100
"""The label of a position whose token is not learned."""

_CHUNK_ELEMENTS = 1 << 26
"""Logits turned to fp32 at once: 256 MiB."""


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 sum over n of -log softmax(logits[n])[targets[n]], for logits [N, V] and int64[N] targets.

    Needs no second copy of the logits: while autograd records, their gradient is computed chunk by chunk and
    **written over them**, so the caller must not read `logits` again. N = 0 gives 0 with a graph.
    """
    loss: torch.Tensor = _CrossEntropySum.apply(logits, targets)
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
        storage = logits.detach()
        for start in range(0, logits.shape[0], rows):
            chunk = storage[start : start + rows]
            target = targets[start : start + rows, None]
            log_probabilities = functional.log_softmax(chunk, dim=-1, dtype=torch.float32)
            total -= log_probabilities.gather(1, target).sum()
            if needs_gradient:
                gradient = log_probabilities.exp_()
                gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
                chunk.copy_(gradient)
        if needs_gradient:
            ctx.save_for_backward(storage)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None
