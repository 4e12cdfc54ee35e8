"""Causal attention inside each sequence of a pack, registered with transformers as `cadtrain_packed`.

Legend: T tokens of the pack, S sequences, H query heads, K key heads, E head width.

A pack is one flat row of tokens; `cu_seqlens` int32[S+1] holds where each sequence starts, and `max_seqlen` the longest
length as a host integer. On CUDA in half precision the whole pack is one call of torch's variable-length kernel; anywhere
else each sequence is one call of scaled dot product attention. Both are exact: no mask, no padding.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from cadtrain.errors import UsageError

NAME = "cadtrain_packed"

_logger = logging.getLogger(__name__)

_ROW_MULTIPLE = 256
"""Sequences that are equally long by design have a round length."""

_WOULD_BE_IGNORED = ("softcap", "s_aux", "position_bias", "head_mask", "sinks")


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention output [1, T, H, E] of a query [1, H, T, E], a key and a value [1, K, T, E].

    Raises UsageError when the pack's layout is missing, and when the model asks for something that this
    implementation would otherwise leave out: a mask, a sliding window shorter than the longest sequence, soft-capped
    scores or attention sinks.
    """
    if cu_seqlens is None or max_seqlen is None:
        raise UsageError(
            "packed attention was called without `cu_seqlens` and `max_seqlen`.",
            hint='Pass both, or generate with `model.language.set_attn_implementation("sdpa")`.',
        )
    _refuse_what_would_be_ignored(attention_mask, max_seqlen, kwargs)
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise UsageError(
            f"packed attention takes one row of tokens without a cache, found queries {tuple(query.shape)} and keys {tuple(key.shape)}."
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not _has_dropout(dropout):
        if _are_rows(query.shape[2], cu_seqlens.shape[0] - 1, max_seqlen):
            return _rows(query, key, value, max_seqlen, scale), None
        return _varlen(query, key, value, cu_seqlens, max_seqlen, scale), None
    return _sequence_by_sequence(query, key, value, cu_seqlens, scale, dropout), None


def register() -> None:
    """Make `cadtrain_packed` known to transformers; doing so twice changes nothing.

    No mask function is registered with it on purpose: for an implementation that it knows no mask of, transformers
    hands `attention_mask=None` through at once. With one it would first search the position ids for packed sequences,
    which makes the host wait for the device in every step.
    """
    AttentionInterface.register(NAME, packed_attention)


def _refuse_what_would_be_ignored(attention_mask: torch.Tensor | None, max_seqlen: int, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise UsageError("packed attention takes no attention mask; sequences are told apart by `cu_seqlens`.")
    window = kwargs.get("sliding_window")
    if window is not None and max_seqlen > window:
        raise UsageError(
            f"the language model attends within a sliding window of {window} tokens, but a sequence of the pack has {max_seqlen};"
            " packed attention has no window.",
            hint=f"Set `use_sliding_window: false` in the model's configuration, or keep samples within {window} tokens.",
        )
    ignored = [name for name in _WOULD_BE_IGNORED if kwargs.get(name) is not None]
    if ignored:
        raise UsageError(
            f"the language model's attention uses {', '.join(ignored)}, which packed attention does not have."
        )


@functools.cache
def _has_dropout(dropout: float) -> bool:
    if dropout > 0:
        _logger.warning(
            "attention dropout %s keeps CUDA off the variable-length kernel; attention will be slow", dropout
        )
    return dropout > 0


def _are_rows(num_tokens: int, num_sequences: int, max_seqlen: int) -> bool:
    """Whether all sequences have `max_seqlen` tokens, and so many that the kernel made for this length pays.

    Such a kernel is made once for every length, which takes a good part of a second: not for lengths that come by chance.
    """
    return num_sequences * max_seqlen == num_tokens and max_seqlen % _ROW_MULTIPLE == 0


def _rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scale: float) -> torch.Tensor:
    """[1, T, H, E]: a pack of equal sequences as a batch of rows; views, no copies."""
    q, k, v = (states[0].transpose(0, 1).unflatten(0, (-1, length)).transpose(1, 2) for states in (query, key, value))
    shares_heads = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shares_heads)
    return out.transpose(1, 2).flatten(0, 1)[None]


@functools.cache
def _varlen_kernel() -> tuple[Any, bool]:
    """torch's variable-length attention, and whether it wants to be told of grouped query heads.

    The kernel itself has always served several query heads by one key head; later releases ask for `enable_gqa`.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    varlen_attn, asks = _varlen_kernel()
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]  # [T, H or K, E]
    options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if asks else {}
    out = varlen_attn(
        *rows, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(-1, 0), **options
    )
    return out[None]


def _sequence_by_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, dropout: float
) -> torch.Tensor:
    bounds = cu_seqlens.tolist()  # free on CPU; on CUDA (fp32 only) this waits for the device
    if bounds[0] != 0 or bounds[-1] != query.shape[2]:
        raise UsageError(
            f"`cu_seqlens` must run from 0 to the pack's {query.shape[2]} tokens, found {bounds[0]} to {bounds[-1]}."
        )
    shares_heads = query.shape[1] != key.shape[1]
    outputs = [
        functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scale,
            enable_gqa=shares_heads,
        )
        for start, end in itertools.pairwise(bounds)
        if end > start
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


register()
