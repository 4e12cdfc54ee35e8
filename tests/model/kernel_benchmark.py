"""What each fused operation gives alone, forward and backward, at the sizes of an 8B model.

    python -m tests.model.kernel_benchmark [--tokens 8192] [--out FILE.json]

Needs one CUDA device and the `gpu` extra. Each row is one operation in its plain and in its fused form: median milliseconds
of a forward and a backward pass, and the peak of memory beside the inputs. It measures and asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen3Config
from transformers.models.qwen3 import modeling_qwen3

from cadtrain.model.attention import packed_attention
from cadtrain.model.kernels import ops_for
from cadtrain.model.lora import _AdaptedLinear
from cadtrain.model.loss import cross_entropy_sum, linear_cross_entropy_sum

WIDTH, MLP, HEADS, KEYS, HEAD, VOCABULARY, RANK = 4096, 12288, 32, 8, 128, 151_936, 32
Work = Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    rows = []
    for name, forms in cases(asked.tokens).items():
        for form, make in forms.items():
            milliseconds, gib = measure(make(), asked.repeats)
            rows.append({"operation": name, "form": form, "ms": milliseconds, "peak_gib": gib})
            print(f"{name:28} {form:34} {milliseconds:9.3f} ms {gib:8.3f} GiB", flush=True)
            torch.cuda.empty_cache()
    if asked.out:
        found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": asked.tokens, "rows": rows}
        asked.out.write_text(json.dumps(found, indent=1))


def measure(work: Work, repeats: int) -> tuple[float, float]:
    """Median milliseconds of `work` and its backward pass, and the peak GiB beside what was there before."""
    times = []
    for number in range(repeats + 3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        out = work()
        out.backward(torch.ones_like(out))
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
        del out
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**30


def leaf(*shape: int, scale: float = 1.0, learns: bool = True) -> torch.Tensor:
    return (torch.randn(shape) * scale).requires_grad_(learns)


def cases(tokens: int) -> dict[str, dict[str, Callable[[], Work]]]:
    return {
        "loss, head learns": losses(tokens, learns=True),
        "loss, head frozen": losses(tokens, learns=False),
        "norm of the residual": norms(tokens),
        "norm of query heads": norms(tokens * HEADS, HEAD),
        "gate": gates(tokens),
        "rotary": rotaries(tokens),
        "adapter on gate_proj": adapters(tokens),
        "attention, 2 sequences": attentions(tokens, tokens // 2),
        "attention, 400 tokens each": attentions(tokens, 400),
    }


def losses(tokens: int, *, learns: bool) -> dict[str, Callable[[], Work]]:
    def of(loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], Work]:
        def make() -> Work:
            hidden, weight = leaf(tokens, WIDTH), leaf(VOCABULARY, WIDTH, scale=0.02, learns=learns)
            targets = torch.randint(0, VOCABULARY, (tokens,))

            def work() -> torch.Tensor:
                hidden.grad = weight.grad = None
                return loss(hidden, weight, targets)

            return work

        return make

    def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        found: torch.Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
        return found

    def torchs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")

    return {
        "torch's, over fp32 logits": of(torchs),
        "over bf16 logits, in place": of(lambda h, w, t: cross_entropy_sum(h @ w.T, t)),
        "over hidden states": of(linear_cross_entropy_sum),
        "Liger's fused linear": of(liger),
    }


def norms(rows: int, width: int = WIDTH) -> dict[str, Callable[[], Work]]:
    def of(*, fused: bool) -> Work:
        states = leaf(rows, width)
        norm = modeling_qwen3.Qwen3RMSNorm(width)
        ops = ops_for(states)
        assert ops is not None
        return lambda: ops.rms_norm(states, norm.weight, 1e-6) if fused else norm(states)

    return {"plain": lambda: of(fused=False), "fused": lambda: of(fused=True)}


def gates(tokens: int) -> dict[str, Callable[[], Work]]:
    def of(*, fused: bool) -> Work:
        gate, up = leaf(tokens, MLP), leaf(tokens, MLP)
        ops = ops_for(gate)
        assert ops is not None
        # Copies, since the fused form writes its gradients over its inputs.
        return lambda: ops.silu_mul(gate * 1, up * 1) if fused else functional.silu(gate * 1) * (up * 1)

    return {"plain": lambda: of(fused=False), "fused": lambda: of(fused=True)}


def rotaries(tokens: int) -> dict[str, Callable[[], Work]]:
    def of(*, fused: bool) -> Work:
        query, key = leaf(1, tokens, HEADS, HEAD), leaf(1, tokens, KEYS, HEAD)
        config = Qwen3Config(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=KEYS, head_dim=HEAD)
        cosines, sines = modeling_qwen3.Qwen3RotaryEmbedding(config)(query, torch.arange(tokens)[None])
        ops = ops_for(query)
        assert ops is not None
        plain = modeling_qwen3.apply_rotary_pos_emb

        def work() -> torch.Tensor:
            turned = (ops.rotary if fused else plain)(
                (query * 1).transpose(1, 2), (key * 1).transpose(1, 2), cosines, sines
            )
            return torch.cat([part.reshape(-1) for part in turned])

        return work

    return {"plain": lambda: of(fused=False), "fused": lambda: of(fused=True)}


def adapters(tokens: int) -> dict[str, Callable[[], Work]]:
    def weights() -> tuple[torch.Tensor, ...]:
        return leaf(tokens, WIDTH), leaf(MLP, WIDTH, scale=0.02, learns=False), leaf(RANK, WIDTH), leaf(MLP, RANK)

    def pefts() -> Work:
        states, weight, down, up = weights()
        return lambda: states @ weight.T + ((states @ down.T) @ up.T) * 2.0

    def added() -> Work:
        states, weight, down, up = weights()
        return lambda: _AdaptedLinear.apply(states, None, weight, None, down, up, 2.0)

    def bare() -> Work:
        states, weight, *_ = weights()
        return lambda: states @ weight.T

    return {"no adapter": bare, "peft's": pefts, "added in place": added}


def attentions(tokens: int, length: int) -> dict[str, Callable[[], Work]]:
    def of(*, copied: bool) -> Work:
        states = [leaf(1, tokens, heads, HEAD) for heads in (HEADS, KEYS, KEYS)]
        bounds = torch.tensor([*range(0, tokens, length), tokens], dtype=torch.int32)
        layout: dict[str, Any] = {"cu_seqlens": bounds, "max_seqlen": length}

        def work() -> torch.Tensor:
            query, key, value = (part.transpose(1, 2) for part in states)
            if copied:
                key, value = (part.repeat_interleave(HEADS // KEYS, dim=1) for part in (key, value))
            return packed_attention(nn.Identity(), query, key, value, None, **layout)[0]

        return work

    forms = {"keys copied for query heads": lambda: of(copied=True), "keys shared": lambda: of(copied=False)}
    if length * 2 == tokens:
        forms["SDPA over rows"] = lambda: sdpa(tokens, length)
    return forms


def sdpa(tokens: int, length: int) -> Work:
    states = [leaf(tokens // length, length, heads, HEAD) for heads in (HEADS, KEYS, KEYS)]
    return lambda: functional.scaled_dot_product_attention(
        *(part.transpose(1, 2) for part in states), is_causal=True, enable_gqa=True
    )


if __name__ == "__main__":
    main()
