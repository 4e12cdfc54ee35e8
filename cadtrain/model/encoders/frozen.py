"""What a frozen encoder promises: no gradient, and eval mode whatever the model around it does."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn


class Freezable(nn.Module):
    """A module that learns or is frozen for good, as `trainable` says.

    A frozen one is in eval mode from the start and stays there through `model.train()`; its forward pass records
    nothing for autograd.
    """

    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.trainable = trainable

    def settle(self) -> None:
        """Apply `trainable` to the parameters and the mode; called once the submodules exist."""
        self.requires_grad_(self.trainable)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and self.trainable)

    def recording(self) -> torch.autograd.grad_mode.set_grad_enabled:
        """Context in which the forward pass runs: records only for a trainable encoder, and only where recording is on.

        Not `torch.inference_mode`, whose tensors the projector could not save for its backward pass; and weights that ZeRO-3
        gathers inside of it would be such tensors as well, which nothing may write to afterwards. What it would save over
        this is the version counter of each tensor. `cadtrain data encode`, where nothing learns, runs in it.
        """
        return torch.set_grad_enabled(self.trainable and torch.is_grad_enabled())
