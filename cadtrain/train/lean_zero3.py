"""Less Python between the kernels of a decoder layer under ZeRO-3, so that the host keeps ahead of the GPU.

Two things cost DeepSpeed 0.19 a good part of a layer's host time, forward and backward. Its linear layers bind their arguments
to a signature made anew in each call (`torch.autograd.Function.apply` does so for functions with a `setup_context`), and each
gathering and release of a leaf module lists the module's parameters by walking through its submodules. `python -m
tests.train.host_overhead` measures what is left.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + bias, which keeps the weight itself for the backward pass and no view of it: its memory comes and goes."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Outputs [..., O] of inputs [..., I], weight [O, I], bias [O]."""
        ctx.save_for_backward(inputs, weight)
        outputs: torch.Tensor = inputs @ weight.T
        return outputs if bias is None else outputs.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        upstream = grad_outputs[0]
        rows = upstream.reshape(-1, weight.shape[0])
        return (
            upstream @ weight if needs_inputs else None,
            rows.T @ inputs.reshape(-1, inputs.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def lighten(layers: Iterable[nn.Module]) -> None:
    """Give `layers`, each of which ZeRO-3 gathers as a whole, the lean ways, in place. Their parameters stay what they are from here on."""
    # Attributes of the instances, which stand before their classes' methods.
    for layer in layers:
        for module in layer.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                vars(module)["forward"] = types.MethodType(_linear_forward, module)
        vars(layer)["named_parameters"] = types.MethodType(_listed(tuple(layer.named_parameters())), layer)


def _linear_forward(linear: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = _Linear.apply(input, linear.weight, linear.bias)
    return outputs


def _listed(found: tuple[tuple[str, nn.Parameter], ...]) -> Any:
    """`Module.named_parameters` that knows its answer."""

    def named_parameters(
        module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if prefix or not recurse or not remove_duplicate:
            return type(module).named_parameters(module, prefix, recurse, remove_duplicate)
        return iter(found)

    return named_parameters
