"""The norm of the global gradient on GPUs, in one reduction.

DeepSpeed 0.19 takes it tensor by tensor, each converted to fp64 first, and at stages 1 and 2 looks through all gradients for
inf and nan before. On two H200 that was a twentieth of the step of an 8B model (docs/performance.md). A norm in fp32 over all
tensors at once costs one pass over them, and a gradient that is not finite has no finite norm, so nothing need be looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def take_norms_at_once(optimizer: Any, stage: int) -> None:
    """Let DeepSpeed's ZeRO `optimizer` of `stage` 1, 2 or 3 use `global_norm`, in place; one that keeps its states on the host stays as it is."""
    # Stage 1 in bf16 is another optimizer, which has no such method and no such pass.
    if not hasattr(optimizer, "get_grad_norm_direct") or getattr(optimizer, "cpu_offload", False):
        return
    if getattr(optimizer, "offload_optimizer", False):
        return

    def norm(gradients: Sequence[torch.Tensor], params: Sequence[torch.Tensor], norm_type: float = 2) -> torch.Tensor:
        assert norm_type == 2, "cadtrain clips by the 2-norm"
        held = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        return global_norm(held, optimizer.dp_process_group, device=optimizer.device)

    optimizer.get_grad_norm_direct = norm
    if stage < 3:
        # `step` sets `overflow` to False before it asks, and to True where the norm is not finite.
        optimizer.check_overflow = lambda partition_gradients=True: None


def global_norm(gradients: Sequence[torch.Tensor], group: Any, *, device: torch.device | str) -> torch.Tensor:
    """float32 2-norm of all ranks' `gradients` together, -1 where it is not finite, as DeepSpeed wants it. Collective.

    `device` is that of the result where this rank holds no gradient.
    """
    import torch.distributed as dist

    exact = [gradient.float() for gradient in gradients]  # no copies of fp32 ones; a norm has its gradients' type
    own = torch.nn.utils.get_total_norm(exact) if exact else torch.zeros((), device=device)
    total = own.double().square()  # of this rank; squares of large norms leave fp32
    dist.all_reduce(total, group=group)
    found = total.sqrt().float()
    return torch.where(found.isfinite(), found, found.new_tensor(-1.0))
