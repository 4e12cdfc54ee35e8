"""On a CUDA device: the variable-length kernel agrees with exact attention, and a step never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from cadtrain.model import CadMllm, build_model, build_tokenizer
from cadtrain.model.attention import packed_attention
from tests.model.tiny import model_config, pack, sample

pytestmark = pytest.mark.gpu

LENGTHS = (130, 1, 77, 300, 5)


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _model(dtype: torch.dtype, **options: Any) -> CadMllm:
    config = model_config(**options)
    return build_model(
        config,
        tokenizer=build_tokenizer(config.language),
        codec="compact",
        codec_version=1,
        dtype=dtype,
        device="cuda",
        seed=0,
    )


def _on_device(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_heads", [8, 2])
def test_half_precision_attention_agrees_with_exact(dtype: torch.dtype, key_heads: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = ((1, 8, sum(LENGTHS), 64), (1, key_heads, sum(LENGTHS), 64), (1, key_heads, sum(LENGTHS), 64))
    states = [torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    exact_states = [tensor.detach().float().requires_grad_() for tensor in states]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    layout: dict[str, Any] = {"cu_seqlens": bounds, "max_seqlen": max(LENGTHS)}
    with _no_waiting():
        out, _ = packed_attention(nn.Identity(), *states, None, scaling=0.1, **layout)
    exact, _ = packed_attention(nn.Identity(), *exact_states, None, scaling=0.1, **layout)
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)
    upstream = torch.randn(exact.shape, generator=generator, device="cuda")
    found = torch.autograd.grad((out.float() * upstream).sum(), states)
    expected = torch.autograd.grad((exact * upstream).sum(), exact_states)
    for left, right in zip(found, expected, strict=True):
        assert (left.float() - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_never_waits_for_the_device(recompute: str, lora: bool) -> None:
    model = _model(torch.bfloat16, recompute=recompute, lora=lora, trainable=True)
    batch = _on_device(pack([sample(12, 1), sample(20, 2, image=True, point=True)]))
    batch["target_positions"] = (batch["labels"] != -100).nonzero().squeeze(1)
    model(**batch).loss_sum.backward()  # once beforehand: kernels are chosen and loaded on first use
    torch.cuda.synchronize()
    with _no_waiting():
        model(**batch).loss_sum.backward()


def test_bf16_model_agrees_with_fp32() -> None:
    samples = [sample(40, 1), sample(60, 2, image=True), sample(33, 3, point=True)]
    batch = _on_device(pack(samples))
    half, exact = _model(torch.bfloat16), _model(torch.float32)
    for target, source in zip(exact.parameters(), half.parameters(), strict=True):
        target.data.copy_(source.data)
    left, right = half(**batch), exact(**batch)
    torch.testing.assert_close(left.loss_sum, right.loss_sum, rtol=2e-2, atol=0)
    left.loss_sum.backward()
    right.loss_sum.backward()
    names = (
        "language.model.layers.0.self_attn.q_proj.weight",
        "image_projector.up.weight",
        "point_projector.up.weight",
    )
    for name in names:
        found, expected = half.get_parameter(name).grad, exact.get_parameter(name).grad
        assert (found.float() - expected).norm() <= 0.1 * expected.norm(), name
