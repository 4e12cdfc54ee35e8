"""The sum of cross entropies over target tokens, in fp32, without the logits of all targets in memory.

Legend: N targets, V vocabulary, D width.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cadtrain.model.kernels import cross_entropies_for

IGNORED = -100
"""The label of a position whose token is not learned."""

_CHUNK_ELEMENTS = 1 << 26
"""Logits turned to fp32 at once: 256 MiB."""
_CHUNK_LOGITS = 1 << 28
"""Logits held at once: 512 MiB in bf16. Some 1,800 rows of a vocabulary of 152,000 keep a GPU's matrix units busy."""


def head_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 sum of the cross entropies of `head`'s logits of hidden states [N, D] with int64[N] targets.

    A plain linear head that `prepare_head` has seen never holds all its logits; any other one does.
    """
    if getattr(head, "gives_loss", False):
        loss: torch.Tensor = head(hidden, targets)
        return loss
    return cross_entropy_sum(head(hidden), targets)


def prepare_head(head: nn.Module) -> None:
    """Let a plain linear `head` take targets as a second argument and give the loss, in place; other heads stay as they are.

    The loss is computed inside the module's own forward pass, so ZeRO-3 gathers the weight for it as for any module.
    """
    if type(head) is nn.Linear and head.bias is None:
        head.forward = types.MethodType(_logits_or_loss, head)
        head.gives_loss = True


def _logits_or_loss(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
    if targets is None:
        return functional.linear(hidden, head.weight)
    return linear_cross_entropy_sum(hidden, head.weight, targets)


def linear_cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 sum over n of -log softmax(weight @ hidden[n])[targets[n]], for hidden [N, D], weight [V, D], int64[N] targets.

    Chunks of rows go through projection, softmax and both gradients before the next chunk begins, so memory is that of a
    chunk's logits and of the gradients themselves. The graph serves one backward pass, which scales these in place. The
    weight's gradient is added up in the weight's type, once a chunk: in bf16 ten chunks of 1,600 rows double its rounding.
    N = 0 gives 0 with a graph.
    """
    loss: torch.Tensor = _LinearCrossEntropySum.apply(hidden, weight, targets, torch.is_grad_enabled())
    return loss


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 sum over n of -log softmax(logits[n])[targets[n]], for logits [N, V] and int64[N] targets.

    Needs no second copy of the logits: while autograd records, their gradient is computed chunk by chunk and
    **written over them**, so the caller must not read `logits` again; the graph serves one backward pass. N = 0 gives 0
    with a graph.
    """
    loss: torch.Tensor = _CrossEntropySum.apply(logits, targets, torch.is_grad_enabled())
    return loss


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, records: bool
    ) -> torch.Tensor:
        for_hidden, for_weight = (needed and records for needed in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if for_hidden else None
        weight_gradient: torch.Tensor | None = None
        rows = max(1, _CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = hidden[start : start + rows]
            logits = chunk @ weight.T
            total += _loss_over_logits(logits, targets[start : start + rows], with_gradient=for_hidden or for_weight)
            if hidden_gradient is not None:
                torch.mm(logits, weight, out=hidden_gradient[start : start + rows])
            if for_weight and weight_gradient is None:
                weight_gradient = logits.T @ chunk
            elif weight_gradient is not None:
                weight_gradient.addmm_(logits.T, chunk)
            del logits  # before the next chunk's are made
        if for_weight and weight_gradient is None:
            weight_gradient = torch.zeros_like(weight)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = grad_outputs[0]
        hidden_gradient, weight_gradient = (None if g is None else g.mul_(scale) for g in ctx.saved_tensors)
        return hidden_gradient, weight_gradient, None, None


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, records: bool) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0] and records
        storage = logits.detach()
        total = _loss_over_logits(storage, targets, with_gradient=needs_gradient)
        if needs_gradient:
            ctx.save_for_backward(storage)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0]), None, None


def _loss_over_logits(logits: torch.Tensor, targets: torch.Tensor, *, with_gradient: bool) -> torch.Tensor:
    """The float32 sum of the cross entropies of logits [N, V]; `with_gradient` leaves their gradient in their place."""
    fused = cross_entropies_for(logits)
    if fused is not None:
        return fused(logits, targets, with_gradient=with_gradient).sum()
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        chunk = logits[start : start + rows]
        target = targets[start : start + rows, None]
        log_probabilities = functional.log_softmax(chunk, dim=-1, dtype=torch.float32)
        total -= log_probabilities.gather(1, target).sum()
        if with_gradient:
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
            chunk.copy_(gradient)
    return total
