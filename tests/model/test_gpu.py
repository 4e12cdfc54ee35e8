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
from cadtrain.model.kernels import installed
from cadtrain.model.loss import linear_cross_entropy_sum
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


def test_rows_of_one_length_agree_with_exact() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    # As a model hands them over: heads behind tokens in memory.
    states = [
        torch.randn(1, 1536, heads, 64, generator=generator, device="cuda").bfloat16().transpose(1, 2).requires_grad_()
        for heads in (8, 2, 2)
    ]
    exact_states = [tensor.detach().float().requires_grad_() for tensor in states]
    layout: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, 512, 1024, 1536], dtype=torch.int32, device="cuda"),
        "max_seqlen": 512,
    }
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


def _pair(samples: list[dict[str, Any]], **options: Any) -> tuple[CadMllm, CadMllm, dict[str, Any]]:
    """The same bf16 model with fused kernels and without, and a pack."""
    fused, plain = _model(torch.bfloat16, **options), _model(torch.bfloat16, kernels="plain", **options)
    return fused, plain, _on_device(pack(samples))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("language", ["qwen3", "llama"])
def test_fused_kernels_agree_with_plain_modules(language: str, lora: bool, recompute: str) -> None:
    assert installed(), "the `gpu` extra is needed here: pip install liger-kernel"
    options: dict[str, Any] = {"language": language, "lora": lora, "recompute": recompute}
    fused, plain, batch = _pair([sample(40, 1), sample(60, 2, image=True), sample(33, 3, point=True)], **options)
    exact = _model(torch.float32, kernels="plain", **options)
    for target, source in zip(exact.parameters(), fused.parameters(), strict=True):
        target.data.copy_(source.data)
    losses = [model(**batch).loss_sum for model in (fused, plain, exact)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[2], rtol=2e-2, atol=0)
    for (name, found), (_, other), (_, expected) in zip(
        fused.named_parameters(), plain.named_parameters(), exact.named_parameters(), strict=True
    ):
        if expected.grad is None or not expected.grad.any():
            continue
        # bf16's own distance from fp32 is the measure: the fused pass may not be much farther away than the plain one.
        size = expected.grad.norm()
        ours, theirs = (found.grad.float() - expected.grad).norm() / size, (other.grad.float() - expected.grad).norm() / size
        assert ours <= 1.5 * theirs + 0.02, name


def test_fifty_steps_with_fused_kernels_have_the_plain_losses() -> None:
    fused, plain, batch = _pair([sample(40, 1), sample(60, 2, image=True), sample(33, 3, point=True)])
    losses: list[list[float]] = []
    for model in (fused, plain):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(50):
            loss = model(**batch).loss_sum / 60
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.7 * losses[0][0]
    for step, (left, right) in enumerate(zip(*losses, strict=True)):
        assert abs(left - right) <= 0.03 * losses[1][0], step


def test_the_loss_over_hidden_states_in_bf16_agrees_with_fp32() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(5000, 512, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(151_936, 512, generator=generator, device="cuda") / 20).bfloat16().requires_grad_()
    targets = torch.randint(0, 151_936, (5000,), generator=generator, device="cuda")
    loss = linear_cross_entropy_sum(hidden, weight, targets)
    exact_inputs = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    exact = nn.functional.cross_entropy(exact_inputs[0] @ exact_inputs[1].T, targets, reduction="sum")
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0)
    found = torch.autograd.grad(loss / 5000, (hidden, weight))
    expected = torch.autograd.grad(exact / 5000, exact_inputs)
    for left, right in zip(found, expected, strict=True):
        assert (left.float() - right).norm() <= 2e-2 * right.norm()

