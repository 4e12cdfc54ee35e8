"""Low-rank adapters beside frozen linear layers: peft's modules, with a forward pass that adds without copies.

Legend: T tokens, I inputs, O outputs, r rank.

peft's own pass makes three tensors of [T, O] beside the base layer's output (the adapter's product, its scaled copy, the
sum), and its backward pass as many again; at 7 layers a block that traffic is a sixth of a training step. Here the small
product is added by the matrix multiplication itself.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn


class _AdaptedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scale (x' Aᵀ) Bᵀ, where x' is x or what dropout left of it (Source: LoRA, arXiv 2106.09685, section 4.1)."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Outputs [..., O] of inputs x [..., I], x' likewise (None: x), weight [O, I], bias [O], down A [r, I], up B [O, r]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        small = (rows if dropped is None else dropped.reshape(rows.shape)) @ down.T
        outputs = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        outputs.addmm_(small, up.T, alpha=scale)
        # The weights themselves and no views of them: under ZeRO-3 their memory comes and goes. A frozen base needs x no more.
        adapted = inputs if dropped is None else dropped
        ctx.save_for_backward(inputs if ctx.needs_input_grad[2] else None, adapted, weight, down, up, small)
        ctx.scale, ctx.has_dropped = scale, dropped is not None
        return outputs.view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, adapted, weight, down, up, small = ctx.saved_tensors
        upstream = grad_outputs[0].reshape(-1, weight.shape[0])
        rows = adapted.reshape(-1, adapted.shape[-1])
        needs_inputs, needs_dropped, needs_weight, needs_bias, needs_down, needs_up, _ = ctx.needs_input_grad
        small_gradient = (upstream @ up).mul_(ctx.scale)
        inputs_gradient = None
        if needs_inputs:
            inputs_gradient = upstream @ weight
            if not ctx.has_dropped:
                inputs_gradient.addmm_(small_gradient, down)
            inputs_gradient = inputs_gradient.view(adapted.shape)
        return (
            inputs_gradient,
            (small_gradient @ down).view(adapted.shape) if needs_dropped else None,
            upstream.T @ inputs.reshape(rows.shape) if needs_weight else None,
            upstream.sum(0) if needs_bias else None,
            small_gradient.T @ rows if needs_down else None,
            (upstream.T @ small).mul_(ctx.scale) if needs_up else None,
            None,
        )


def add_in_place(layers: nn.Module) -> None:
    """Give every adapted linear layer below `layers` the lean forward pass, in place.

    Only for layers that ZeRO-3 gathers as a whole (decoder layers): the pass reads the weights of base and adapter
    without calling their modules, whose hooks would gather them one by one.
    """
    from peft.tuners.lora import Linear

    module: Any
    for module in layers.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and len(module.lora_A) == 1:
            module.forward = types.MethodType(_forward, module)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    (name,) = layer.lora_A
    down, up, base = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.base_layer
    is_plain = layer.active_adapters == [name] and not (layer.disable_adapters or layer.merged)
    if args or kwargs or not is_plain or not (x.dtype == base.weight.dtype == down.dtype):
        out: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    dropout = layer.lora_dropout[name]
    drops = layer.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
    adapted: torch.Tensor = _AdaptedLinear.apply(
        x, dropout(x) if drops else None, base.weight, base.bias, down, up, float(layer.scaling[name])
    )
    return adapted
