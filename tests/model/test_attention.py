"""Packed attention equals one run per sequence, and refuses what it would leave out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from cadtrain.errors import UsageError
from cadtrain.model import attention
from cadtrain.model.attention import packed_attention

LENGTHS = (5, 1, 9, 3)


def _states(heads: int, key_heads: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, heads, sum(LENGTHS), 8), (1, key_heads, sum(LENGTHS), 8), (1, key_heads, sum(LENGTHS), 8))
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def _layout() -> dict[str, object]:
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return {"cu_seqlens": bounds, "max_seqlen": max(LENGTHS)}


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
def test_equals_an_explicit_mask(heads: int, key_heads: int) -> None:
    query, key, value = _states(heads, key_heads)
    out, weights = packed_attention(nn.Identity(), query, key, value, None, scaling=0.25, **_layout())
    assert weights is None
    assert out.shape == (1, sum(LENGTHS), heads, 8)

    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (sequence[:, None] == sequence[None]) & torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()
    groups = heads // key_heads
    wide = [states.repeat_interleave(groups, dim=1) for states in (key, value)]
    expected = functional.scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)

    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad((out * upstream).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * upstream).sum(), (query, key, value))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_dropout_is_applied() -> None:
    query, key, value = _states(4, 4)
    torch.manual_seed(0)
    with_dropout, _ = packed_attention(nn.Identity(), query, key, value, None, dropout=0.5, **_layout())
    without, _ = packed_attention(nn.Identity(), query, key, value, None, **_layout())
    assert not torch.allclose(with_dropout, without)


def test_layout_must_be_given_and_cover_the_pack() -> None:
    query, key, value = _states(4, 4)
    with pytest.raises(UsageError, match="without `cu_seqlens`"):
        packed_attention(nn.Identity(), query, key, value, None)
    bounds = torch.tensor([0, 5, 17], dtype=torch.int32)
    with pytest.raises(UsageError, match="18 tokens, found 0 to 17"):
        packed_attention(nn.Identity(), query, key, value, None, cu_seqlens=bounds, max_seqlen=12)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"sliding_window": 8}, "window of 8 tokens, but a sequence of the pack has 9"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
    ],
)
def test_what_would_be_ignored_is_refused(extra: dict[str, object], message: str) -> None:
    query, key, value = _states(4, 4)
    with pytest.raises(UsageError, match=message):
        packed_attention(nn.Identity(), query, key, value, None, **_layout(), **extra)


def test_a_window_that_holds_every_sequence_changes_nothing() -> None:
    query, key, value = _states(4, 4)
    plain, _ = packed_attention(nn.Identity(), query, key, value, None, **_layout())
    windowed, _ = packed_attention(nn.Identity(), query, key, value, None, sliding_window=9, **_layout())
    assert torch.equal(plain, windowed)


def test_a_pack_of_equal_sequences_may_be_a_batch_of_rows() -> None:
    query, key, value = (states[:, :, :15] for states in _states(4, 2))
    bounds = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    expected, _ = packed_attention(nn.Identity(), query, key, value, None, scaling=0.25, cu_seqlens=bounds, max_seqlen=5)
    torch.testing.assert_close(attention._rows(query, key, value, 5, 0.25), expected)


@pytest.mark.parametrize(
    ("num_tokens", "num_sequences", "longest", "expected"),
    [(8192, 2, 4096, True), (8192, 8, 1024, True), (8192, 3, 4096, False), (400, 2, 200, False), (8191, 2, 4096, False)],
)
def test_only_sequences_of_one_round_length_are_rows(
    num_tokens: int, num_sequences: int, longest: int, expected: bool
) -> None:
    assert attention._are_rows(num_tokens, num_sequences, longest) is expected
