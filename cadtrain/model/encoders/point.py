"""The Michelangelo point encoder: a cloud with normals becomes a fixed number of latent tokens.

Legend: C clouds, P points of a cloud, L latents, D width, F Fourier features of a point.

Parameter names and layouts are those of Michelangelo's `CrossAttentionEncoder`, so its released weights load as they are
(without query/key/value biases, as in `shapevae-256`). Source: Zhao et al. 2023, arXiv 2306.17115.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional

from cadtrain.model.encoders.frozen import Freezable

POINT_CHANNELS = 6
"""x, y, z and the three components of the normal."""


def fourier_features(xyz: torch.Tensor, num_frequencies: int) -> torch.Tensor:
    """float32[..., 3 (2 num_frequencies + 1)]: the coordinates, then the sines, then the cosines of them times 2^k.

    Always in fp32, and from powers of two made on the spot: a bf16 coordinate times 2^7 is off by half a turn, and a
    buffer of frequencies would be cast with the rest of the model.
    """
    # Meta tensors, which have shapes only, know no autocast that could be switched off.
    with nullcontext() if xyz.is_meta else torch.autocast(xyz.device.type, enabled=False):
        xyz = xyz.float()
        angles = torch.stack([xyz * 2.0**k for k in range(num_frequencies)], dim=-1).flatten(-2)  # [..., 3 * k]
        return torch.cat([xyz, angles.sin(), angles.cos()], dim=-1)


class PointEncoder(Freezable):
    """Latent tokens [C, L, D] of clouds float32[C, P, 6]."""

    def __init__(
        self,
        *,
        num_latents: int = 256,
        width: int = 768,
        num_heads: int = 12,
        num_layers: int = 8,
        num_frequencies: int = 8,
        trainable: bool = False,
    ) -> None:
        super().__init__(trainable)
        self.num_frequencies = num_frequencies
        self.width = width
        self.query = nn.Parameter(torch.empty(num_latents, width).normal_(std=0.02))
        features = 3 * (2 * num_frequencies + 1) + 3
        self.input_proj = nn.Linear(features, width)
        self.cross_attn = CrossAttentionBlock(width, num_heads)
        self.self_attn = SelfAttentionStack(width, num_heads, num_layers)
        self.ln_post = nn.LayerNorm(width)
        self.num_tokens = num_latents
        self.settle()

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        with self.recording():
            features = torch.cat(
                [fourier_features(points[..., :3], self.num_frequencies), points[..., 3:].float()], dim=-1
            )
            data = self.input_proj(features.to(self.input_proj.weight.dtype))  # [C, P, D]
            query = self.query.expand(points.shape[0], -1, -1)  # [C, L, D]
            latents: torch.Tensor = self.ln_post(self.self_attn(self.cross_attn(query, data)))
            return latents


class CrossAttention(nn.Module):
    """Attention of L latents over P points."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_kv = nn.Linear(width, 2 * width, bias=False)
        self.c_proj = nn.Linear(width, width)

    def forward(self, latents: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        query = self.c_q(latents).unflatten(-1, (self.num_heads, -1))
        key, value = self.c_kv(data).unflatten(-1, (self.num_heads, -1)).chunk(2, dim=-1)
        out: torch.Tensor = self.c_proj(_attend(query, key, value))
        return out


class SelfAttention(nn.Module):
    """Attention among the L latents."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.c_qkv = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        query, key, value = self.c_qkv(latents).unflatten(-1, (self.num_heads, -1)).chunk(3, dim=-1)
        out: torch.Tensor = self.c_proj(_attend(query, key, value))
        return out


class Perceptron(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c_proj(functional.gelu(self.c_fc(hidden)))
        return out


class CrossAttentionBlock(nn.Module):
    """Pre-norm cross-attention and feed-forward, each with a residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = CrossAttention(width, num_heads)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Perceptron(width)
        self.ln_3 = nn.LayerNorm(width)

    def forward(self, latents: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        latents = latents + self.attn(self.ln_1(latents), self.ln_2(data))
        return latents + self.mlp(self.ln_3(latents))


class SelfAttentionBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, each with a residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, num_heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Perceptron(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents + self.attn(self.ln_1(latents))
        return latents + self.mlp(self.ln_2(latents))


class SelfAttentionStack(nn.Module):
    """The self-attention blocks, in order."""

    def __init__(self, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(SelfAttentionBlock(width, num_heads) for _ in range(num_layers))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            latents = block(latents)
        return latents


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Full attention of [C, L or P, H, E] tensors, heads joined again: [C, L, H E]."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
