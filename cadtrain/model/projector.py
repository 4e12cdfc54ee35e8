"""From an encoder's tokens to the language model's width.

Legend: N tokens, W encoder width, D language model width.
"""

from __future__ import annotations

import torch
from torch import nn


class Projector(nn.Module):
    """A two-layer perceptron [..., W] → [..., D] behind a layer norm.

    The norm makes the projector indifferent to the scale of the encoder's tokens: DINOv2's and Michelangelo's differ
    by an order of magnitude, and a freshly made projector would pass that on into the language model.
    """

    def __init__(self, input_width: int, hidden_width: int, output_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(input_width)
        self.up = nn.Linear(input_width, hidden_width)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden_width, output_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.act(self.up(self.norm(features)))
        out: torch.Tensor = self.down(hidden)
        return out
