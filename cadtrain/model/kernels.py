"""Fused kernels for the language model: Liger's for norms, gated MLPs and rotary embeddings, our own for the softmax of the loss.

Legend: T tokens, D width, F width of the MLP, H query heads, K key heads, E head width.

The modules of `model.language` are given forward passes that ask, for each tensor, whether a fused operation serves it:
on CUDA in half precision, when liger-kernel is installed. Anywhere else the module's own code runs, so one model works on
both. On the meta device stand-ins with the kernels' own saved tensors can be put in their place (`standing_in`), which is
how `model.footprint` sees their memory.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm"})
_MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP"})
_ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True, slots=True)
class FusedOps:
    """The operations, as functions that autograd knows."""

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """(states [..., D], weight [D], epsilon) → [..., D]; takes over its gradient's memory in the backward pass."""
    silu_mul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(gate [..., F], up [..., F]) → silu(gate) * up; overwrites both in the backward pass."""
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """(query [1, H, T, E], key [1, K, T, E], cosines and sines [1, T, E]) → both turned, in place."""


def installed() -> bool:
    """Whether liger-kernel can be imported here; looks without importing it."""
    return importlib.util.find_spec("liger_kernel") is not None


@functools.cache
def _liger() -> FusedOps | None:
    if not installed():
        return None
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        out: torch.Tensor = LigerRMSNormFunction.apply(states, weight, epsilon, 0.0, "llama", True)
        return out

    return FusedOps(rms_norm, LigerSiLUMulFunction.apply, LigerRopeFunction.apply)


@functools.cache
def _softmax_kernel() -> Callable[..., torch.Tensor] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from cadtrain.model.softmax_kernel import cross_entropies_in_place

    return cross_entropies_in_place


def _softmax_stand_in(logits: torch.Tensor, targets: torch.Tensor, *, with_gradient: bool) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def cross_entropies_for(logits: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """What gives the cross entropies of `logits` in one pass (`softmax_kernel`), None where torch's operations must."""
    if logits.is_cuda:
        return _softmax_kernel()
    return _softmax_stand_in if logits.is_meta and _on_meta else None


_on_meta: list[FusedOps] = []


@contextmanager
def standing_in(ops: FusedOps) -> Iterator[None]:
    """Inside, `ops` serve tensors on the meta device."""
    _on_meta.append(ops)
    try:
        yield
    finally:
        _on_meta.pop()


def ops_for(tensor: torch.Tensor) -> FusedOps | None:
    """The fused operations that serve `tensor`, None where the module's own code must."""
    if tensor.is_cuda:
        return _liger() if tensor.dtype in (torch.bfloat16, torch.float16) else None
    return _on_meta[-1] if tensor.is_meta and _on_meta else None


def fuse(model: PreTrainedModel) -> None:
    """Let the modules of `model` that have a fused twin use it where it can run, in place.

    Architectures that are in no table stay as they are: a norm of another formula must not be replaced by its name alone.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind in _NORMS:
            _set_forward(module, _norm_forward)
        elif kind in _MLPS and getattr(model.config, "hidden_act", None) == "silu":
            _set_forward(module, _mlp_forward)
        elif kind.endswith("Attention") and f"{kind.removesuffix('Attention')}RMSNorm" in _NORMS:
            _fuse_rotary(sys.modules[type(module).__module__])


def _set_forward(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    if "forward" not in vars(module):
        module.forward = types.MethodType(forward, module)


def _norm_forward(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    ops = ops_for(hidden_states)
    if ops is None or norm.weight.dtype != hidden_states.dtype:
        out: torch.Tensor = type(norm).forward(norm, hidden_states)
        return out
    return ops.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


def _mlp_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    ops = ops_for(x)
    if ops is None:
        out: torch.Tensor = type(mlp).forward(mlp, x)
    else:
        out = mlp.down_proj(ops.silu_mul(mlp.gate_proj(x), mlp.up_proj(x)))
    return out


def _fuse_rotary(modeling: Any) -> None:
    """Replace the function by which a transformers module turns queries and keys; models on the CPU go on to the old one."""
    plain = getattr(modeling, _ROTARY)
    if getattr(plain, "is_cadtrains", False):
        return

    @functools.wraps(plain)
    def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **named: Any) -> Any:
        ops = None if rest or named else ops_for(q)
        return plain(q, k, cos, sin, *rest, **named) if ops is None else ops.rotary(q, k, cos, sin)

    rotary.is_cadtrains = True  # type: ignore[attr-defined]
    setattr(modeling, _ROTARY, rotary)
