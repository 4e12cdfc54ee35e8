"""Fused kernels stand where they can run, and nothing changes where they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cadtrain.model.footprint import PackShape, meta_model, trace_footprint
from cadtrain.model.kernels import FusedOps, ops_for, standing_in
from tests.model.tiny import make_model, model_config, pack, sample


@pytest.mark.parametrize("language", ["qwen3", "llama"])
def test_on_the_cpu_the_modules_own_code_runs(language: str) -> None:
    batch = pack([sample(12, 1), sample(20, 2, image=True)])
    auto, plain = (make_model(model_config(language, kernels=kernels)) for kernels in ("auto", "plain"))
    torch.testing.assert_close(auto(**batch).loss_sum, plain(**batch).loss_sum)


@pytest.mark.parametrize("language", ["qwen3", "llama"])
def test_every_norm_gate_and_rotary_of_the_language_model_is_asked(language: str) -> None:
    asked = {"norm": 0, "gate": 0, "rotary": 0}

    def norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        asked["norm"] += 1
        return torch.empty_like(states)

    def gate(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        asked["gate"] += 1
        return torch.empty_like(left)

    def rotary(query: torch.Tensor, key: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked["rotary"] += 1
        return query, key

    model = meta_model(model_config(language), codec="compact", element_bytes=2)
    with standing_in(FusedOps(norm, gate, rotary)):
        trace_footprint(model, PackShape(tokens=64, targets=32, sequences=2), fused=False)
    layers = len(model.language.base_model.layers)
    norms = layers * (4 if language == "qwen3" else 2) + 1
    assert asked == {"norm": norms, "gate": layers, "rotary": layers}


def test_nothing_serves_the_cpu_or_a_bare_meta_tensor() -> None:
    assert ops_for(torch.zeros(2, dtype=torch.bfloat16)) is None
    assert ops_for(torch.zeros(2, device="meta")) is None


def test_fused_kernels_hold_less_memory() -> None:
    fields: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2}
    model = meta_model(model_config(fields=fields, image=False, point=False), codec="compact", element_bytes=2)
    shape = PackShape(tokens=512, targets=256, sequences=4)
    fused, plain = (trace_footprint(model, shape, fused=fused) for fused in (True, False))
    # Plain: gate, silu(gate) and up in bf16; fused: gate and up. Norms: their fp32 input and its root against the bf16 one.
    assert fused.saved_bytes < 0.8 * plain.saved_bytes
    assert fused.peak_bytes < plain.peak_bytes
